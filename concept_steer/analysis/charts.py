"""Pictures of an analysis, each readable without colour: leans with intervals, a heat map, a labelled map."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from ..pictures import FRAME, INK, PAPER, lettering
from ..plots import BLUE, ORANGE
from .associations import Associations
from .defaults import Change, Default

ROW, SMALL = 22, 12
PALE = (120, 122, 130)
GROUP_COLOURS = (BLUE, ORANGE, (0, 120, 90), (170, 50, 120), (110, 90, 20), (90, 90, 96), (40, 140, 190), (190, 60, 40))


def lean_chart(found: Sequence[Default], title: str, width: int = 760) -> Image.Image:
    """One attribute: a row a role, from the first value (left) to the last (right), with 95 % intervals over seeds.

    A filled dot is told from an even share, a ring is not.
    """
    ordered = sorted(found, key=lambda one: one.lean[0])
    rows = [(one.role, one.lean, one.clear, None) for one in ordered]
    return _leans(rows, found[0].values, title, width)


def change_chart(changes: Sequence[Change], title: str, width: int = 760) -> Image.Image:
    """As `lean_chart`, with a grey mark where each role was before."""
    ordered = sorted(changes, key=lambda one: one.before.lean[0])
    rows = [(one.role, one.after.lean, one.after.clear, one.before.lean[0]) for one in ordered]
    return _leans(rows, changes[0].before.values, title, width)


def _leans(rows: Sequence[tuple], values: Sequence[str], title: str, width: int) -> Image.Image:
    font, bold = lettering(13), lettering(16)
    image = Image.new("RGB", (width, 78 + ROW * len(rows) + 12), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), title, font=bold, fill=INK)
    left, right, top = 220, width - 40, 62
    reach = max(1.0, *(abs(end) for _, lean, _, _ in rows for end in lean))

    def place(lean: float) -> float:
        return left + (lean + reach) / (2 * reach) * (right - left)

    bottom = top + ROW * len(rows)
    for mark in (-1.0, 0.0, 1.0):
        draw.line([(place(mark), top - 4), (place(mark), bottom)], fill=INK if mark == 0 else FRAME)
    draw.text((place(-1), top - 8), f"{values[0]}", font=font, fill=ORANGE, anchor="mb")
    draw.text((place(0), top - 8), "even", font=font, fill=INK, anchor="mb")
    draw.text((place(1), top - 8), f"{values[-1]}", font=font, fill=BLUE, anchor="mb")
    for number, (name, (lean, low, high), clear, before) in enumerate(rows):
        y = top + ROW * number + ROW // 2
        draw.text((left - 10, y), _short(draw, name, font, left - 20), font=font, fill=INK, anchor="rm")
        colour = ORANGE if lean < 0 else BLUE
        if before is not None:
            draw.line([(place(before), y - 6), (place(before), y + 6)], fill=PALE, width=3)
        draw.line([(place(low), y), (place(high), y)], fill=colour if clear else PALE, width=2)
        dot = [place(lean) - 5, y - 5, place(lean) + 5, y + 5]
        draw.ellipse(dot, fill=colour if clear else PAPER, outline=colour if clear else PALE, width=2)
    return image


def heat_map(table: Associations, title: str, cell: int = 34) -> Image.Image:
    """Cosines as colours and, where they are told from 0, as hundredths in the cells."""
    font, small, bold = lettering(13), lettering(SMALL), lettering(16)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 20 + int(max(measure.textlength(name, font=font) for name in table.rows))
    top = 52 + int(max(measure.textlength(name, font=font) for name in table.columns))
    wide = left + cell * len(table.columns) + 16
    image = Image.new(
        "RGB", (max(wide, 20 + int(measure.textlength(title, font=bold))), top + ROW * len(table.rows) + 12), PAPER
    )
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), title, font=bold, fill=INK)
    most = max(1e-9, float(table.values.abs().max()))
    for x, name in enumerate(table.columns):
        _upright(image, name, (left + cell * x + cell // 2, top - 6))
    for y, name in enumerate(table.rows):
        draw.text((left - 8, top + ROW * y + ROW // 2), name, font=font, fill=INK, anchor="rm")
        for x in range(len(table.columns)):
            value = float(table.values[y, x])
            box = [left + cell * x, top + ROW * y, left + cell * (x + 1) - 2, top + ROW * (y + 1) - 2]
            share = abs(value) / most
            draw.rectangle(box, fill=_between(PAPER, BLUE if value > 0 else ORANGE, 0.75 * share))
            if float(table.low[y, x]) > 0 or float(table.high[y, x]) < 0:
                middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                fill = PAPER if share > 0.75 else INK
                draw.text(middle, f"{100 * value:+.0f}", font=small, fill=fill, anchor="mm")
    return image


def map_picture(
    names: Sequence[str], places: Tensor, groups: Sequence[int], title: str, size: tuple[int, int] = (900, 640)
) -> Image.Image:
    """Labelled points (N, 2); groups: a number each, shown as colour and as a number in the dot."""
    font, small, bold = lettering(12), lettering(10), lettering(16)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), title, font=bold, fill=INK)
    scaled = on_page(places, size)
    for name, (x, y), group, dy in zip(names, scaled, groups, label_shifts(names, scaled), strict=True):
        colour = GROUP_COLOURS[group % len(GROUP_COLOURS)]
        draw.ellipse([x - 7, y - 7, x + 7, y + 7], fill=colour)
        draw.text((x, y), str(group + 1), font=small, fill=PAPER, anchor="mm")
        draw.text((x + 10, y + dy), name, font=font, fill=INK, anchor="lm")
    return image


def on_page(places: Tensor, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Coordinates (N, 2) as pixels of a page with room for a title and for labels at the right."""
    low, high = places.min(0).values, places.max(0).values
    unit = (places - low) / (high - low).clamp_min(1e-12)
    return [(24 + x * (size[0] - 190), size[1] - 24 - y * (size[1] - 80)) for x, y in unit.tolist()]


def label_shifts(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[int]:
    """How far up or down each label steps aside, in pixels, so that labels cover each other little."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for name, (x, y) in zip(names, places, strict=True):
        wide = 10 + 6.5 * len(name)
        for shift in (0, -12, 12, -24, 24, -36, 36):
            if not any(abs(y + shift - b) < 12 and x < a + w and a < x + wide for a, b, w in taken):
                break
        taken.append((x, y + shift, wide))
        found.append(shift)
    return found


def _upright(image: Image.Image, text: str, foot: tuple[int, int]) -> None:
    """Text that is read from below, ending at `foot`."""
    font = lettering(13)
    box = font.getbbox(text)
    tile = Image.new("RGB", (int(box[2]) + 2, 18), PAPER)
    ImageDraw.Draw(tile).text((0, 9), text, font=font, fill=INK, anchor="lm")
    turned = tile.rotate(90, expand=True)
    image.paste(turned, (foot[0] - 9, foot[1] - turned.height))


def _short(draw: ImageDraw.ImageDraw, text: str, font, room: int) -> str:
    while draw.textlength(text, font=font) > room:
        text = text[:-2].rstrip() + "…"
    return text


def _between(one: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
