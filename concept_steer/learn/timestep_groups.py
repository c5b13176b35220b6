"""A vector for each group of neighbouring timesteps: early steps settle the layout, late ones the details."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import NoiseSchedule
from ..errors import LearnError
from ..sampling import timesteps


@dataclass(frozen=True)
class Groups:
    """of_step (steps,): the group of each sampling step; middles: the mean timestep of each group, falling.

    Groups differ in size by one step at most, so every step's timestep is nearest to its own group's middle: that is
    how `ConceptVector.at` finds the vector again.
    """

    of_step: Tensor
    middles: tuple[float, ...]


def groups_of(schedule: NoiseSchedule, steps: int, count: int) -> Groups | None:
    """`steps` sampling steps in `count` groups; None for a single one. Errors: LearnError (more groups than steps)."""
    if not 1 <= count <= steps:
        raise LearnError(
            f"timestep_groups is {count}; there can be from 1 (one vector for all timesteps) to as many as there are "
            f"sample_steps, {steps}."
        )
    if count == 1:
        return None
    of_step = torch.arange(steps) * count // steps
    times = torch.tensor(timesteps(schedule, steps), dtype=torch.float64)
    return Groups(of_step, tuple(float(times[of_step == group].mean()) for group in range(count)))


def shift_of(c: Tensor, index: Sequence[int] = (), group: Tensor | None = None) -> Tensor:
    """What is added to h of the items `index`: c (C,) or (C, H, W); with group (n,) a stack of those, one a group."""
    mine = c if group is None else c[group[list(index)].to(c.device)]
    return mine[..., None, None] if mine.ndim < 3 else mine
