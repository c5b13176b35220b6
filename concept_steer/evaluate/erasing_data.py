"""Pictures for Geom-Erasing's measurements, from a build of the embedded model's training pictures.

Those without a mark are taken; marks are painted here, and found again by the embedded localiser: nothing is learned
from the truth but in the ablation that asks what a detector's errors cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..demo import drawing
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..geom_erasing.dataset import detect
from ..geom_erasing.detectors import detector_of
from ..geom_erasing.grid import Boxes
from ..geom_erasing.reading import encode
from ..geom_erasing.settings import Examples

CONCEPTS = ("watermark", "qr", "text")
SPOKEN = {"watermark": "watermark", "qr": "qr code", "text": "text"}
SEED = 11


@dataclass(frozen=True)
class Build:
    """The folder that `demo.build_data` wrote. Errors on use: ConceptSteerError when it is not one."""

    folder: Path

    @cached_property
    def clean(self) -> np.ndarray:
        """Numbers of the pictures without a mark, in a fixed random order."""
        labels = self._labels
        plain = (labels["watermark"] < 0) & (labels["qr"] == 0) & (labels["text"] == 0)
        return np.random.default_rng(SEED).permutation(np.nonzero(plain)[0])

    @cached_property
    def _labels(self) -> dict[str, np.ndarray]:
        try:
            return dict(np.load(self.folder / "labels.npz"))
        except (OSError, ValueError) as error:
            raise ConceptSteerError(
                f"{self.folder} is not a build of the training pictures ({error}): make one with python -m "
                "concept_steer.demo.build_data --out DIR, and name it with --data."
            ) from error

    @cached_property
    def _pictures(self) -> np.ndarray:
        return np.load(self.folder / "pictures.npy", mmap_mode="r")

    @cached_property
    def _captions(self) -> list[list[str]]:
        return json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))

    def take(self, first: int, count: int) -> tuple[list[np.ndarray], list[str]]:
        """Some of the clean pictures (128, 128, 3) uint8 with a caption each, always the same for the same numbers."""
        some = self.clean[first : first + count]
        if len(some) < count:
            raise ConceptSteerError(f"{self.folder} has too few pictures without a mark: {len(self.clean)}.")
        captions = [self._captions[i][int(i) % 2] for i in some]
        return [np.asarray(self._pictures[i]).copy() for i in some], captions


def paint(picture: np.ndarray, concept: str, rng: np.random.Generator) -> np.ndarray:
    if concept == "watermark":
        return drawing.watermark(picture, rng)[0]
    return drawing.qr_code(picture, rng) if concept == "qr" else drawing.lettering(picture, rng)


def spoiled(
    build: Build, first: int, count: int, concepts: Sequence[str], share: float
) -> tuple[list[np.ndarray], list[str], list[Boxes]]:
    """Pictures of which `share` carry one of the concepts in turn; where they do, the true boxes."""
    pictures, captions = build.take(first, count)
    rng = np.random.default_rng(SEED + first)
    boxes: list[Boxes] = [[] for _ in pictures]
    for number in range(round(share * count)):
        before = pictures[number]
        after = paint(before, concepts[number % len(concepts)], rng)
        rows, columns = np.nonzero((after != before).any(-1))
        side = before.shape[0]
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        left, top, right, bottom = (float(edge) / side for edge in edges)
        pictures[number], boxes[number] = after, [(left, top, right, bottom)]
    return pictures, captions, boxes


def found_boxes(pictures: Sequence[np.ndarray], concepts: Sequence[str]) -> list[Boxes]:
    """What the embedded localiser finds of the concepts."""
    images = [Image.fromarray(picture) for picture in pictures]
    found = detect(images, [""] * len(images), [detector_of(f"demo-{concept}") for concept in concepts])
    return [[box for some in one.boxes.values() for box in some] for one in found]


def jittered(boxes: Sequence[Boxes], amount: float, seed: int = 0) -> list[Boxes]:
    """Boxes with their edges moved by normal noise of `amount` of their sides: a worse detector."""
    rng = np.random.default_rng(seed)
    moved: list[Boxes] = []
    for some in boxes:
        mine = []
        for left, top, right, bottom in some:
            noise = rng.normal(0, amount, 4) * (right - left, bottom - top, right - left, bottom - top)
            x0, y0, x1, y1 = np.clip(np.array((left, top, right, bottom)) + noise, 0, 1)
            x0, y0 = min(x0, 0.98), min(y0, 0.98)
            mine.append((float(x0), float(y0), float(max(x1, x0 + 0.02)), float(max(y1, y0 + 0.02))))
        moved.append(mine)
    return moved


def overlap(one: Sequence[Boxes], other: Sequence[Boxes]) -> float:
    """Mean intersection over union of the first boxes, over pictures that have one in `other`; missing ones are 0."""
    values = []
    for a, b in zip(one, other, strict=True):
        if not b:
            continue
        if not a:
            values.append(0.0)
            continue
        width = min(a[0][2], b[0][2]) - max(a[0][0], b[0][0])
        height = min(a[0][3], b[0][3]) - max(a[0][1], b[0][1])
        shared = max(0.0, width) * max(0.0, height)
        areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a[0], b[0]))
        values.append(shared / (areas - shared))
    return sum(values) / len(values) if values else float("nan")


def examples(
    denoiser: Denoiser, pictures: Sequence[np.ndarray], captions: Sequence[str], boxes: Sequence[Boxes]
) -> Examples:
    return Examples(encode(denoiser, pixels(pictures)), list(captions), list(boxes))


def pixels(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
