"""Sampling with a gradient back to the noise, for models of one or a few steps, and truncated for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..denoiser import Conditioning, Denoiser, Steers, Time
from ..sampling import ddim_step


@dataclass
class Sampler:
    """Draws from noise as `sampling.sample` does, bit for bit, with gradients.

    through: so many of the last steps pass gradients through the UNet. In the earlier ones the picture that the UNet
    sees in the noise counts as given (truncated gradients), and only the noise that is kept passes them on. memory:
    whether steps are drawn again for the gradient instead of kept (gradient checkpointing): memory for one step.
    """

    denoiser: Denoiser
    cond: Conditioning
    uncond: Conditioning | None
    guidance: float
    times: Sequence[float]
    steers: Sequence[Sequence[object]]
    through: int
    memory: bool

    def __call__(self, z: Tensor, rows: Tensor) -> Tensor:
        """Scaled latents of the pictures with these numbers (B,), from noise (B, C, H, W)."""
        schedule = self.denoiser.schedule
        x, graded = z, torch.is_grad_enabled()
        for step, t in enumerate(self.times):
            after = self.times[step + 1] if step + 1 < len(self.times) else None
            if step >= len(self.times) - self.through:
                if graded and self.memory:
                    found: Tensor = checkpoint(  # type: ignore[assignment]
                        self._predict, x, t, rows, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    found = self._predict(x, t, rows)
                x = ddim_step(schedule, x, found, t, after)
            else:
                with torch.no_grad():
                    given = ddim_step(schedule, x, self._predict(x, t, rows), t, after)
                kept = schedule.signal(after, x)[1] / schedule.signal(t, x)[1]
                x = given + kept * (x - x.detach())
        return x

    def _predict(self, x: Tensor, t: Time, rows: Tensor) -> Tensor:
        cond, inputs = self.cond[rows], x.to(self.denoiser.dtype)
        mine: Steers = [self.steers[row] for row in rows.tolist()]  # type: ignore[misc]
        if self.uncond is None:
            return self.denoiser.predict(inputs, t, cond, mine if any(mine) else (), [True] * len(rows)).float()
        both = Conditioning.cat([self.uncond.expand(len(rows)), cond])
        mine = [*mine, *mine] if any(mine) else ()  # type: ignore[list-item]
        is_cond = [False] * len(rows) + [True] * len(rows)
        predicted = self.denoiser.predict(torch.cat([inputs, inputs]), t, both, mine, is_cond).float()
        free, text = predicted.chunk(2)
        return free + self.guidance * (text - free)
