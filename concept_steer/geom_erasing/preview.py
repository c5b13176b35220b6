"""What people look at while something is erased, and afterwards: the same prompts and seeds before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..denoiser import Denoiser
from ..pictures import before_after, to_images
from ..sampling import sample
from .embedding import LocationTokens
from .using import knowing


@dataclass
class ErasingPreview:
    """seeds: not those of learning. steps and guidance: of the small DDIM sampler."""

    denoiser: Denoiser
    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int = 8
    guidance: float = 5.0
    before: list[Image.Image] = field(default_factory=list)

    def begin(self) -> None:
        """Draw the pictures before: call it before learning, which puts the LoRA on the same denoiser."""
        self.before = self._draw(self.denoiser, None)

    def sheet(self, tokens: LocationTokens | None, title: str = "", denoiser: Denoiser | None = None) -> Image.Image:
        """One picture: the upper row before, the lower with the tokens as the negative prompt (None: without).

        denoiser: the one with the LoRA, once learning is over.
        """
        captions = [
            f"{prompt}, seed {seed}".lstrip(", ") for prompt, seed in zip(self.prompts, self.seeds, strict=True)
        ]
        after = self._draw(denoiser or self.denoiser, tokens)
        return before_after(self.before, after, captions, title, "the LoRA" if tokens is None else tokens.name)

    def _draw(self, denoiser: Denoiser, tokens: LocationTokens | None) -> list[Image.Image]:
        with torch.inference_mode(False), torch.no_grad():
            latents = sample(
                knowing(denoiser, [] if tokens is None else [tokens]),
                self.prompts,
                seeds=self.seeds,
                steps=self.steps,
                guidance=self.guidance,
                negative="" if tokens is None else tokens.name,
                batch=len(self.prompts),
            )
            return to_images(denoiser.decode(latents))
