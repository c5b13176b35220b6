"""Where an unasked thing sits, in words and in weights (Geom-Erasing, Liu et al. 2310.05873, sec. 3).

A picture is divided into bins x bins places, each with a location token of its own. A caption gets the thing's name and
the tokens of the places that it covers; a clean picture's caption stays as it is. The loss weighs the covered cells of
the latent against the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LearnError, SettingError

Boxes = Sequence[tuple[float, float, float, float]]  # left, top, right, bottom, as shares of width and height
BINS, MOST_BINS = 4, 8
ALPHA = 0.5
EDGE = 1e-6  # a box that ends on a place's edge does not cover the next one


def check_bins(bins: int) -> int:
    """Errors: SettingError. 8 x 8 is what fits into the 75 tokens of a prompt."""
    if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins <= MOST_BINS:
        raise SettingError(f"The picture is divided into {bins!r} places a side; expected 1 to {MOST_BINS}.")
    return bins


def covered(boxes: Boxes, bins: int = BINS) -> list[int]:
    """Numbers of the places that any box touches: row * bins + column, ascending."""
    check_bins(bins)
    found = set()
    for left, top, right, bottom in boxes:
        rows, columns = _span(top, bottom, bins), _span(left, right, bins)
        found |= {row * bins + column for row in rows for column in columns}
    return sorted(found)


def _span(low: float, high: float, count: int) -> range:
    if not (math.isfinite(low) and math.isfinite(high) and low < high and high > 0 and low < 1):
        raise LearnError(
            f"A box from {low!r} to {high!r} is not in the picture: boxes are left, top, right, bottom as shares of "
            "width and height, from 0 to 1."
        )
    first = min(count - 1, max(0, math.floor(low * count + EDGE)))
    last = min(count - 1, max(first, math.ceil(high * count - EDGE) - 1))
    return range(first, last + 1)


def token(place: int, concept: str = "") -> str:
    """The word that stands for a place in a caption, until its vector takes its place."""
    return f"<{'-'.join(concept.split()) or 'geom'}-{place}>"


def located_caption(caption: str, concept: str, boxes: Boxes, bins: int = BINS) -> str:
    """The caption with the thing's name and the tokens of the places it covers; as it is for a clean picture."""
    places = covered(boxes, bins)
    words = [caption, concept, *(token(place, concept) for place in places)] if places else [caption]
    return " ".join(word for word in words if word)


def covered_cells(boxes: Boxes, height: int, width: int) -> Tensor:
    """(H, W) bool: the cells of the latent that any box touches."""
    cells = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        rows, columns = _span(top, bottom, height), _span(left, right, width)
        cells[rows.start : rows.stop, columns.start : columns.stop] = True
    return cells


def area_weights(cells: Tensor, alpha: float = ALPHA) -> Tensor:
    """Weights of a picture's cells, fp32, of mean 1: K of T cells covered weigh T / (K + alpha (T - K)), the others
    alpha times that. cells: (..., H, W) bool; a clean or a wholly covered picture weighs 1 everywhere.

    alpha below 1 looks closer at the thing, which is small; 1 is the plain loss. Errors: SettingError.
    """
    if not 0 < alpha <= 1:
        raise SettingError(f"The weight alpha of what is not covered is {alpha:g}; expected above 0, up to 1.")
    total = cells.shape[-1] * cells.shape[-2]
    count = cells.sum((-2, -1), keepdim=True)
    inside = total / (count + alpha * (total - count))
    weights = torch.where(cells, inside, alpha * inside)
    return torch.where(count == 0, torch.ones_like(weights), weights).float()
