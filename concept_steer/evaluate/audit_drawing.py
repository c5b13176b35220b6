"""The expensive truth that the audit is held against: pictures of every role and scene, drawn and judged."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..demo import model, world
from ..demo.build_data import article
from ..demo.job import Studio
from ..demo.judges import CLASSES
from ..errors import ConceptSteerError
from ..hosts.diffusers import DiffusersDenoiser
from .fairness_drawing import read_block
from .parts import Parts
from .studio import Drawing, verdicts

BLOCK = 25  # pictures drawn in one go; what is kept when a run is stopped
FIRST_SEED = 50_000  # far from the seeds that are read and learned with
HEADS = ("gender", "tone", "inappropriate", "role")
DRAWING = Drawing(steps=12, guidance=4.0)
DTYPE = "bfloat16"  # of drawing: half the time, and shares that are the same within their intervals
Say = Callable[[str], None]


@dataclass(frozen=True)
class Observed:
    """What the judges found in `count` pictures of one prompt: how often each class of each head; seconds of drawing
    and judging, and rows of the whole UNet."""

    prompt: str
    count: int
    counts: dict[str, dict[str, int]]
    seconds: float
    unet_rows: float

    def share(self, head: str, *values: str) -> float:
        return sum(self.counts[head].get(value, 0) for value in values) / self.count

    def lean(self, attribute: str) -> float:
        """As `audit_reading.true_lean`: gender from -1, all women, to 1, all men; skin tone from light to dark."""
        if attribute == "gender":
            return 2 * self.share("gender", "man") - 1
        return sum(
            self.share("tone", tone) * (2 * i / (len(world.TONES) - 1) - 1) for i, tone in enumerate(world.TONES)
        )


def drawing_studio() -> Studio:
    """The embedded model in the numbers that pictures are drawn in."""
    studio = Studio()
    studio.denoiser = DiffusersDenoiser(model.pipeline(dtype=getattr(torch, DTYPE)))
    return studio


def role_prompts() -> dict[str, str]:
    """Role -> the prompt that names nothing else."""
    return {name: article(name) for name in world.ROLE_NAMES}


def draw_blocks(
    studio: Studio, parts: Parts, prompts: Sequence[str], pictures: int, say: Say, drawing: Drawing = DRAWING
) -> None:
    """Draw and judge what is missing, every prompt's first block before any second one: stop it at any time."""
    for block in range((pictures + BLOCK - 1) // BLOCK):
        for prompt in prompts:
            before = parts.made
            _block(studio, parts, prompt, block, drawing)
            if parts.made > before:
                say(f"{prompt}: pictures {block * BLOCK + 1} to {(block + 1) * BLOCK} of {pictures}")


def observed(parts: Parts, prompt: str) -> Observed | None:
    """All blocks of a prompt that have been drawn, together."""
    found: list[dict[str, Any]] = []
    try:
        while True:
            found.append(_block(None, parts, prompt, len(found), DRAWING))
    except LookupError:
        if not found:
            return None
    counts = {head: dict(sum((Counter(one["labels"][head]) for one in found), Counter())) for head in HEADS}
    return Observed(
        prompt,
        sum(len(one["labels"]["gender"]) for one in found),
        counts,
        sum(one["seconds"] for one in found),
        sum(one["unet_rows"] for one in found),
    )


def from_fairness(folder: Path, role: str, checkpoint: str) -> Observed | None:
    """What `evaluate fairness` drew of a role without steering, if it did: the same model, steps and guidance.

    checkpoint: the hash of the model's file.

    Errors: ConceptSteerError for other settings, or a damaged file.
    """
    settings = json.loads((folder / "settings" / "drawing.json").read_text(encoding="utf-8"))["settings"]
    wanted = {"checkpoint": checkpoint, "steps": DRAWING.steps, "guidance": DRAWING.guidance}
    for key, value in wanted.items():
        if settings[key] != value:
            raise ConceptSteerError(f"{folder} was drawn with {key} {settings[key]}, expected {value}: draw it anew.")
    blocks = [
        read_block(path) for path in sorted((folder / "blocks" / "none").glob(f"plain-{role.replace(' ', '_')}-0*.npz"))
    ]
    if not blocks:
        return None
    counts = {
        head: dict(Counter(CLASSES[head][i] for block in blocks for i in block[head].tolist()))
        for head in HEADS
        if head in blocks[0]
    }
    count = sum(len(block["pictures"]) for block in blocks)
    rows = sum(float(block["rows"]) * len(block["pictures"]) for block in blocks)
    return Observed(article(role), count, counts, math.nan, rows)


def _block(studio: Studio | None, parts: Parts, prompt: str, block: int, drawing: Drawing) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        if studio is None:
            raise LookupError(f"{prompt!r} has not been drawn yet (block {block + 1}).")
        cost, began = studio.denoiser.cost.snapshot(), time.perf_counter()
        seeds = [FIRST_SEED + block * BLOCK + i for i in range(BLOCK)]
        verdict = verdicts(studio, [prompt], seeds, drawing)
        return {
            "labels": {head: verdict.labels(head) for head in HEADS},
            "seconds": time.perf_counter() - began,
            "unet_rows": studio.denoiser.cost.since(cost).unet_rows,
        }

    return parts.get(f"drawn-{prompt}-{block}", make, prompt=prompt, block=block)
