"""Boxes from a heat map: where it stands above a level, one box for each connected region."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..safety.detectors import Box, Verdict

OUTLINE = 0.5  # the probability at which a region ends, unless the threshold is lower
FINE = 64  # the heat map is looked at on at least this many points a side: edges fall between the cells
SMALLEST = 0.004  # share of the picture's area below which a region is a speck: one of 16 x 16 cells


@dataclass(frozen=True)
class Region:
    """score: the highest probability inside. box: left, top, right, bottom as fractions of width and height."""

    score: float
    box: tuple[float, float, float, float]


def regions(heat: np.ndarray, threshold: float, smallest: float = SMALLEST) -> list[Region]:
    """The regions of a heat map (h, w) of probabilities whose peak reaches `threshold`, the surest first.

    A region is bounded where the map, linear between the middles of its cells, falls below `OUTLINE` (or below the
    threshold, if that is lower). smallest: share of the picture's area that a region must have.
    """
    fine = _finer(heat)
    height, width = fine.shape
    found = []
    for rows, columns in _components(fine >= min(OUTLINE, threshold)):
        score = float(fine[rows, columns].max())
        if score >= threshold and len(rows) >= smallest * fine.size:
            left, top = int(columns.min()) / width, int(rows.min()) / height
            right, bottom = (int(columns.max()) + 1) / width, (int(rows.max()) + 1) / height
            found.append(Region(score, (left, top, right, bottom)))
    return sorted(found, key=lambda region: -region.score)


def verdict_of_heat(
    concept: str, heat: np.ndarray, size: tuple[int, int], threshold: float, smallest: float = SMALLEST
) -> Verdict:
    """What a heat map (h, w) of probabilities says of a picture of `size` (width, height); boxes in its pixels.

    score: the map's peak. A picture is flagged when a region is found, so a speck flags none whatever its peak.
    """
    found = regions(heat, threshold, smallest)
    score = found[0].score if found else min(float(_finer(heat).max()), math.nextafter(threshold, 0))
    boxes = [(concept, _pixels(region.box, size)) for region in found]
    return Verdict(bool(found), score, {concept: score}, boxes)


def _pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    width, height = size
    left, top = round(box[0] * width), round(box[1] * height)
    return left, top, max(1, round(box[2] * width) - left), max(1, round(box[3] * height) - top)


def _finer(heat: np.ndarray) -> np.ndarray:
    times = max(1, -(-FINE // min(heat.shape)))
    map_ = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None, None]
    return F.interpolate(map_, scale_factor=times, mode="bilinear", align_corners=False)[0, 0].numpy()


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of each part of `mask` (h, w) bool that hangs together by its sides."""
    width = mask.shape[1]
    left_over = set(np.flatnonzero(mask).tolist())
    parts = []
    while left_over:
        waiting = [left_over.pop()]
        part = []
        while waiting:
            place = waiting.pop()
            part.append(place)
            column = place % width
            for near in (
                place - width,
                place + width,
                place - 1 if column else -1,
                place + 1 if column + 1 < width else -1,
            ):
                if near in left_over:
                    left_over.remove(near)
                    waiting.append(near)
        rows, columns = np.divmod(np.array(part), width)
        parts.append((rows, columns))
    return parts
