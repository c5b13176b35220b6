"""What is kept of the encoder half, so that it runs once: the states of noisy latents, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser, HState

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


def packed(state: HState, size: int) -> HState:
    """Small states stay as they are; large ones go to the CPU in fp16 (SD1 at 512 pixels: 13 MB a row, not 26)."""
    one = sum(tensor.numel() * tensor.element_size() for tensor in (state.h, *state.skips)) // size
    if one <= LARGE_STATE:
        return state
    return state.to(device=torch.device("cpu"), dtype=torch.float16)
