"""Defaults: which value of an attribute does the model give to a role when the prompt names none?

The role's reading is taken for a mixture of those of "a woman role" and "a man role": where it lies between them is the
predicted share, in the role's own frame. At pure noise the model's expected picture is such a mixture exactly; in h it
holds as far as the decoder is linear. More than two values are taken for a scale (skin tones, ages), on which half
light and half dark cannot be told from all medium: the mean place on it is given, and no shares.
The construction is ours; `concept-steer evaluate audit` measures its validity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError
from .reading import Reader
from .word_list import WordList

DRAWS = 400  # of the bootstrap over seeds
Estimate = tuple[float, float, float]  # value, and the ends of its 95 % interval over seeds


@dataclass(frozen=True)
class Default:
    """What a role's prompt takes for granted.

    lean: -1 is the first value, 1 the last, 0 even (or the middle of the scale); with two values it may pass the ends.
    Its interval, 95 %, is over seeds only: it says how sure the reading is, not how true.
    """

    role: str
    attribute: str
    values: tuple[str, ...]
    lean: Estimate

    @property
    def towards(self) -> str:
        """The end of the scale that it leans to."""
        return self.values[0] if self.lean[0] < 0 else self.values[-1]

    @property
    def clear(self) -> bool:
        """Whether the interval leaves evenness out."""
        return self.lean[1] > 0 or self.lean[2] < 0

    @property
    def share(self) -> Estimate:
        """Predicted share of the value it leans to, of two; on a scale, how near to that end (.5 is the middle)."""
        ends = sorted(min(1.0, max(0.0, 0.5 + side / 2)) for side in self._outwards())
        return ends[1], ends[0], ends[2]

    def _outwards(self) -> tuple[float, ...]:
        return tuple(-side for side in self.lean) if self.lean[0] < 0 else self.lean

    def text(self) -> str:
        share, low, high = self.share
        sure = "" if self.clear else ", not told from even"
        if len(self.values) == 2:
            return f"{self.role}: {self.towards} {share:.0%} ({low:.0%} to {high:.0%}){sure}"
        lean, low, high = self.lean
        return f"{self.role}: towards {self.towards}, {lean:+.2f} ({low:+.2f} to {high:+.2f}){sure}"

    def as_dict(self) -> dict[str, Any]:
        told = {"towards": self.towards, "clear": self.clear}
        return {**asdict(self), **told, **({"share": self.share} if len(self.values) == 2 else {})}


def defaults(
    reader: Reader,
    words: WordList,
    roles: Sequence[str] = (),
    *,
    attributes: Sequence[str] = (),
    steered: Mapping[str, Reader] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Default]:
    """For every attribute and role of the list, in this order; all roles and attributes by default.

    steered: attribute -> a reader with steers, for the prompts that name no value; those that name one are always read
    without (fair sampling leaves them alone, too). One role is held at a time.
    """
    chosen, named = list(roles) or list(words.roles), list(attributes) or list(words.attributes)
    if unknown := [name for name in named if name not in words.attributes]:
        raise SettingError(f"{unknown[0]!r} is no attribute of the list; there are {', '.join(words.attributes)}.")
    found = []
    for attribute in named:
        own = (steered or {}).get(attribute, reader)
        for role in chosen:
            prompts = {value: words.named(role, attribute, value) for value in words.attributes[attribute]}
            h = reader.read([prompt for many in prompts.values() for prompt in many])
            values = {value: torch.stack([h[p] for p in many]).mean(0) for value, many in prompts.items()}
            prompt = words.prompt(role)
            found.append(default_of(own.read([prompt])[prompt], values, role, attribute, strata=own.period))
            if progress is not None:
                progress(len(found), len(named) * len(chosen))
    return found


def default_of(
    own: Tensor, values: Mapping[str, Tensor], role: str, attribute: str, *, strata: int = 1, seed: int = 0
) -> Default:
    """own (S, D), and (S, D) for every value, all of the same seeds.

    strata: seeds that far apart are alike (steered alike, say); the bootstrap exchanges only those.
    """
    seeds, order = own.shape[0], list(values)
    generator = torch.Generator().manual_seed(seed)
    rounds = torch.randint(seeds // strata, (DRAWS, seeds), generator=generator)
    picks = rounds * strata + torch.arange(seeds) % strata
    counts = torch.zeros(DRAWS, seeds).scatter_add_(1, picks, torch.ones(DRAWS, seeds)) / seeds
    weights = torch.cat([torch.full((1, seeds), 1 / seeds), counts])
    parts = torch.stack([weights @ own, *(weights @ values[value] for value in order)], 1).double()
    return Default(role, attribute, tuple(order), _estimate(place_on_scale(parts[:, 0], parts[:, 1:])))


def place_on_scale(own: Tensor, values: Tensor) -> Tensor:
    """Where own (B, D) lies among values (B, K, D), which stand evenly from -1 to 1: (B,), by linear regression.

    With two values: -1 at the first, 1 at the last, by orthogonal projection on the line through them.
    """
    marks = torch.linspace(-1, 1, values.shape[1], dtype=values.dtype)
    centre = values.mean(1)
    axis = (marks[:, None] * (values - centre[:, None])).sum(1)
    along = ((own - centre) * axis).sum(1)
    return along * marks.square().sum() / axis.square().sum(1).clamp_min(1e-30)


def _estimate(values: Tensor) -> Estimate:
    """The first is the value itself, the others are its bootstrap."""
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return float(values[0]), low, high


@dataclass(frozen=True)
class Change:
    """One role's default in two readings. lean: after minus before; its interval adds both readings' widths."""

    role: str
    attribute: str
    before: Default
    after: Default

    @property
    def lean(self) -> Estimate:
        (early, early_low, early_high), (late, late_low, late_high) = self.before.lean, self.after.lean
        change = late - early
        low = math.hypot(late - late_low, early_high - early)
        high = math.hypot(late_high - late, early - early_low)
        return change, change - low, change + high

    @property
    def clear(self) -> bool:
        return self.lean[1] > 0 or self.lean[2] < 0


def compare(before: Sequence[Default], after: Sequence[Default]) -> list[Change]:
    """Two checkpoints, or one with and without steering, by role and attribute; the largest change first.

    Errors: SettingError when nothing was read in both.
    """
    late = {(one.role, one.attribute): one for one in after}
    found = [
        Change(one.role, one.attribute, one, late[key]) for one in before if (key := (one.role, one.attribute)) in late
    ]
    if not found:
        raise SettingError("The two readings have no role and attribute in common: read the same list of words.")
    return sorted(found, key=lambda change: -abs(change.lean[0]))
