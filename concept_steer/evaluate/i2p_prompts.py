"""Prompt sets in the layouts of the public I2P csv (Schramowski et al. 2211.05105, sec. 4), read strictly.

Two layouts are in use: the original one (`sd_seed`, `sd_guidance_scale`, no number) and the one of later work
(`case_number`, `evaluation_seed`, `evaluation_guidance`). What else a file holds is not looked at.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ConceptSteerError

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
LAYOUTS = (("evaluation_seed", "evaluation_guidance"), ("sd_seed", "sd_guidance_scale"))
NUMBER = "case_number"
DATA = Path(__file__).parent / "data"
SUGGESTIVE, BENIGN = DATA / "demo_suggestive.csv", DATA / "demo_benign.csv"


@dataclass(frozen=True)
class PromptRow:
    """One prompt: its number in the file, I2P categories (none for harmless prompts), seed and guidance scale."""

    number: int
    prompt: str
    categories: tuple[str, ...]
    seed: int
    guidance: float


def read_prompts(path: Path) -> list[PromptRow]:
    """The rows of a csv in one of the two layouts, in the file's order.

    Errors: ConceptSteerError, which names the file, the line and the column.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptSteerError(f"{path} cannot be read as a csv in UTF-8: {error}") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head = next(reader, [])
        seed, guidance = _layout(path, head)
        rows: list[PromptRow] = []
        for cells in reader:
            if cells:
                rows.append(_row(f"{path}, line {reader.line_num}", head, cells, seed, guidance, len(rows)))
    except csv.Error as error:
        raise ConceptSteerError(f"{path}, line {reader.line_num}, is not csv: {error}.") from error
    if not rows:
        raise ConceptSteerError(f"{path} names its columns but holds no prompts.")
    numbers = [row.number for row in rows]
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ConceptSteerError(f"{path}: the {NUMBER} {twice} comes twice; every prompt needs its own.")
    return rows


def digest(rows: Sequence[PromptRow]) -> str:
    """Of all that decides about the pictures: what was drawn for other rows is not taken for these."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()[:16]


def by_category(rows: Sequence[PromptRow]) -> Mapping[str, list[int]]:
    """I2P category -> places in `rows`; a prompt counts in each of its categories. Categories without rows are out."""
    found = {name: [place for place, row in enumerate(rows) if name in row.categories] for name in CATEGORIES}
    return {name: places for name, places in found.items() if places}


def _layout(path: Path, head: list[str]) -> tuple[str, str]:
    """The names of the columns for seed and guidance."""
    twice = [name for name in head if name and head.count(name) > 1]
    if twice:
        raise ConceptSteerError(f"{path} has the column {twice[0]!r} more than once.")
    for seed, guidance in LAYOUTS:
        if {"prompt", "categories", seed, guidance} <= set(head):
            return seed, guidance
    ways = " or ".join(f"{seed} and {guidance}" for seed, guidance in LAYOUTS)
    raise ConceptSteerError(
        f"{path} is not laid out as I2P: it needs the columns prompt, categories, and {ways}; found "
        f"{', '.join(head) or 'nothing'}."
    )


def _row(where: str, head: list[str], cells: list[str], seed: str, guidance: str, place: int) -> PromptRow:
    if len(cells) != len(head):
        raise ConceptSteerError(f"{where}: {len(cells)} cells, but the first line names {len(head)} columns.")
    values = dict(zip(head, cells, strict=True))
    prompt = values["prompt"].strip()
    if not prompt:
        raise ConceptSteerError(f"{where}: the prompt is empty.")
    categories = tuple(dict.fromkeys(name.strip() for name in values["categories"].split(",") if name.strip()))
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown:
        raise ConceptSteerError(f"{where}: {unknown[0]!r} is no I2P category; known are {', '.join(CATEGORIES)}.")
    number = _whole(where, NUMBER, values[NUMBER]) if NUMBER in values else place
    scale = _number(where, guidance, values[guidance])
    if scale < 0:
        raise ConceptSteerError(f"{where}: the {guidance} is {scale:g}, but a guidance scale is at least 0.")
    return PromptRow(number, prompt, categories, _whole(where, seed, values[seed]), scale)


def _number(where: str, column: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConceptSteerError(f"{where}: the {column} is {text!r}, expected a number.")
    return found


def _whole(where: str, column: str, text: str) -> int:
    """Also "7.0", which a table with gaps makes of 7; exact for seeds above 2**53, which no float holds."""
    try:
        found = int(text)
    except ValueError:
        number = _number(where, column, text)
        found = int(number) if number.is_integer() and abs(number) < 2**53 else -1
    if not 0 <= found < 2**64:
        raise ConceptSteerError(f"{where}: the {column} is {text!r}, expected a whole number from 0 to 2**64 - 1.")
    return found
