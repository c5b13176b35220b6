"""Strength 1.0 means the prompt's own effect: how long a learned vector has to be for that.

The least-squares vector is too short wherever it explains only a part: it shrinks towards nothing, as regression does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..denoiser import Denoiser
from .items import Cache
from .timestep_groups import shift_of

LIMITS = (0.5, 3.0)  # beyond these the vector hardly points the prompt's way, and longer would not help


@torch.no_grad()
def amplitude(
    denoiser: Denoiser,
    cache: Cache,
    c: Tensor,
    weight: Tensor,
    index: list[int],
    batch: int,
    group: Tensor | None = None,
) -> float:
    """s = E w <p, p> / E w <d, p>, with p the positive prompt's effect on the prediction and d that of c, over `index`.

    c: (C,) or (C, H, W) on the model's device; weight (n,) of the cache's items. With c times s the prediction goes as
    far along the prompt's own effect as the prompt itself takes it. group (n,): with it c is a stack, one vector for
    each group of items, and s one number for all of them. Kept within LIMITS; 1.0 where c points elsewhere
    or the model gives NaN.
    """
    own = along = 0.0
    for first in range(0, len(index), batch):
        part = index[first : first + batch]
        state = cache.state(part, denoiser)
        h = (state.h.float() + shift_of(c, part, group)).to(denoiser.dtype)
        neutral = cache.neutral[part]
        effect = cache.positive[part] - neutral
        moved = denoiser.from_h(state.with_h(h)).float().cpu() - neutral
        w = weight[part].cpu()
        own += float((w * effect.square().sum((1, 2, 3))).sum())
        along += float((w * (moved * effect).sum((1, 2, 3))).sum())
    if not along > 0 or not math.isfinite(own / along):  # NaN too
        return 1.0
    return min(max(own / along, LIMITS[0]), LIMITS[1])
