"""What learning from pictures needs of the encoder, computed once: noised pictures, their h and how well the frozen
model names their noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, HState, NoiseSchedule
from ..sampling import noise
from .items import Items, packed

LEAST = 0.4  # of the schedule: with less noise the picture is settled, and the loss asks for what no constant can give


@dataclass
class Noised(Items):
    """n = pictures * times * 2 items, in this order; the two of a pair differ in the sign of the noise only.

    target (n, C, H, W): the prediction that names the noise; error (n,): mean square error of the frozen one; h (n, C,
    H, W), fp32; picture (n,): which one it is. Without a decoder pass (`only_h`) there are no states and no errors.
    """

    picture: Tensor
    target: Tensor
    error: Tensor
    h: Tensor


@dataclass(frozen=True)
class Views:
    """h (n, C, H, W) of some noised pictures, with bucket and held_out (n,)."""

    h: Tensor
    bucket: Tensor
    held_out: Tensor

    @staticmethod
    def of(items: Noised, members: Tensor) -> Views:
        return Views(items.h[members], items.bucket[members], items.held_out[members])

    def mean(self) -> Tensor:
        """(C, H, W), of those to learn from."""
        return self.h[~self.held_out].mean(0)

    def held(self, bucket: Tensor) -> Tensor:
        """(m, C, H, W), of those to check with at one timestep."""
        return self.h[self.held_out & (self.bucket == bucket)]


def noisy_times(schedule: NoiseSchedule, count: int) -> list[float]:
    """`count` training timesteps: the middle of each of as many equal parts of the schedule from LEAST on."""
    return [float(int((LEAST + (1 - LEAST) * (k + 0.5) / count) * schedule.train_timesteps)) for k in range(count)]


def build_noised(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    *,
    numbers: Sequence[int],
    held_out: Tensor,
    times: Sequence[float],
    seed: int,
    batch: int,
    advance: Callable[[], None],
    only_h: bool = False,
) -> Noised:
    """Pictures as latents (N, C, H, W), fp32, each noised at every time with one noise and its negative.

    cond: the prompt, one row. numbers: pictures with the same number get the same noises. held_out: (N,) bool.
    advance() is called after each of `batches_of(N * times * 2, batch)` batches. Cost per item: one encoder row and,
    unless only_h, one decoder row. Call under torch.no_grad.
    """
    schedule = denoiser.schedule
    plan = [(i, k, sign) for i in range(len(latents)) for k in range(len(times)) for sign in (1.0, -1.0)]
    states: list[HState] = []
    targets, errors, hs = [], [], []
    for first in range(0, len(plan), batch):
        part = plan[first : first + batch]
        clean = latents[[i for i, _, _ in part]].to(denoiser.device)
        seeds = [seed + numbers[i] * len(times) + k for i, k, _ in part]
        signed = [noise(s, clean.shape[1:]) * sign for s, (_, _, sign) in zip(seeds, part, strict=True)]
        added = torch.stack(signed).to(denoiser.device)
        t = torch.tensor([times[k] for _, k, _ in part])
        x = schedule.add_noise(clean, added, t)
        state = denoiser.to_h(x.to(denoiser.dtype), t, cond.expand(len(part)))
        hs.append(state.h.float().cpu())
        if not only_h:
            target = schedule.prediction_of(clean, added, t)
            errors.append((denoiser.from_h(state).float() - target).square().mean((1, 2, 3)).cpu())
            targets.append(target.cpu())
            kept = packed(state, len(part))
            states += [kept[i : i + 1] for i in range(len(part))]
        advance()
    picture = torch.tensor([i for i, _, _ in plan])
    none = torch.empty(0)
    return Noised(
        states=states,
        bucket=torch.tensor([k for _, k, _ in plan]),
        held_out=held_out[picture],
        picture=picture,
        target=torch.cat(targets) if targets else none,
        error=torch.cat(errors) if errors else none,
        h=torch.cat(hs),
    )


def batches_of(count: int, batch: int) -> int:
    return (count + batch - 1) // batch


def balanced_batches(
    items: Noised, kinds: Sequence[Tensor], batch: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Batches for learning, of whole pairs (noise and its negative), taken from the kinds of pictures in turn.

    kinds: numbers of the pictures of each kind. Within a kind every run of as many pairs as there are times has each
    time once, and every pair comes once before any comes again.
    """
    times = int(items.bucket.max()) + 1
    streams = [_pairs(pictures, times, generator) for pictures in kinds]
    turn = 0
    while True:
        index: list[int] = []
        for _ in range(max(1, batch // 2)):
            pair = next(streams[turn % len(streams)])
            index += [2 * pair, 2 * pair + 1]
            turn += 1
        yield index


def _pairs(pictures: Tensor, times: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        orders = [pictures[torch.randperm(len(pictures), generator=generator)].tolist() for _ in range(times)]
        for turn in range(len(pictures)):
            for k in torch.randperm(times, generator=generator).tolist():
                yield orders[k][turn] * times + k
