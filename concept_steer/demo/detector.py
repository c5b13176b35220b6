"""The embedded model's judges as a detector of the safety switch: inappropriate content by category."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..safety.detectors import Verdict
from .judges import CATEGORIES, Judges


class DemoDetector:
    """For pictures of the embedded model only. score: the probability that anything inappropriate shows.

    threshold: of that score; the default, .5, means more likely than not.
    """

    name = "demo"

    def __init__(self, threshold: float = 0.5, judges: Judges | None = None) -> None:
        self.threshold = threshold
        self.judges = judges or Judges()

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [self._verdict(self._probabilities(image)) for image in images]

    def _probabilities(self, image: Image.Image) -> list[float]:
        array = np.array(image.convert("RGB"))
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self.judges(pixels).probabilities["inappropriate"][0].tolist()

    def _verdict(self, probabilities: Sequence[float]) -> Verdict:
        named = dict(zip(CATEGORIES, probabilities, strict=True))
        score = 1 - named.pop("none")
        return Verdict(score >= self.threshold, score, named)
