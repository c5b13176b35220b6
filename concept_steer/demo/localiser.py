"""Where a watermark, a QR-like code or lettering stands in a picture of the embedded model's world.

One small net (64 px in, a heat map of 16 x 16 cells a concept out), trained by `train_localiser` on art with painted
marks. The judges (`judges`) stay the measuring instrument; this one only says where. What it is worth on art that it
never saw is in its file's metadata ("localiser.report").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ConceptSteerError
from ..geom_erasing.regions import verdict_of_heat
from ..safety.detectors import Verdict
from .judges import view

LOCALISER_FILE = Path(__file__).parent / "weights" / "localiser.safetensors"
CONCEPTS = ("watermark", "qr", "text")
SPOKEN = {"qr": "qr code"}  # where captions call a concept something else
GRID = 16  # cells a side of the heat map
SMALLEST = 0.015  # share of the area that a mark covers at least; whole ones cover 12 to 16 %
WIDTHS = (32, 64, 96, 128)  # at 32, 16, 8 and 4 px


class HeatNet(nn.Module):
    """A small U-shaped net: down to 4 px, so that it sees the whole picture, and up again to the 16 of the heat map."""

    def __init__(self, concepts: int = len(CONCEPTS), widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        first, fine, middle, coarse = widths
        self.stem = nn.Sequential(_halved(3, first), _halved(first, fine), _mixed(fine))
        self.down = nn.Sequential(_halved(fine, middle), _mixed(middle))
        self.bottom = nn.Sequential(_halved(middle, coarse), _mixed(coarse), nn.Conv2d(coarse, middle, 1))
        self.up_bottom = nn.Sequential(_mixed(middle), nn.Conv2d(middle, fine, 1))
        last = nn.Conv2d(fine, concepts, 1)
        nn.init.constant_(last.bias, -3.0)  # type: ignore[arg-type]  # most cells show nothing
        self.out = nn.Sequential(_mixed(fine), last)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, 64, 64) in [-1, 1]; logits (B, concepts, 16, 16)."""
        fine = self.stem(x)
        middle = self.down(fine)
        middle = middle + _doubled(self.bottom(middle))
        return self.out(fine + _doubled(self.up_bottom(middle)))


def _halved(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, stride=2), nn.GroupNorm(8, after), nn.SiLU())


def _mixed(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.Conv2d(width, width, 1),
        nn.GroupNorm(8, width),
        nn.SiLU(),
    )


def _doubled(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


class Localiser:
    """The trained net, loaded from a file of `train_localiser`; call with pixels (B, 3, H, W) in [-1, 1].

    Errors: ConceptSteerError when the file is missing, or is not a localiser's.
    """

    def __init__(self, path: Path = LOCALISER_FILE) -> None:
        if not path.is_file():
            raise ConceptSteerError(f"The localiser is missing: expected {path}. Reinstall concept-steer.")
        try:
            with safe_open(str(path), framework="pt") as file:
                self.metadata = file.metadata() or {}
                state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            self.concepts: tuple[str, ...] = tuple(json.loads(self.metadata["localiser.concepts"]))
            self.net = HeatNet(len(self.concepts)).eval().requires_grad_(False)
            self.net.load_state_dict(state)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ConceptSteerError(
                f"{path} is not a localiser written by concept_steer.demo.train_localiser ({type(error).__name__}: "
                f"{str(error)[:200]})."
            ) from error

    @torch.no_grad()
    def __call__(self, pixels: Tensor, batch: int = 64) -> Tensor:
        """Probabilities (B, concepts, 16, 16): the share of each cell that the concept covers."""
        parts = [self.net(view(chunk)).sigmoid() for chunk in pixels.split(batch)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.concepts), GRID, GRID)


class DemoLocaliser:
    """One concept of the localiser as a detector with boxes: "demo-watermark", "demo-qr" or "demo-text".

    threshold: of the heat map's peak. localiser: another one than the shipped. Errors: ConceptSteerError.
    """

    def __init__(self, concept: str, threshold: float = 0.5, localiser: Localiser | None = None) -> None:
        self.localiser = localiser or Localiser()
        if concept not in self.localiser.concepts:
            known = ", ".join(self.localiser.concepts)
            raise ConceptSteerError(f"This localiser does not know {concept!r}; it knows {known}.")
        self._index = self.localiser.concepts.index(concept)
        self.concept, self.threshold = SPOKEN.get(concept, concept), threshold
        self.name = f"demo-{concept}"

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        found = []
        for image in images:
            array = np.array(image.convert("RGB"))
            pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
            heat = self.localiser(pixels)[0, self._index].numpy()
            found.append(verdict_of_heat(self.concept, heat, image.size, self.threshold, SMALLEST))
        return found
