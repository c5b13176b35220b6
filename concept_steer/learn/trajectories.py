"""What learning from predictions needs of the encoder, computed once.

Noisy latents of short trajectories and, for each, the HState under the neutral prompt and the frozen predictions under
both prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, HState
from ..errors import LearnError
from ..sampling import ddim_step, noise, timesteps
from .result import encode, rows

LARGE_STATE = 4 * 2**20  # bytes: above this a cached HState is kept in fp16, beside the accelerator's memory


@dataclass
class Items:
    """n noisy latents: state i (1 row), bucket (n,) = index of the timestep, held_out (n,) bool."""

    states: list[HState]
    bucket: Tensor
    held_out: Tensor

    def state(self, index: Sequence[int], denoiser: Denoiser) -> HState:
        picked = HState.cat([self.states[i] for i in index])
        return picked.to(device=denoiser.device, dtype=denoiser.dtype)


@dataclass
class Cache(Items):
    """Items whose states are those under the neutral prompt, with the predictions under both prompts (n, C, H, W) and
    h under the positive prompt (n, C, H, W)."""

    neutral: Tensor
    positive: Tensor
    positive_h: Tensor

    def neutral_h(self) -> Tensor:
        return torch.cat([state.h.float().cpu() for state in self.states])


def even_weight(error: Tensor, *labels: Tensor) -> Tensor:
    """(n,): 1 / the mean of `error` (n,) over the items with the same labels (n,) each; infinite where that is 0.

    With the timestep as a label every timestep counts the same; with `held_out` as another, what has just that error
    scores exactly 1 in training and in checks.
    """
    _, group = torch.unique(torch.stack([label.long() for label in labels], 1), dim=0, return_inverse=True)
    weight = torch.ones_like(error)
    for number in group.unique():
        weight[group == number] = 1 / error[group == number].mean()
    return weight


def build_cache(
    denoiser: Denoiser,
    pairs: list[tuple[str, str]],
    *,
    trajectories: int,
    sample_steps: int,
    guidance: float,
    holdout: float,
    seed: int,
    batch: int,
    stop: Callable[[], bool] | None,
    caching: Callable[[int, int], None] | None,
) -> Cache:
    """DDIM trajectories with guidance, half of them drawn under the neutral prompt and half under the positive one.

    Each step costs 3 UNet rows a trajectory (empty, neutral, positive prompt; 2 without guidance and at the last step)
    and yields one item: the same rows drive the trajectory and are kept. Pairs take turns, every trajectory has its own
    seed, and whole seeds are held out. Call under torch.no_grad.
    """
    couples = max(2, len(pairs), (trajectories + 1) // 2)  # a neutral and a positive trajectory of one pair each
    order = torch.randperm(couples, generator=torch.Generator().manual_seed(seed)).tolist()
    kept_out = set(order[: min(couples - 1, max(1, round(holdout * couples)))])
    encoded = encode(denoiser, ["", *(prompt for pair in pairs for prompt in pair)])
    times = timesteps(denoiser.schedule, sample_steps)
    chunk = max(1, batch // 3)
    all_items = [(couple, follow) for couple in range(couples) for follow in (0, 1)]
    total = len(times) * ((len(all_items) + chunk - 1) // chunk)
    parts: list[tuple[HState, Tensor, Tensor, Tensor, int, list[bool]]] = []
    for first in range(0, len(all_items), chunk):
        items = all_items[first : first + chunk]
        size = len(items)
        x = torch.stack([noise(seed + 2 * couple + follow, denoiser.latent_shape) for couple, follow in items])
        x = x.to(denoiser.device)
        prompts = [pairs[couple % len(pairs)] for couple, _ in items]
        text = Conditioning.cat([rows(encoded, [p[0] for p in prompts]), rows(encoded, [p[1] for p in prompts])])
        full = Conditioning.cat([text, encoded[""].expand(size)])
        follow = torch.tensor([bool(f) for _, f in items], device=x.device).view(-1, 1, 1, 1)
        for step, t in enumerate(times):
            if stop is not None and stop():
                raise LearnError("Learning was stopped before its first step, so there is no vector yet.")
            last = step + 1 == len(times)
            cond = text if last or guidance == 1 else full
            inputs = x.to(denoiser.dtype).repeat(len(cond) // size, 1, 1, 1)
            state = denoiser.to_h(inputs, t, cond)
            neutral, positive, *empty = denoiser.from_h(state).float().split(size)
            mine = state[torch.arange(size, device=x.device)]  # a copy: the other rows' memory is given back
            held = [couple in kept_out for couple, _ in items]
            high = state.h[size : 2 * size].float().cpu()
            parts.append((packed(mine, size), neutral.cpu(), positive.cpu(), high, step, held))
            if not last:
                prediction = torch.where(follow, positive, neutral)
                if empty:
                    prediction = empty[0] + guidance * (prediction - empty[0])
                x = ddim_step(denoiser.schedule, x, prediction, t, times[step + 1])
            if caching is not None:
                caching(len(parts), total)
    return Cache(
        states=[part[0][i : i + 1] for part in parts for i in range(len(part[0]))],
        neutral=torch.cat([part[1] for part in parts]),
        positive=torch.cat([part[2] for part in parts]),
        positive_h=torch.cat([part[3] for part in parts]),
        bucket=torch.tensor([part[4] for part in parts for _ in part[5]]),
        held_out=torch.tensor([held for part in parts for held in part[5]]),
    )


def packed(state: HState, size: int) -> HState:
    """Small states stay as they are; large ones go to the CPU in fp16 (SD1 at 512 pixels: 13 MB a row, not 26)."""
    one = sum(tensor.numel() * tensor.element_size() for tensor in (state.h, *state.skips)) // size
    if one <= LARGE_STATE:
        return state
    return state.to(device=torch.device("cpu"), dtype=torch.float16)
