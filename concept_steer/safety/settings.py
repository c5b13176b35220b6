"""The safety switch's settings: the one schema that node, command line, API and metadata share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..errors import SettingError

Level = Literal["off", "gentle", "standard", "strict"]
Method = Literal["auto", "vectors", "sld", "both"]
OnFlag = Literal["mark", "blur", "retry", "withhold"]
Detector = Literal["", "demo", "nudenet", "opennsfw", "q16"]
LEVELS: tuple[str, ...] = get_args(Level)
METHODS: tuple[str, ...] = get_args(Method)
ON_FLAG: tuple[str, ...] = get_args(OnFlag)
DETECTORS: tuple[str, ...] = get_args(Detector)
MOST_RETRIES = 20
_CHOICES = {"level": LEVELS, "method": METHODS, "on_flag": ON_FLAG, "detector": DETECTORS}
_DONE = {
    "mark": "kept and marked",
    "blur": "blurred beyond recognition",
    "retry": "drawn again, safer and from a new seed, at most {} times, then withheld",
    "withhold": "withheld; the others stay",
}


@dataclass(frozen=True)
class SafetySettings:
    """What to keep out of pictures, how, and what becomes of a picture that a detector still flags.

    level: "off" to "strict". method: "vectors" (learned, for one model family), "sld" (Safe Latent Diffusion, any
    model, one more UNet row), "both" (below "strict" SLD only for pictures in which the vectors' gate finds something),
    or "auto": both where there are vectors for the family and guidance is possible, else the one that is.
    categories: those of the safety set; none named means all of them. texts: what a category means, in place of the
    set's own words; only SLD reads them. on_flag, retries: for flagged pictures. detector: "" looks at no picture.
    threshold: of the detector, 0..1; None is its own. Errors: SettingError.
    """

    level: Level = "standard"
    method: Method = "auto"
    categories: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    on_flag: OnFlag = "mark"
    retries: int = 3
    detector: Detector = ""
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                words = ", ".join(word or '""' for word in known)
                raise SettingError(f"The safety setting {name} is {getattr(self, name)!r}; known are {words}.")
        object.__setattr__(self, "categories", _categories(self.categories))
        object.__setattr__(self, "texts", MappingProxyType(_texts(self.texts)))
        number = self.retries
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MOST_RETRIES:
            raise SettingError(
                f"The safety setting retries is {number!r}; it is a whole number from 0 to {MOST_RETRIES}."
            )
        if self.threshold is not None:
            _check_threshold(self.threshold)

    def __deepcopy__(self, memo: Any) -> SafetySettings:
        return self  # immutable; ComfyUI deep-copies everything that hangs on a model

    def __hash__(self) -> int:
        return hash((*(getattr(self, f.name) for f in fields(self) if f.name != "texts"), tuple(self.texts.items())))

    @property
    def on(self) -> bool:
        return self.level != "off"

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SafetySettings:
        """The inverse of `to_dict`; missing keys keep their defaults. Errors: SettingError, also for unknown keys."""
        if not isinstance(given, Mapping):
            raise SettingError(f"Safety settings are a table of names and values, not {type(given).__name__}.")
        known = [f.name for f in fields(cls)]
        if unknown := [str(key) for key in given if key not in known]:
            raise SettingError(
                f"There is no safety setting {', '.join(map(repr, unknown))}; there are {', '.join(known)}."
            )
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "categories": list(self.categories), "texts": dict(self.texts)}

    def text(self) -> str:
        """One line that says what will happen."""
        if not self.on:
            return "Safety is off."
        what = ", ".join(self.categories) or "all categories"
        how = {
            "auto": "learned vectors and guidance where there are vectors for the model, else Safe Latent Diffusion",
            "vectors": "learned vectors",
            "sld": "Safe Latent Diffusion",
            "both": "learned vectors and Safe Latent Diffusion",
        }[self.method]
        line = f"Safety {self.level}: keeps out {what} by {how}"
        if not self.detector:
            return line + "; finished pictures are not looked at."
        limit = "" if self.threshold is None else f" (threshold {self.threshold:g})"
        return line + f"; pictures that {self.detector}{limit} flags are {_DONE[self.on_flag].format(self.retries)}."


def _categories(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise SettingError(f"The safety categories are a list of names, not {given!r}.")
    names = tuple(given)
    if bad := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise SettingError(f"A safety category is a name, not {bad[0]!r}.")
    return tuple(dict.fromkeys(names))


def _texts(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise SettingError(f"The safety texts are a table of category and words, not {type(given).__name__}.")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, str) or not value.strip():
            raise SettingError(f"The safety text of {key!r} is {value!r}; say in words what the category means.")
    return dict(given)


def _check_threshold(value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:
        raise SettingError(f"The detector's threshold is {value!r}; it is a number from 0 to 1, or None for its own.")
