"""One vector at work in the web UIs, and one attribute to balance: checked, as text, as dict, in words.

A row reads `woman:0.8:start=0.2:end=0.9:rows=both`, in a prompt `<concept:woman:0.8:start=0.2:end=0.9>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import SettingError
from ..schedule import Schedule
from ..steering import Steer
from ..vector import ConceptVector

SIDES = {"prompt": "cond", "negative prompt": "uncond", "both": "both"}
MODES = {"exact shares": "quota", "independent draws": "random"}
TAG = "concept"
_ANY_TAG = re.compile(r"<\w+:[^>]+>")  # what the web UI takes out of a prompt


@dataclass(frozen=True)
class Row:
    """One vector by its name in the library. strength: 1 as learned. start, end: percent of sampling, 0..1.

    rows: the side of CFG, "cond", "uncond" or "both". Errors: SettingError.
    """

    vector: str
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    rows: str = "cond"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, str) or not self.vector.strip():
            raise SettingError(f"The vector is {self.vector!r}; it must be a name from the library.")
        for name in ("strength", "start", "end"):
            object.__setattr__(self, name, number(getattr(self, name), f"The {name} of {self.vector!r}"))
        object.__setattr__(self, "rows", SIDES.get(self.rows, self.rows))
        if self.rows not in SIDES.values():
            raise SettingError(f"The rows of {self.vector!r} are {self.rows!r}; known are cond, uncond and both.")
        Schedule(self.start, self.end)

    def steer(self, vector: ConceptVector) -> Steer:
        return Steer(vector, self.strength, Schedule(self.start, self.end), self.rows)  # type: ignore[arg-type]

    def text(self) -> str:
        """As in a prompt, without brackets; what is as usual is left out."""
        usual = Row(self.vector)
        options = [f"{k}={plain(v)}" for k in ("start", "end") if (v := getattr(self, k)) != getattr(usual, k)]
        options += [f"rows={self.rows}"] if self.rows != usual.rows else []
        return ":".join([self.vector, plain(self.strength), *options])

    @classmethod
    def parsed(cls, items: Sequence[str]) -> Row:
        """From the parts between the colons: a name, a strength if one is given, then start=, end=, rows=."""
        given: dict[str, Any] = {"vector": items[0].strip() if items else ""}
        for place, item in enumerate(items[1:]):
            key, sign, value = (part.strip() for part in item.partition("="))
            if not sign and place == 0:
                key, value = "strength", key
            if key not in ("strength", "start", "end", "rows") or key in given or not value:
                raise SettingError(
                    f"{item!r} in <{TAG}:{':'.join(items)}> is not understood: write it like "
                    f"<{TAG}:{given['vector'] or 'name'}:0.8:start=0.2:end=0.9:rows=cond>."
                )
            given[key] = value
        return cls(**given)

    @classmethod
    def from_dict(cls, given: Any) -> Row:
        return cls(**known(cls, given, "row", ("vector",)))

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def in_words(self) -> str:
        window = "" if (self.start, self.end) == (0, 1) else f" from {self.start:.0%} to {self.end:.0%} of sampling"
        side = {"cond": "", "uncond": " in the negative prompt", "both": " in both prompts"}[self.rows]
        return f"{self.vector} x {self.strength:g}{window}{side}"


@dataclass(frozen=True)
class Fair:
    """An attribute whose values the pictures of a run get in the shares of `targets` ("woman=0.7,man=0.3").

    No targets: equal shares. seed: who gets what depends on it; -1 takes the first picture's. first: the number of
    the first picture, so that one picture of a run can be drawn again alone. Errors: SettingError.
    """

    attribute: str
    targets: str = ""
    mode: str = "quota"
    strength: float = 1.0
    seed: int = -1
    first: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.attribute, str) or not self.attribute.strip() or not isinstance(self.targets, str):
            raise SettingError(f"The attribute is {self.attribute!r} with the targets {self.targets!r}: give texts.")
        object.__setattr__(self, "mode", MODES.get(self.mode, self.mode))
        if self.mode not in MODES.values():
            raise SettingError(f"The mode of {self.attribute!r} is {self.mode!r}; known are quota and random.")
        object.__setattr__(self, "strength", number(self.strength, f"The strength of {self.attribute!r}"))
        for name, least in (("seed", -1), ("first", 0)):
            value = number(getattr(self, name), f"The {name} of {self.attribute!r}")
            if value < least or value != int(value):
                raise SettingError(f"The {name} of {self.attribute!r} is {value:g}; it is a whole number from {least}.")
            object.__setattr__(self, name, int(value))

    def text(self) -> str:
        parts = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ":".join(escaped(part) for part in (self.attribute, *parts))

    @classmethod
    def parsed(cls, items: Sequence[str]) -> Fair:
        given = dict(item.partition("=")[::2] for item in items[1:])
        return cls.from_dict({"attribute": items[0], **given})

    @classmethod
    def from_dict(cls, given: Any) -> Fair:
        return cls(**known(cls, given, "fair group", ("attribute",)))

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def in_words(self) -> str:
        shares = self.targets.strip() or "equal shares"
        return f"{self.attribute} balanced over the pictures ({shares}), unless the prompt names it"


def without_tags(prompt: str) -> str:
    """A prompt without any extra network's tags."""
    return _ANY_TAG.sub("", prompt).strip()


def number(value: Any, name: str) -> float:
    """A finite float, also from text. Errors: SettingError."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise SettingError(f"{name} is {value!r}; it must be a finite number.")
    return found


def plain(value: float) -> str:
    """Short, but read back exactly."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def known(cls: Any, given: Any, noun: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A dict with keys of the dataclass only. Errors: SettingError."""
    names = [field.name for field in fields(cls)]
    if not isinstance(given, Mapping) or not set(needed) <= set(given) or not set(given) <= set(names):
        wrong = sorted(map(str, set(given) - set(names))) if isinstance(given, Mapping) else type(given).__name__
        raise SettingError(
            f"A {noun} is a dict with some of {', '.join(names)}"
            + (f" (always {', '.join(needed)})" if needed else "")
            + (f"; {wrong} is not among them." if wrong else ".")
        )
    return dict(given)


def escaped(text: str) -> str:
    """Without the separators of `Settings.text`."""
    return text.replace("%", "%25").replace(":", "%3A").replace("|", "%7C")


def unescaped(text: str) -> str:
    return text.replace("%7C", "|").replace("%3A", ":").replace("%25", "%")
