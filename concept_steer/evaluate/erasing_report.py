"""The table of Geom-Erasing: erasing.json, erasing.md and a sheet of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import pictures
from ..statistics import correlation, frechet, wilson
from .erasing import LEARNED, SHARE, WAYS, Measure, reference
from .erasing_ablation import Row
from .erasing_data import CONCEPTS
from .fairness_drawing import Block, read_block
from .figures import Figure, markdown, pivot, write
from .safety_drawing import NONE, load

RESAMPLES = 20
SHOWN = 8


def report(measure: Measure, command: str, about: Mapping[str, str], ablation: Sequence[Row] = ()) -> list[Path]:
    """Write geom_erasing.json, .md and .png files into the output folder; the paths."""
    blocks = {name: load(measure.job, name) for name in measure.ways}
    figures = []
    real = reference(measure)
    for name, block in blocks.items():
        figures += _of_way(measure, name, block, real, command)
    figures += _words(blocks, command)
    figures += [one for row in ablation for one in row.figures(command)]
    whole = [one for one in figures if "set" not in one.extra]
    sections = [
        ("How it was measured", _about(measure, command, about)),
        ("Every way", pivot(whole, _columns(), label="way")),
        ("The same by the localiser", pivot(whole, _columns("located_"), label="way")),
        ("Do the words alone control it", _controlled(figures)),
    ]
    if ablation:
        sections.append(("Ablation and fine-tuning", _ablation(ablation)))
    sections.append(("What the ways are", markdown(["way", ""], [[name, WAYS[name]] for name in measure.ways])))
    sections.append(("What training said", _training(measure)))
    plots = {"pictures": _sheet(measure, blocks)} if NONE in blocks else {}
    return write(measure.out, "geom_erasing", figures, title="Geom-Erasing, measured", sections=sections, plots=plots)


def _columns(prefix: str = "") -> dict[str, str]:
    shares = {f"{prefix}icr_{concept}": concept for concept in CONCEPTS}
    rest = {
        "icr_any": "any",
        "frechet_distance": "Fréchet distance",
        "pixel_distance": "pixel distance to none",
        "role_kept": "role kept where no mark was",
        "unet_rows": "UNet rows a step",
    }
    return {**shares, **({} if prefix else rest)}


def _of_way(measure: Measure, name: str, block: Block, real: Tensor, command: str) -> list[Figure]:
    found = []
    count = len(block["flagged"])
    for concept in CONCEPTS:
        for prefix, key in (("", concept), ("located_", f"located_{concept}")):
            found.append(_share(name, f"{prefix}icr_{concept}", block[key], command))
    found.append(_share(name, "icr_any", block["flagged"], command))
    features = torch.from_numpy(block["features"].astype(np.float32))
    ends = _spread(features, real)
    found.append(Figure(name, "frechet_distance", frechet(features, real), *ends, count, command))
    rows = float(block["rows"].mean())
    found.append(Figure(name, "unet_rows", rows, None, None, count, command))
    if name != NONE:
        before = load(measure.job, NONE)
        clean = ~before["flagged"]
        distance = block["pixel_distance"][clean]
        half = 1.96 * float(distance.std()) / max(1, len(distance)) ** 0.5
        middle = float(distance.mean())
        found.append(Figure(name, "pixel_distance", middle, middle - half, middle + half, len(distance), command))
        found.append(_share(name, "role_kept", (block["role"] == before["role"])[clean], command))
    return found


def _spread(features: Tensor, real: Tensor) -> tuple[float, float]:
    """95 % of the distance, by resampling the drawn pictures, around the distance itself (resampling adds to it)."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(RESAMPLES):
        values.append(frechet(features[torch.randint(len(features), (len(features),), generator=generator)], real))
    spread = 1.96 * float(torch.tensor(values).std())
    middle = frechet(features, real)
    return middle - spread, middle + spread


def _share(name: str, metric: str, hits: np.ndarray, command: str, **extra: str) -> Figure:
    number = int(hits.sum())
    return Figure(name, metric, number / len(hits), *wilson(number, len(hits)), len(hits), command, extra)


def _words(blocks: Mapping[str, Block], command: str) -> list[Figure]:
    """Correlation of having the word in the prompt with the mark in the picture, over the same prompts and seeds."""
    if "named" not in blocks:
        return []
    found = []
    for concept in CONCEPTS:
        hits = [*blocks[NONE][concept].tolist(), *blocks["named"][concept].tolist()]
        word = [0.0] * len(blocks[NONE][concept]) + [1.0] * len(blocks["named"][concept])
        value = correlation(word, [float(hit) for hit in hits])
        half = 1.96 / len(hits) ** 0.5
        found.append(Figure("named", f"correlation_{concept}", value, value - half, value + half, len(hits), command))
    return found


def _controlled(figures: Sequence[Figure]) -> str:
    mine = {one.metric.removeprefix("correlation_"): one.text() for one in figures if "correlation" in one.metric}
    if not mine:
        return "Not measured here."
    return markdown(["mark", "correlation of the word in the prompt with the mark in the picture"], mine.items())


def _ablation(rows: Sequence[Row]) -> str:
    head = ["set", "what", *CONCEPTS, "any", "n"]
    return markdown(head, [[row.group, row.name, *row.cells(CONCEPTS), str(row.count)] for row in rows])


def _training(measure: Measure) -> str:
    lines = []
    for path in sorted((measure.out / LEARNED).glob("*.json")):
        words = json.loads(path.read_text(encoding="utf-8"))["result"]["words"]
        lines += [f"**{path.stem}**", "", *(line + "  " for line in words.splitlines()), ""]
    return "\n".join(lines) or "Nothing was trained."


def _about(measure: Measure, command: str, about: Mapping[str, str]) -> str:
    told = "; ".join(f"{key}: {value}" for key, value in about.items())
    marks = (
        f"one of the marks {', '.join(measure.marks)}, where the embedded localiser sees them; they are erased "
        f"together, as {measure.concept!r}. "
        if len(measure.marks) > 1
        else f"the mark {measure.concept!r}, where the embedded localiser sees it; the others are there to compare. "
    )
    return (
        f"{told}. {measure.count} captions of clean pictures that no training saw, one seed each, the same for every "
        f"way; {measure.steps} DDIM steps, guidance {measure.guidance:g} (stronger guidance paints fewer marks). ICR: "
        "share of the pictures in which the judges see the mark; intervals are 95 % (Wilson). Fréchet distance: of the "
        "judges' features (480) to the clean pictures themselves, seen through the VAE; its interval is of the drawn "
        f"pictures. Learned on {measure.effort.learned} other pictures, {SHARE:.0%} of which carry {marks}"
        f"\n\nMeasured again by `{command}`."
    )


def _sheet(measure: Measure, blocks: Mapping[str, Block]) -> Image.Image:
    """Pictures that carry a mark without any of it, by every way that keeps its pixels: drawn anew would cost more."""
    first = [number for number in range(len(measure.job.blocks))]
    tiles: list[Image.Image] = []
    under: list[str] = []
    for number in first:
        block = read_block(measure.job.path(NONE, number))
        for row in np.nonzero(block["flagged"])[0]:
            marks = ", ".join(concept for concept in CONCEPTS if block[concept][row])
            tiles.append(Image.fromarray(block["pixels"][row].transpose(1, 2, 0)))
            under.append(f"{measure.rows[int(block['place'][row])].prompt}: {marks}")
        if len(tiles) >= 3 * SHOWN:
            break
    rows = [tiles[i : i + SHOWN] for i in range(0, min(len(tiles), 3 * SHOWN), SHOWN)]
    captions = [under[i : i + SHOWN] for i in range(0, min(len(tiles), 3 * SHOWN), SHOWN)]
    return pictures.grid(rows or [[Image.new("RGB", (8, 8))]], captions=captions, title="What is painted unasked")
