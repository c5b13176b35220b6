"""Difference of means (Haas et al. 2303.11073, sec. 4): what the positive prompt adds to h, averaged. No gradient.

c = mean over seeds and timesteps of h(x_t, positive) - h(x_t, neutral), both from the same x_t.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser
from ..errors import LearnError
from ..sampling import ddim_step, noise
from ..vector import ConceptVector
from .disentangle import Others, about_others, others_of
from .memory import with_memory_advice
from .result import LearnResult, Pairs, auc, checked_pairs, encode, finished_vector, projection, rows


@with_memory_advice
def learn_difference(
    denoiser: Denoiser,
    pairs: Pairs,
    *,
    seeds: int = 8,
    seed: int = 0,
    timesteps: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    spatial: bool = False,
    batch: int = 16,
    against: Sequence[ConceptVector] = (),
    ridge: float = 0.0,
    title: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> LearnResult:
    """A vector (C,), or (C, H, W) with spatial, from pairs of (neutral, positive) prompts and `seeds` seeds per pair.

    timesteps: where h is read, in percent of sampling (0 is pure noise), ascending. x_t follows a DDIM trajectory of
    the neutral prompt, without guidance, through just these times. Cost per pair and seed: 2 encoder rows a time and 1
    decoder row a time but the last; with the defaults 5.5 UNet rows. progress(done, total) counts batches times times.
    separation is cross-fitted: the vector from one half of the seeds is judged on the other half.
    against: other concepts' vectors that are taken out of this one, wholly (ridge 0: exactly orthogonal) or, with ridge
    above 0, in part (see `disentangle`).
    Errors: LearnError for no or equal prompts, unordered timesteps, or a model that gives NaN.
    """
    began, cost = time.perf_counter(), denoiser.cost.snapshot()
    prompts = checked_pairs(pairs)
    times = _times(timesteps, denoiser.schedule.train_timesteps)
    if seeds < 1:
        raise LearnError(f"Learning needs at least one seed, not {seeds}.")
    items = [(pair, seed + i) for i in range(seeds) for pair in prompts]
    halves = torch.tensor([i % 2 for i in range(seeds) for _ in prompts])
    neutral_h: list[list[Tensor]] = [[] for _ in times]
    positive_h: list[list[Tensor]] = [[] for _ in times]
    squares: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        encoded = encode(denoiser, [prompt for pair in prompts for prompt in pair])
        total = len(times) * ((len(items) + batch - 1) // batch)
        done = 0
        for first in range(0, len(items), batch):
            part = items[first : first + batch]
            x = torch.stack([noise(s, denoiser.latent_shape) for _, s in part]).to(denoiser.device)
            neutral = rows(encoded, [pair[0] for pair, _ in part])
            both = Conditioning.cat([neutral, rows(encoded, [pair[1] for pair, _ in part])])
            for step, t in enumerate(times):
                inputs = x.to(denoiser.dtype)
                state = denoiser.to_h(torch.cat([inputs, inputs]), t, both)
                h = state.h.float().cpu() if spatial else state.h.float().mean((2, 3), keepdim=True).cpu()
                neutral_h[step].append(h[: len(part)])
                positive_h[step].append(h[len(part) :])
                if step + 1 < len(times):
                    prediction = denoiser.from_h(state[: len(part)]).float()
                    x = ddim_step(denoiser.schedule, x, prediction, t, times[step + 1])
                done += 1
                if progress is not None:
                    progress(done, total)
                squares.append(state.h.detach().float().square().mean())
        low = torch.stack([torch.cat(column) for column in neutral_h])  # (times, items, C, H, W)
        high = torch.stack([torch.cat(column) for column in positive_h])
        tensor = _shape((high - low).mean((0, 1)), spatial)
        others = others_of(against, denoiser, tensor.shape, ridge)
        separation = _separation(low, high, halves, spatial, others)
        calibration = float(torch.stack(squares).mean().sqrt())  # RMS of h
        vector = finished_vector(
            denoiser,
            tensor if others is None else others(tensor),
            prompts,
            title,
            **about_others(against, ridge),
            method="difference",
            steps=len(times),
            seed=seed,
            calibration=calibration,
        )
    spent = denoiser.cost.since(cost)
    seconds = time.perf_counter() - began
    return LearnResult(
        vector, "difference", [], separation, None, spent.unet_rows, spent.backward_rows, seconds, "finished"
    )


def _times(fractions: Sequence[float], train_timesteps: int) -> list[float]:
    given = [float(f) for f in fractions]
    if not given or any(not 0 <= f <= 1 for f in given) or any(b <= a for a, b in pairwise(given)):
        raise LearnError(f"timesteps are ascending fractions of sampling between 0 and 1; found {given}.")
    return [float(round((1 - f) * (train_timesteps - 1))) for f in given]


def _shape(mean: Tensor, spatial: bool) -> Tensor:
    return mean if spatial else mean[:, 0, 0]


def _separation(low: Tensor, high: Tensor, halves: Tensor, spatial: bool, others: Others | None) -> float | None:
    if len(set(halves.tolist())) < 2:
        return None
    found = []
    for half in (0, 1):
        learn, judge = halves == half, halves != half
        direction = _shape((high[:, learn] - low[:, learn]).mean((0, 1)), spatial)
        direction = direction if others is None else others.without(direction)
        for step in range(low.shape[0]):
            found.append(auc(projection(high[step, judge], direction), projection(low[step, judge], direction)))
    return sum(found) / len(found)
