"""Strips: the same prompts and seeds at several strengths of a vector; and a sheet with one row a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..denoiser import Denoiser
from ..pictures import grid, to_images
from ..sampling import sample
from ..steering import Steer
from ..vector import ConceptVector

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass
class Strips:
    """Pictures of prompts[i] with seeds[i], a row each, at `strengths`; those at strength 0 are drawn only once.

    steps and guidance: of the small DDIM sampler. batch: pictures at once.
    """

    denoiser: Denoiser
    prompts: Sequence[str]
    seeds: Sequence[int]
    strengths: Sequence[float] = STRENGTHS
    steps: int = 10
    guidance: float = 5.0
    batch: int = 8
    _plain: list[Image.Image] = field(default_factory=list)

    def drawn(
        self, vector: ConceptVector, progress: Callable[[int, int], None] | None = None
    ) -> list[list[Image.Image]]:
        """Rows of pictures, one a strength. progress(done, total) counts sampling steps."""
        cells = [(row, strength) for row in range(len(self.prompts)) for strength in self.strengths if strength]
        plain = [] if self._plain else [(row, 0.0) for row in range(len(self.prompts))]
        images = self._draw(vector, plain + cells, progress)
        self._plain = self._plain or images[: len(plain)]
        steered = dict(zip(cells, images[len(plain) :], strict=True))
        return [
            [steered[row, strength] if strength else self._plain[row] for strength in self.strengths]
            for row in range(len(self.prompts))
        ]

    def picture(self, images: Sequence[Sequence[Image.Image]], title: str) -> Image.Image:
        """The rows of `drawn` with labels."""
        names = [f"{prompt}, seed {seed}" for prompt, seed in zip(self.prompts, self.seeds, strict=True)]
        return grid(images, columns=columns(self.strengths), rows=names, title=title, cell=_cell(images))

    def _draw(
        self,
        vector: ConceptVector,
        cells: Sequence[tuple[int, float]],
        progress: Callable[[int, int], None] | None,
    ) -> list[Image.Image]:
        with torch.inference_mode(False), torch.no_grad():
            latents = sample(
                self.denoiser,
                [self.prompts[row] for row, _ in cells],
                seeds=[self.seeds[row] for row, _ in cells],
                steps=self.steps,
                guidance=self.guidance,
                steers=[[Steer(vector, strength)] for _, strength in cells],
                batch=self.batch,
                progress=progress,
            )
            return [image for part in latents.split(self.batch) for image in to_images(self.denoiser.decode(part))]


def columns(strengths: Sequence[float]) -> list[str]:
    return [f"strength {strength:g}" for strength in strengths]


def contact_sheet(
    first_rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], strengths: Sequence[float], title: str
) -> Image.Image:
    """One row of pictures a direction, all of the same prompt and seed, with the direction's label before it."""
    return grid(first_rows, columns=columns(strengths), rows=labels, title=title, cell=_cell(first_rows))


def _cell(images: Sequence[Sequence[Image.Image]]) -> int:
    return max(96, min(256, images[0][0].width))
