"""What each part of Geom-Erasing is worth, and whether it keeps a mark out of fine-tuning: smaller tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..geom_erasing import ErasingSettings
from ..geom_erasing.grid import Boxes
from ..statistics import wilson
from .erasing import SHARE, MarksEye, Measure, Way, trained, with_lora
from .erasing_data import CONCEPTS, Build, examples, found_boxes, jittered, overlap, spoiled
from .figures import Figure
from .parts import Parts
from .safety_drawing import Order, Say

SHORTER = 3  # than the table's training


@dataclass(frozen=True)
class Row:
    """hits: pictures with each mark, and with any ("any"), of `count`."""

    group: str
    name: str
    hits: Mapping[str, int]
    count: int

    def cells(self, concepts: Sequence[str]) -> list[str]:
        return [f"{self.hits[concept] / self.count:.3f}" for concept in (*concepts, "any")]

    def figures(self, command: str) -> list[Figure]:
        extra = {"set": self.group}
        return [
            Figure(self.name, f"icr_{mark}", hits / self.count, *wilson(hits, self.count), self.count, command, extra)
            for mark, hits in self.hits.items()
        ]


def drawn(measure: Measure, kept: Parts, group: str, name: str, way: Way, count: int) -> Row:
    """The first `count` captions of the table, drawn in one way and judged."""

    def make() -> dict[str, int]:
        eye, hits = MarksEye(), dict.fromkeys((*CONCEPTS, "any"), 0)
        for first in range(0, count, measure.batch):
            rows = measure.rows[first : min(count, first + measure.batch)]
            order = Order(tuple(r.prompt for r in rows), tuple(r.seed for r in rows), measure.steps, measure.guidance)
            latents = way(measure.denoiser, order).latents
            with torch.no_grad():
                seen = measure.denoiser.decode(latents.to(measure.denoiser.dtype)).float().cpu()
            block = eye(seen)
            for concept in CONCEPTS:
                hits[concept] += int(block[concept].sum())
            hits["any"] += int(np.asarray(block["flagged"]).sum())
        return hits

    return Row(group, name, kept.get(f"{group}-{name}", make, count=count), count)


def fine_tuning(measure: Measure, style: Build, say: Say, count: int = 256) -> list[Row]:
    """A LoRA on pictures of another style, of which some carry a mark: plain, told where, and masked."""
    e = measure.effort
    given, captions, _ = spoiled(style, 0, min(e.learned, 600), measure.marks, SHARE)
    learned = examples(measure.teacher, given, captions, found_boxes(given, measure.marks))
    kept = _parts(measure)
    rows = [drawn(measure, kept, "fine-tuning", "before", Way(), count)]
    for name in ("plain", "told", "masked"):
        settings = ErasingSettings(steps=e.lora // SHORTER, rank=e.rank, way=name)  # type: ignore[arg-type]
        tokens, state = trained(measure, f"style-{name}", settings, say, learned)
        inside = with_lora(state or {}, e.rank)
        rows.append(drawn(measure, kept, "fine-tuning", name, Way(inside=inside), count))
        if tokens is not None:
            way = Way(negative=tokens.name, embeddings=(tokens,), inside=inside)
            rows.append(drawn(measure, kept, "fine-tuning", "told, with its negative prompt", way, count))
    return rows


def parts(measure: Measure, say: Say, count: int = 256) -> list[Row]:
    """Name alone, with places, with weights; bins."""
    e, kept = measure.effort, _parts(measure)
    base = ErasingSettings(steps=e.lora // SHORTER, rank=e.rank)
    cases: dict[str, ErasingSettings] = {
        "name alone": replace(base, geometry=False, alpha=1.0),
        "and places": replace(base, alpha=1.0),
        "and weights": base,
        "2 x 2 places": replace(base, bins=2),
        "8 x 8 places": replace(base, bins=8),
    }
    rows = []
    for name, settings in cases.items():
        tokens, state = trained(measure, f"ablation-{name.replace(' ', '-')}", settings, say)
        assert tokens is not None
        negative = tokens.name if settings.geometry else tokens.concept
        way = Way(negative=negative, embeddings=(tokens,), inside=with_lora(state or {}, e.rank))
        rows.append(drawn(measure, kept, "ablation", name, way, count))
    return rows


def boxes(measure: Measure, say: Say, count: int = 256) -> list[Row]:
    """Masked training with the localiser's boxes, with boxes made worse on purpose, and with spoiled pictures left out:
    what a detector's errors cost, and what a picture with a mark is still worth."""
    e, kept, learned = measure.effort, _parts(measure), measure.learned
    settings = ErasingSettings(steps=e.lora // SHORTER, rank=e.rank, way="masked")
    whole: list[Boxes] = [[(0.0, 0.0, 1.0, 1.0)] if some else [] for some in learned.boxes]
    cases = {"localiser": list(learned.boxes), "left out": whole}
    cases |= {f"jitter-{amount:g}": jittered(learned.boxes, amount) for amount in (0.15, 0.4)}
    rows = []
    for name, mine in cases.items():
        _, state = trained(measure, f"boxes-{name.replace(' ', '-')}", settings, say, replace(learned, boxes=mine))
        told = {"localiser": "the localiser's boxes", "left out": "spoiled pictures left out"}
        spoken = told.get(name, f"boxes moved: IoU {overlap(mine, learned.boxes):.2f} with the localiser's")
        way = Way(inside=with_lora(state or {}, e.rank))
        rows.append(drawn(measure, kept, "masked", spoken, way, count))
    return rows


ABLATIONS = {"parts": parts, "boxes": boxes}


def _parts(measure: Measure) -> Parts:
    told = {
        "checkpoint": measure.denoiser.checkpoint_hash,
        "steps": measure.steps,
        "guidance": measure.guidance,
        "effort": json.loads(json.dumps(vars(measure.effort))),
        **measure.only,
    }
    return Parts(Path(measure.out) / "erasing-ablation", told)
