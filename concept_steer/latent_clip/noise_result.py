"""What noise optimisation gives: the best noise of each picture, what it is worth, and how far from Gaussian it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Part = tuple[Mapping[str, Tensor], Tensor, Mapping[int, int], int]  # best, history, spoiled, first number


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What progress sees after each iteration of a batch.

    done, total: iterations of all pictures. iteration: of this batch, from 1. pictures: the numbers of its pictures.
    values: (B,) their rewards now, NaN where a picture has ended. best: "latents" (B, C, H, W) and "value" (B,), on the
    model's device; they change with the next iteration, so that what is to be kept has to be cloned.
    """

    done: int
    total: int
    iteration: int
    pictures: range
    values: Tensor
    best: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class NoiseResult:
    """The best of each picture, on the CPU in fp32.

    noise, latents: (n, C, H, W), the noise and the scaled latents that it gives. before, values: (n,) the reward of the
    first noise and of the best one. terms, terms_before: the same by reward, weighted. at: (n,) the iteration of the
    best, 0 is the start. history: (iterations, n), NaN where a picture was not drawn. n is less than was asked for when
    a stop came before the last batch. spoiled: picture -> iteration at which its numbers were no longer finite.
    """

    noise: Tensor
    latents: Tensor
    before: Tensor
    values: Tensor
    terms_before: Mapping[str, Tensor]
    terms: Mapping[str, Tensor]
    at: Tensor
    history: Tensor
    spoiled: Mapping[int, int]
    stopped: str
    unet_rows: float
    seconds: float

    def __len__(self) -> int:
        return len(self.noise)

    def spread(self) -> dict[str, Tensor]:
        """See `gaussian`; of the best noise."""
        return gaussian(self.noise)

    def summary(self) -> str:
        """In plain words."""
        spread = self.spread()
        lines = [
            f"{len(self)} pictures: reward {float(self.before.mean()):.3f} -> {float(self.values.mean()):.3f} in "
            f"{len(self.history)} iterations, {self.seconds / max(1, len(self)):.2f} s and "
            f"{self.unet_rows / max(1, len(self)):.0f} UNet rows forward per picture.",
            f"The noise: mean {float(spread['mean'].mean()):+.3f}, standard deviation "
            f"{float(spread['std'].mean()):.3f}, length {float(spread['length'].mean()):.3f} of a Gaussian's.",
        ]
        if self.spoiled:
            lines.append(f"{len(self.spoiled)} pictures ended early because of NaN; their best was kept.")
        if self.stopped:
            lines.append(f"{self.stopped[0].upper()}{self.stopped[1:]}; the best so far was kept.")
        return "\n".join(lines)


def gaussian(noise: Tensor) -> dict[str, Tensor]:
    """How far noise (n, C, H, W) is from standard Gaussian: mean (0), std (1), length / sqrt(d) (1), kurtosis (3);
    and "neighbours", the correlation of values side by side (0). Each (n,), fp32."""
    flat = noise.float().flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    grid = noise.float() - noise.float().mean((1, 2, 3), keepdim=True)
    beside = [(grid[..., 1:] * grid[..., :-1]), (grid[..., 1:, :] * grid[..., :-1, :])]
    return {
        "mean": flat.mean(1),
        "std": flat.std(1),
        "length": flat.norm(dim=1) / flat.shape[1] ** 0.5,
        "kurtosis": centred.pow(4).mean(1) / variance.square(),
        "neighbours": torch.stack([part.mean((1, 2, 3)) for part in beside]).mean(0) / variance,
    }


def join(parts: Sequence[Part], *, stopped: str, unet_rows: float, seconds: float) -> NoiseResult:
    """The batches of a run as one result."""
    longest = max(len(history) for _, history, _, _ in parts)
    rows = []
    for _, history, _, _ in parts:
        missing = torch.full((longest - len(history), history.shape[1]), float("nan"))
        rows.append(torch.cat([history, missing]))

    def all_of(key: str) -> Tensor:
        return torch.cat([best[key].cpu() for best, _, _, _ in parts])

    names = [key.removeprefix("reward ") for key in parts[0][0] if key.startswith("reward ")]
    return NoiseResult(
        noise=all_of("noise"),
        latents=all_of("latents").float(),
        before=all_of("start").float(),
        values=all_of("value").float(),
        terms_before={name: all_of(f"start {name}") for name in names},
        terms={name: all_of(f"reward {name}") for name in names},
        at=all_of("at"),
        history=torch.cat(rows, dim=1),
        spoiled={first + place: at for _, _, spoiled, first in parts for place, at in spoiled.items()},
        stopped=stopped,
        unet_rows=unet_rows,
        seconds=seconds,
    )
