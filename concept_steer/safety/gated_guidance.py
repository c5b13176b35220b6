"""Guidance where a concept shows: Safe Latent Diffusion for the pictures whose gate has opened, and for no others.

The gate (`gate.Presence`) reads h in passing. From the step at which it first opens, the picture is guided until it is
finished: guidance takes the concept out of h, and a gate that let go again would let it back in. Harmless pictures keep
their bits and cost no row, so that the strongest preset is affordable. Guiding only where it is needed is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import SafetyError
from ..guidance.safe_latent_diffusion import SafeLatentDiffusion, SafeRun
from .gate import Firings


@dataclass(frozen=True)
class GatedGuidance:
    """A `sampling.Guide`. firings: what the gates of the same run tell; `plan` makes both."""

    settings: SafeLatentDiffusion
    firings: Firings = field(compare=False)
    gated = True

    def begin(self, pictures: range, steps: int, guidance: float) -> GatedSafeRun:
        """A fresh state for one batch."""
        return GatedSafeRun(self.settings, self.firings, len(pictures), steps, guidance)


class GatedSafeRun(SafeRun):
    """One batch."""

    def __init__(self, settings: SafeLatentDiffusion, firings: Firings, size: int, steps: int, guidance: float) -> None:
        super().__init__(settings, size, steps, guidance)
        self.firings = firings
        firings.begin()

    def acting(self) -> Sequence[bool]:
        """For each picture. Errors: SafetyError when no gate was asked at this step."""
        if not self.firings.told:
            raise SafetyError(
                "The safety gates were not asked at this step, so it is not known which pictures need guidance: "
                "something runs the model around the steering."
            )
        return self.firings.so_far(self.size)
