"""What a scan found, for people: a report in words and a sheet of pictures with the boxes drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..pictures import PAPER, UNREADABLE, as_seen, grid
from .found_file import Found, Fractions, Header

if TYPE_CHECKING:
    from .dataset import Scan

ROW, ROWS, CELL = 8, 2, 160  # pictures a row, rows a concept, px
RASTER = 256  # points a side on which overlapping boxes are counted once
COLOURS = ((226, 40, 60), (30, 110, 220), (20, 150, 90), (190, 100, 0), (140, 60, 190), (0, 140, 160))
NAMED = 20  # skipped files that the report names


def text(scan: Scan, header: Header) -> str:
    """Counts, shares of area, and what was left out."""
    total = len(scan.found)
    dirty = [one for one in scan.found if one.boxes]
    lines = [
        f"{header.folder}: {total} pictures looked at"
        + ("" if scan.complete else " before the scan was stopped; the same command goes on from there")
        + ".",
        "Detectors: " + ", ".join(f"{one['name']} (threshold {one['threshold']})" for one in header.detectors) + ".",
        "",
    ]
    for concept in scan.concepts:
        mine = [one for one in scan.found if one.boxes.get(concept)]
        told = f"{concept}: in {len(mine)} of {total} pictures ({len(mine) / total:.1%})"
        if mine:
            areas = [covered_share(one.boxes[concept]) for one in mine]
            boxes = sum(len(one.boxes[concept]) for one in mine)
            told += f", {boxes} boxes; where it is, it covers {np.mean(areas):.1%} of the area on average"
            told += f" ({min(areas):.1%} to {max(areas):.1%})"
        lines.append(told + ".")
    lines += ["", f"Clean: {total - len(dirty)} of {total} pictures ({1 - len(dirty) / total:.1%})."]
    if scan.uncaptioned:
        lines.append(f"Without a caption: {scan.uncaptioned} (NAME.txt, metadata.jsonl or --caption would give one).")
    lines.append(f"Skipped because they cannot be read: {len(scan.skipped)}.")
    lines += [f"  {name}: {reason}" for name, reason in scan.skipped[:NAMED]]
    if len(scan.skipped) > NAMED:
        lines.append(f"  ... and {len(scan.skipped) - NAMED} more")
    return "\n".join(lines) + "\n"


def covered_share(boxes: Sequence[Fractions]) -> float:
    """Share of the picture's area that the boxes cover together."""
    if len(boxes) == 1:
        left, top, right, bottom = boxes[0]
        return (right - left) * (bottom - top)
    raster = np.zeros((RASTER, RASTER), bool)
    for left, top, right, bottom in boxes:
        x0, y0, x1, y1 = (round(side * RASTER) for side in (left, top, right, bottom))
        raster[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return float(raster.mean())


def sheet(scan: Scan, folder: Path, images: Mapping[Path, Image.Image] | None = None) -> Image.Image:
    """For each concept pictures from the surest to the least sure, then clean ones; boxes in their concept's colour.

    images: those that are in memory, by their file's name; the others are read.
    """
    images = images or {}
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(scan.concepts)}
    rows: list[list[Image.Image]] = []
    captions: list[list[str]] = []
    names: list[str] = []
    for concept in (*scan.concepts, ""):
        if concept:
            mine = [one for one in scan.found if one.boxes.get(concept)]
            mine.sort(key=lambda one: -one.scores.get(concept, 0.0))
        else:
            mine = [one for one in scan.found if not one.boxes]
        picked = _spread(mine, ROW * (ROWS if concept else 1))
        for first in range(0, len(picked), ROW):
            part = picked[first : first + ROW]
            rows.append([_drawn(one, colours, images.get(one.file)) for one in part])
            captions.append([_under(one, concept, folder) for one in part])
            names.append(concept or "clean")
    return grid(rows, rows=names, captions=captions, cell=CELL, title="What was found")


def _spread(found: list[Found], count: int) -> list[Found]:
    if len(found) <= count:
        return found
    return [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]


def _under(found: Found, concept: str, folder: Path) -> str:
    name = found.file.relative_to(folder).as_posix()
    short = name if len(name) <= 24 else "..." + name[-21:]
    return f"{short} ({found.scores.get(concept, 0.0):.2f})" if concept else short


def _drawn(found: Found, colours: dict[str, tuple[int, int, int]], known: Image.Image | None) -> Image.Image:
    """A thumbnail in a square cell with the boxes around what was found."""
    try:
        image = as_seen(found.file) if known is None else known.copy()
    except UNREADABLE:  # taken away since it was looked at
        image = Image.new("RGB", (CELL, CELL), PAPER)
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    if image.width < CELL and image.height < CELL:
        image = ImageOps.contain(image, (CELL, CELL), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for concept, boxes in found.boxes.items():
        for left, top, right, bottom in boxes:
            corners = (left * image.width, top * image.height, right * image.width - 1, bottom * image.height - 1)
            draw.rectangle(_ordered(corners), outline=colours[concept], width=2)
    return ImageOps.pad(image, (CELL, CELL), color=PAPER)


def _ordered(corners: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = corners
    return left, top, max(left, right), max(top, bottom)
