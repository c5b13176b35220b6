"""Pictures with what a detector found in them, as a model learns from them: latents, captions and boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..pictures import read_pictures
from .found_file import Found
from .grid import Boxes
from .settings import Examples

AT_ONCE = 8


def cropped(boxes: Boxes, picture: tuple[int, int], target: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """Boxes of a picture (width, height) after `pictures.read_pictures` has cut its middle to the shape (H, W) of
    target; what is cut away is no longer there."""
    (width, height), (rows, columns) = picture, target
    across = min(1.0, (height * columns / rows) / width)  # shares that stay
    down = min(1.0, (width * rows / columns) / height)
    found = []
    for left, top, right, bottom in boxes:
        x0, x1 = (min(1.0, max(0.0, (x - (1 - across) / 2) / across)) for x in (left, right))
        y0, y1 = (min(1.0, max(0.0, (y - (1 - down) / 2) / down)) for y in (top, bottom))
        if x1 > x0 and y1 > y0:
            found.append((x0, y0, x1, y1))
    return found


def concept_of(found: Sequence[Found], wanted: str = "") -> str:
    """The thing to erase: `wanted`, or the only one that was found. Errors: LearnError, which names those found."""
    names = sorted({name for one in found for name, boxes in one.boxes.items() if boxes})
    if wanted and wanted not in names:
        raise LearnError(f"{wanted!r} was not found in these pictures; found were: {', '.join(names) or 'none'}.")
    if not wanted and len(names) != 1:
        raise LearnError(f"Say what to erase; found in these pictures were: {', '.join(names) or 'none'}.")
    return wanted or names[0]


@torch.no_grad()
def encode(denoiser: Denoiser, pixels: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] -> scaled latents, fp32 on the CPU, a few at a time."""
    parts = []
    for first in range(0, len(pixels), AT_ONCE):
        part = pixels[first : first + AT_ONCE].to(denoiser.device, denoiser.dtype)
        parts.append(denoiser.encode_pictures(part).float().cpu())
        if progress is not None:
            progress(min(len(pixels), first + AT_ONCE), len(pixels))
    return torch.cat(parts)


def read_examples(
    denoiser: Denoiser,
    found: Sequence[Found],
    concept: str,
    size: tuple[int, int],
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """The pictures of a scan at a model's size (H, W) in pixels, with the boxes of one thing.

    concept "": of all things that were found, for the ways that name none. Errors: ConceptSteerError for a file that
    cannot be read any more.
    """
    latents = []
    for number, one in enumerate(found):
        latents.append(encode(denoiser, read_pictures([one.file], size)))
        if progress is not None:
            progress(number + 1, len(found))
    boxes = []
    for one in found:
        mine = one.boxes.get(concept, ()) if concept else [box for some in one.boxes.values() for box in some]
        boxes.append(cropped(mine, (one.size[0], one.size[1]), size))
    return Examples(torch.cat(latents), [one.caption for one in found], boxes)
