"""What is to be learned, as a person asks for it: one set of fields and defaults for every face."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError, SettingError
from ..vector import ConceptVector
from .difference import learn_difference
from .pictures import learn_pictures
from .result import LearnResult
from .score import learn_score
from .self_discovery import learn_self_discovery

PICTURES = "pictures"
METHODS = {  # key: in words
    "score": "the model's own predictions (best)",
    "difference": "difference of means (fastest)",
    "self-discovery": "self-discovery (the published recipe, slow)",
    PICTURES: "from pictures",
}
STEPS = {"score": 50, PICTURES: 100, "self-discovery": 50}
MOST_STEPS, MOST_EXAMPLES, MOST_PIXELS = 5000, 1000, 2048
RECIPE_BATCH = 8  # pictures a step, as published
R = TypeVar("R")


@dataclass(frozen=True)
class LearnRequest:
    """neutral, positive: prompts, one a line, for all methods but "pictures", which has `prompt` (the class word).

    steps 0: the method's own number. examples: noisy pictures to learn from (score), or pictures drawn
    (self-discovery). size: a picture's side in pixels, 0 for the model's own. Errors: SettingError when out of range.
    """

    method: str = "score"
    neutral: str = ""
    positive: str = ""
    prompt: str = ""
    steps: int = 0
    examples: int = 32
    seed: int = 0
    title: str = ""
    size: int = 0
    spatial: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.method not in METHODS:
            raise SettingError(f"There is no method {self.method!r} to learn by: choose one of {', '.join(METHODS)}.")
        in_range("steps", self.steps, 0, MOST_STEPS)
        in_range("examples", self.examples, 2, MOST_EXAMPLES)
        in_range("seed", self.seed, 0, 2**31 - 1)
        in_range("size", self.size, 0, MOST_PIXELS)

    @staticmethod
    def of(fields: Mapping[str, Any]) -> LearnRequest:
        """From what came over a web API. Errors: SettingError, which names what is unknown or of the wrong type."""
        return request_of(LearnRequest, fields)

    def pairs(self) -> list[tuple[str, str]]:
        return pairs_of(self.neutral, self.positive)

    def preview_prompts(self, count: int = 4) -> list[str]:
        """What to draw before/after pictures of. Errors: LearnError when a prompt is missing."""
        if self.method == PICTURES:
            if not self.prompt.strip():
                raise LearnError("Name what all the pictures show, for example 'a cat' or 'a person'.")
            return [self.prompt.strip()] * count
        pairs = self.pairs()
        return [pairs[i % len(pairs)][0] for i in range(count)]

    def run(
        self,
        denoiser: Denoiser,
        pixels: Tensor | None = None,
        without: Tensor | None = None,
        *,
        caching: Callable[[int, int], None],
        progress: Callable[[int, int, float, ConceptVector], None],
        stop: Callable[[], bool],
    ) -> LearnResult:
        """Learn. pixels, without: of the method "pictures", (N, 3, H, W) in [-1, 1]. Errors: LearnError, SettingError.

        caching, progress and stop: as in `learn_score`. "difference" has no steps and cannot be stopped.
        """
        steps = self.steps or STEPS.get(self.method, 0)
        common: dict[str, Any] = {"seed": self.seed, "title": self.title.strip(), "spatial": self.spatial}
        if self.method == "difference":
            return learn_difference(denoiser, self.pairs(), progress=caching, **common)
        common |= {"caching": caching, "progress": progress, "stop": stop}
        if self.method == PICTURES:
            if pixels is None:
                raise LearnError("There are no pictures to learn from: give 5 to 20.")
            return learn_pictures(denoiser, pixels, self.prompt, without=without, steps=steps, **common)
        if self.method == "self-discovery":
            epochs = max(1, round(steps * RECIPE_BATCH / self.examples))
            recipe: dict[str, Any] = {"pictures": self.examples, "epochs": epochs, "batch": RECIPE_BATCH}
            return learn_self_discovery(denoiser, self.pairs(), **recipe, **common)
        return learn_score(denoiser, self.pairs(), steps=steps, trajectories=self.examples, **common)


def lines_of(text: str) -> list[str]:
    """The lines of a text field that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def pairs_of(neutral: str, positive: str) -> list[tuple[str, str]]:
    """One pair a line; a single line on one side goes with every line of the other. Errors: LearnError."""
    low, high = lines_of(neutral), lines_of(positive)
    if not low or not high:
        raise LearnError("Give both: a neutral prompt (a doctor) and one with the concept (a woman doctor).")
    if len(low) != len(high) and 1 not in (len(low), len(high)):
        raise LearnError(
            f"There are {len(low)} neutral prompts and {len(high)} with the concept: give the same number of lines, "
            "or a single line on one side."
        )
    count = max(len(low), len(high))
    return [(low[i % len(low)], high[i % len(high)]) for i in range(count)]


def request_of(kind: Callable[..., R], fields: Mapping[str, Any]) -> R:
    """A request (a dataclass) from what came over a web API. Errors: SettingError, which names what is unknown."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(fields) - known):
        raise SettingError(f"Unknown: {', '.join(map(str, unknown))}. Known are {', '.join(sorted(known))}.")
    return kind(**fields)


def check_types(request: Any) -> None:
    """Every field is of the type of its default; a whole number is a number too. Errors: SettingError."""
    for field in dataclasses.fields(request):
        value, kind = getattr(request, field.name), type(field.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise SettingError(f"{field.name} is {value!r}; it must be of the type {kind.__name__}.")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Errors: SettingError."""
    if not low <= value <= high:
        raise SettingError(f"{name} is {value}; it must lie between {low} and {high}.")
