"""Pictures that people look at and give: latents' pixels to PIL images, labelled grids, strips and before/after sheets;
and a folder of pictures to pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from .errors import ConceptSteerError

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
INK, PAPER, FRAME = (30, 30, 36), (255, 255, 255), (214, 216, 222)
READ = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files
FONT = Path(__file__).with_name("fonts") / "aileron.ttf"


def lettering(size: int) -> ImageFont.FreeTypeFont:
    """The font of all labels, size in pixels. Our own file: the web UIs ship a Pillow whose default has no sizes."""
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to RGB images."""
    array = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in np.ascontiguousarray(array)]


def picture_files(folder: Path) -> list[Path]:
    """The png, jpg and webp pictures of a folder, by name. Errors: ConceptSteerError, which names the folder."""
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in READ and not p.name.startswith("."))
    except OSError as error:
        raise ConceptSteerError(f"{folder} is not a folder that can be read ({error.strerror}).") from None
    if not files:
        raise ConceptSteerError(f"{folder} holds no pictures: put some there that end in {', '.join(READ)}.")
    return files


def read_pictures(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Picture files as (N, 3, H, W) in [-1, 1], each cropped to its middle in the shape of size (H, W) and scaled.

    What is transparent becomes white. Errors: ConceptSteerError, which names the file.
    """
    array = np.stack([np.asarray(_read(file, size)) for file in files])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def _read(file: Path, size: tuple[int, int]) -> Image.Image:
    try:
        image = as_seen(file)
    except UNREADABLE as error:
        raise ConceptSteerError(f"{file} cannot be read as a picture ({error}): replace it or take it away.") from None
    return ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)


def as_seen(file: Path | IO[bytes]) -> Image.Image:
    """A picture file in RGB as people see it: turned as its camera says, on white where it is transparent.

    Errors: those in `UNREADABLE`.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image).convert("RGB")


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def grid(
    images: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    cell: int = 128,
    font_size: int = 13,
) -> Image.Image:
    """Rows of images as one picture, with labels over the columns, before the rows and under every image."""
    font = lettering(font_size)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = font_size + 5
    wide = max(len(row) for row in images)
    wrapped = [[_wrapped(draw, text, font, cell - 4) for text in row] for row in captions]
    under = line * max((text.count("\n") + 1 for row in wrapped for text in row), default=0)
    row_texts = [_wrapped(draw, text, font, 110) for text in rows]
    left = 120 if rows else 4
    column_texts = [_wrapped(draw, text, font, cell - 4) for text in columns]
    top = line * max((text.count("\n") + 1 for text in column_texts), default=0) + (line + 6 if title else 0) + 4
    step = cell + under + 4
    canvas = Image.new("RGB", (left + wide * (cell + 4) + 4, top + len(images) * step + 4), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((6, 3), title, font=lettering(font_size + 2), fill=INK)
    for x, text in enumerate(column_texts):
        draw.multiline_text(
            (left + x * (cell + 4) + cell // 2, top - 4), text, font=font, fill=INK, anchor="md", align="center"
        )
    for y, row in enumerate(images):
        if y < len(row_texts):
            middle = top + y * step + cell // 2
            draw.multiline_text((6, middle), row_texts[y], font=font, fill=INK, anchor="lm")
        for x, image in enumerate(row):
            place = (left + x * (cell + 4), top + y * step)
            draw.rectangle([place[0] - 1, place[1] - 1, place[0] + cell, place[1] + cell], outline=FRAME)
            canvas.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), place)
            if y < len(wrapped) and x < len(wrapped[y]):
                draw.multiline_text((place[0], place[1] + cell + 1), wrapped[y][x], font=font, fill=INK, spacing=2)
    return canvas


def before_after(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    captions: Sequence[str],
    title: str,
    label: str,
    columns: int = 8,
) -> Image.Image:
    """Pairs of pictures over each other, `columns` pairs a row, with captions under the lower ones.

    label: what the lower ones have. Its lines are wrapped, the title is not.
    """
    rows, under, names = [], [], []
    for first in range(0, len(before), columns):
        part = slice(first, first + columns)
        rows += [list(before[part]), list(after[part])]
        under += [[""] * len(before[part]), list(captions[part])]
        names += ["without", f"with {label}"]
    cell = max(128, min(256, before[0].width))
    return grid(rows, captions=under, rows=names, title=title, cell=cell)


def save(image: Image.Image, path: Path) -> Path:
    """Write a picture atomically (PNG or JPEG by its suffix); ConceptSteerError when the folder cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=92)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConceptSteerError(
            f"{path} cannot be written ({error.strerror or error}): choose another folder."
        ) from None
    return path


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """One above the other, on white."""
    paper = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), PAPER)
    top = 0
    for image in images:
        paper.paste(image, (0, top))
        top += image.height
    return paper
