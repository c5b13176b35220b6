"""Semantic guidance (SEGA, Brack et al. 2301.12247) and Fair Diffusion (Friedrich et al. 2302.10893) built on it.

Each edit is a text of its own, predicted beside the prompt at every step: one more UNet row per picture and edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError

PUBLISHED_STEPS = 50  # the step count that the published warm-up is counted at


@dataclass(frozen=True)
class Edit:
    """Guide towards a concept, or away from it. scale: s_e of the paper, in units of the edit's own difference.

    threshold: the quantile per channel below which the difference is left out (.9: a tenth of the positions acts).
    Errors: SettingError for a value out of range.
    """

    concept: str
    away: bool = False
    scale: float = 5.0
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise SettingError(f"The scale of the edit {self.concept!r} is {self.scale!r}; it starts at 0.")
        if not 0 <= self.threshold < 1:
            raise SettingError(f"The threshold of the edit {self.concept!r} is {self.threshold!r}; it is from 0 to 1.")


@dataclass(frozen=True)
class SemanticGuidance:
    """SEGA as a `sampling.Guide`: edits of each picture, in the order of the pictures, all of the same number.

    warmup: steps of 50 before the edits act; it is scaled to the steps at hand. momentum, beta: s_m and beta_m.
    Errors: SettingError.
    """

    edits: Sequence[Sequence[Edit]]
    warmup: float = 10.0
    momentum: float = 0.1
    beta: float = 0.4

    def __post_init__(self) -> None:
        numbers = {len(mine) for mine in self.edits}
        if len(numbers) > 1:
            raise SettingError(f"All pictures need the same number of edits, not {sorted(numbers)}.")
        if not 0 <= self.warmup <= PUBLISHED_STEPS or not 0 <= self.momentum < 1 or not 0 <= self.beta < 1:
            raise SettingError(
                f"Semantic guidance needs a warmup from 0 to {PUBLISHED_STEPS}, momentum and beta from 0 to below 1; "
                f"found {self.warmup:g}, {self.momentum:g} and {self.beta:g}."
            )

    def begin(self, pictures: range, steps: int, guidance: float) -> SemanticRun:
        """Errors: SettingError when there are fewer lists of edits than pictures."""
        if pictures.stop > len(self.edits):
            raise SettingError(f"Edits for {len(self.edits)} pictures were given, but there are {pictures.stop}.")
        mine = [self.edits[i] for i in pictures]
        return SemanticRun(mine, round(self.warmup * steps / PUBLISHED_STEPS), guidance, self.momentum, self.beta)


class SemanticRun:
    """One batch under SEGA: the edits of its pictures and their momentum."""

    def __init__(
        self, edits: Sequence[Sequence[Edit]], warmup: int, guidance: float, momentum: float, beta: float
    ) -> None:
        self.columns: list[tuple[Edit, ...]] = list(zip(*edits, strict=True))  # the k-th edit of every picture
        self.warmup, self.guidance, self.momentum, self.beta = warmup, guidance, momentum, beta
        self.running: Tensor | None = None
        self.idle = all(edit.scale == 0 for column in self.columns for edit in column)

    @property
    def prompts(self) -> list[list[str]]:
        return [[edit.concept for edit in column] for column in self.columns]

    def needs(self, step: int) -> bool:
        """During warm-up the edits are predicted for the momentum only."""
        return not self.idle and (step >= self.warmup or self.momentum > 0)

    def combine(self, step: int, t: float, uncond: Tensor, cond: Tensor, extra: Tensor | None) -> Tensor:
        """eps_u + s_g (eps_p - eps_u) + gamma (eq. 4-9); gamma stays out during warm-up, its momentum does not."""
        plain = uncond + self.guidance * (cond - uncond)
        if extra is None:
            return plain
        gamma = self._edited(uncond, extra)
        if self.running is None:
            self.running = torch.zeros_like(gamma)
        gamma = gamma + self.momentum * self.running
        self.running = self.beta * self.running + (1 - self.beta) * gamma
        return plain + gamma if step >= self.warmup else plain

    def _edited(self, uncond: Tensor, extra: Tensor) -> Tensor:
        """The sum over edits of +-s_e (eps_e - eps_u), where that is above its quantile within each channel."""
        total = torch.zeros_like(uncond)
        for predicted, column in zip(extra, self.columns, strict=True):
            signed = [-edit.scale if edit.away else edit.scale for edit in column]
            change = (predicted - uncond) * torch.tensor(signed, device=uncond.device).view(-1, 1, 1, 1)
            size = change.abs()
            total = total + torch.where(size >= self._quantiles(size, column), change, torch.zeros_like(change))
        return total

    @staticmethod
    def _quantiles(size: Tensor, column: Sequence[Edit]) -> Tensor:
        """(B, C, 1, 1): each picture's own quantile of |change| over the positions of a channel."""
        flat = size.flatten(2)
        rows = [torch.quantile(row, edit.threshold, dim=1) for row, edit in zip(flat, column, strict=True)]
        return torch.stack(rows)[:, :, None, None]


def fair_diffusion(
    wanted: Sequence[Mapping[str, str]],
    concepts: Mapping[str, Mapping[str, str]],
    *,
    scale: float = 5.0,
    threshold: float = 0.9,
    warmup: float = 10.0,
    momentum: float = 0.1,
    beta: float = 0.4,
) -> SemanticGuidance:
    """Fair Diffusion: SEGA per picture, towards the value it was assigned and away from all others of that attribute.

    wanted: for each picture, attribute -> value, as `fairness.assign` hands them out (mode "random" is the paper's
    coin toss). concepts: attribute -> value -> its text, e.g. {"gender": {"woman": "a woman", "man": "a man"}}.
    Cost: one more UNet row per picture and step for each value of each attribute. Errors: SettingError.
    """
    edits = []
    for values in wanted:
        mine = []
        for attribute, value in values.items():
            texts = concepts.get(attribute, {})
            if value not in texts:
                raise SettingError(
                    f"No text says what {attribute} {value!r} is; known are {', '.join(texts) or 'none'}."
                )
            others = [Edit(text, True, scale, threshold) for name, text in texts.items() if name != value]
            mine += [Edit(texts[value], False, scale, threshold), *others]
        edits.append(mine)
    return SemanticGuidance(edits, warmup, momentum, beta)
