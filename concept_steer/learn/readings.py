"""What analysis without a target reads: h and x_t along guided DDIM trajectories, at chosen moments of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, HState
from ..errors import LearnError
from ..sampling import ddim_step, noise
from .result import encode, rows


@dataclass(frozen=True)
class Reading:
    """Rows items.start..items.stop at one moment: x (B, C, H, W) fp32 at timestep t, state of their text rows."""

    items: slice
    moment: int
    t: float
    x: Tensor
    state: HState


def readings(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    moments: Sequence[float],
    *,
    steps: int,
    guidance: float,
    batch: int,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Reading]:
    """One reading a batch and moment, from one prompt and seed an item; moments are ascending shares of sampling.

    The trajectory passes through every moment and takes no stride longer than 1 / steps; it ends at the last moment,
    where the decoder is not needed any more. It costs 2 rows an item and stride, 1 without guidance (guidance 1).
    progress(done, total) counts strides. With stop() True it ends before the next batch; a batch begun is finished.
    Call under torch.no_grad. Errors: LearnError for moments that are not ascending within 0..1, or no item at all.
    """
    given = [float(moment) for moment in moments]
    if not given or any(not 0 <= m <= 1 for m in given) or any(b <= a for a, b in pairwise(given)):
        raise LearnError(f"timesteps are ascending shares of sampling between 0 and 1; found {given}.")
    if not prompts or len(prompts) != len(seeds) or steps < 1 or batch < 1:
        raise LearnError(f"{len(prompts)} prompts, {len(seeds)} seeds, {steps} steps: at least one of each is needed.")
    path = sorted({*given, *(i / steps for i in range(steps) if i / steps < given[-1])})
    last = denoiser.schedule.train_timesteps - 1
    times = [float(round((1 - share) * last)) for share in path]
    encoded = encode(denoiser, ["", *prompts])
    total = len(path) * ((len(prompts) + batch - 1) // batch)
    done = 0
    for first in range(0, len(prompts), batch):
        if stop is not None and stop():
            return
        items = slice(first, min(first + batch, len(prompts)))
        size = items.stop - first
        x = torch.stack([noise(seed, denoiser.latent_shape) for seed in seeds[items]]).to(denoiser.device)
        text = rows(encoded, list(prompts[items]))
        both = text if guidance == 1 else Conditioning.cat([text, encoded[""].expand(size)])
        for step, (share, t) in enumerate(zip(path, times, strict=True)):
            cond = both if step + 1 < len(path) else text
            inputs = x.to(denoiser.dtype).repeat(len(cond) // size, 1, 1, 1)
            state = denoiser.to_h(inputs, t, cond)
            if share in given:
                yield Reading(items, given.index(share), t, x, state[:size])
            if step + 1 < len(path):
                prediction, *empty = denoiser.from_h(state).float().split(size)
                if empty:
                    prediction = empty[0] + guidance * (prediction - empty[0])
                x = ddim_step(denoiser.schedule, x, prediction, t, times[step + 1])
            done += 1
            if progress is not None:
                progress(done, total)
