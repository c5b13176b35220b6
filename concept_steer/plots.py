"""Small pictures of numbers and words (loss curves, a vector's card), with Pillow alone: hosts ship no plotter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .pictures import FRAME, INK, PAPER, Font, lettering

BLUE, ORANGE = (38, 98, 204), (222, 110, 20)
Line = tuple[str, tuple[int, int, int], Sequence[tuple[float, float]]]  # name, colour, (x, y) points


def curves(
    lines: Sequence[Line],
    *,
    title: str = "",
    x_label: str = "",
    footer: str = "",
    size: tuple[int, int] = (560, 300),
    log_x: bool = False,
) -> Image.Image:
    """Some lines in one frame, with both axes labelled. Values that are not finite are left out.

    log_x: x on a logarithmic scale, with every power of ten marked; x that is not above 0 is left out.
    """
    font, bold = lettering(13), lettering(15)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    under = _wrapped(draw, footer, font, size[0] - 16) if footer else []
    left, top, right, bottom = 56, 48, size[0] - 14, size[1] - 42 - 18 * len(under)
    drawn = [(name, colour, [point for point in values if _shown(point, log_x)]) for name, colour, values in lines]
    points = [point for _, _, values in drawn for point in values]
    apart = min(200.0, (right - left) / max(1, len(drawn)))  # the names over the frame
    draw.text((8, 5), title, font=bold, fill=INK)
    draw.rectangle([left, top, right, bottom], outline=FRAME)
    if points:
        x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
        y_low, y_high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
        y_wide = (y_high - y_low) or 1.0
        scale = math.log10 if log_x else float
        x_wide = (scale(x_high) - scale(x_low)) or 1.0

        def place(x: float, y: float) -> tuple[float, float]:
            across = (scale(x) - scale(x_low)) / x_wide
            return left + across * (right - left), bottom - (y - y_low) / y_wide * (bottom - top)

        for part in range(5):
            value = y_low + y_wide * part / 4
            y = place(x_low, value)[1]
            draw.line([(left, y), (right, y)], fill=FRAME)
            draw.text((left - 6, y), f"{value:.3g}", font=font, fill=INK, anchor="rm")
        for value in _powers(x_low, x_high) if log_x else []:
            draw.line([place(value, y_low), place(value, y_high)], fill=FRAME)
            draw.text((place(value, y_high)[0] + 4, top + 2), f"{value:g}", font=font, fill=INK)
        for value in (x_low, x_high):
            draw.text((place(value, y_low)[0], bottom + 4), f"{value:.4g}", font=font, fill=INK, anchor="mt")
        for number, (name, colour, values) in enumerate(drawn):
            kept = [place(x, y) for x, y in values]
            if len(kept) > 1:
                draw.line(kept, fill=colour, width=2)
            for x, y in kept if len(kept) <= 25 else []:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
            draw.text((left + 8 + apart * number, 27), name, font=font, fill=colour)
    draw.text(((left + right) / 2, bottom + 4), x_label, font=font, fill=INK, anchor="mt")
    draw.multiline_text((8, bottom + 22), "\n".join(under), font=font, fill=INK)
    return image


def _shown(point: tuple[float, float], log_x: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)


def _powers(low: float, high: float) -> list[float]:
    """The powers of ten from low to high."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]


def card(title: str, rows: Sequence[tuple[str, str]], picture: Image.Image | None = None, width: int = 640):
    """Labels and values as a picture, long values wrapped, with a preview picture at the right."""
    font, bold = lettering(14), lettering(18)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    side = 200 if picture is not None else 0
    label_width = max((int(measure.textlength(label, font=font)) for label, _ in rows), default=0) + 20
    space = width - label_width - side - 24
    wrapped = [(label, _wrapped(measure, value, font, space)) for label, value in rows]
    height = max(48 + sum(19 * len(lines) + 4 for _, lines in wrapped), side + 56 if side else 0)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), title, font=bold, fill=INK)
    y = 42
    for label, lines in wrapped:
        draw.text((12, y), label, font=font, fill=BLUE)
        for line in lines:
            draw.text((12 + label_width, y), line, font=font, fill=INK)
            y += 19
        y += 4
    if picture is not None:
        small = picture.copy()
        small.thumbnail((side - 12, side))
        image.paste(small, (width - side + 4, 42))
    return image


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.replace("\n", " ").split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        while draw.textlength(lines[-1], font=font) > width and len(lines[-1]) > 1:  # a hash, say
            cut = len(lines[-1]) - 1
            while cut > 1 and draw.textlength(lines[-1][:cut], font=font) > width:
                cut -= 1
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines
