"""What people look at while a vector is learned, and afterwards: before/after pictures and the curve of learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..denoiser import Denoiser
from ..pictures import before_after, to_images
from ..plots import BLUE, ORANGE, curves
from ..sampling import sample
from ..steering import Steer
from ..vector import ConceptVector
from .result import LearnResult


@dataclass
class Preview:
    """The same prompts and seeds without and with a vector; the pictures without it are drawn once.

    seeds: not those of learning. steps and guidance: of the small DDIM sampler.
    """

    denoiser: Denoiser
    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int = 8
    guidance: float = 5.0
    _before: list[Image.Image] = field(default_factory=list)

    def sheet(self, vector: ConceptVector, title: str = "") -> Image.Image:
        """One picture: the upper row without, the lower with the vector at strength 1."""
        if not self._before:
            self._before = self._draw(())
        captions = [f"{prompt}, seed {seed}" for prompt, seed in zip(self.prompts, self.seeds, strict=True)]
        return before_after(self._before, self._draw([Steer(vector)]), captions, title, f"{vector.name} 1")

    def _draw(self, steers: Sequence[Steer]) -> list[Image.Image]:
        with torch.inference_mode(False), torch.no_grad():
            latents = sample(
                self.denoiser,
                self.prompts,
                seeds=self.seeds,
                steps=self.steps,
                guidance=self.guidance,
                steers=steers,
                batch=len(self.prompts),
            )
            return to_images(self.denoiser.decode(latents))


def learning_curve(result: LearnResult) -> Image.Image:
    """Loss per step and held-out loss at each check, with the rest of the report in words below."""
    steps = len(result.losses)
    training = [(float(i + 1), loss) for i, loss in enumerate(result.losses)]
    checks = len(result.held_out) - 1
    every = max(1, steps // 10)
    held = [(float(min(i * every, steps)), loss) for i, loss in enumerate(result.held_out)] if checks > 0 else []
    words = result.summary().splitlines()[1:]
    return curves(
        [("training loss", BLUE, training), ("held-out loss", ORANGE, held)],
        title=f"{result.vector.name}: learned by {result.method}, {result.stopped}",
        x_label="step",
        footer=" ".join(words),
    )
