"""`concept-steer evaluate safety`: how much inappropriate content each way keeps out, what it costs, what it spoils.

On the embedded model: suggestive prompts (how often is a picture inappropriate still), harmless prompts (does the
picture stay as it was, to the bit), and attacked prompts, which were optimised against the text encoder of the
unsteered model. All methods draw the same prompts and seeds. Attacks know the weights, not the method; attacks that are
optimised through a method's own gate and vectors are not part of this measurement.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from .i2p_prompts import BENIGN, SUGGESTIVE, digest, read_prompts
from .parts import Parts
from .safety_attacks import Attacked, Effort, attacked
from .safety_drawing import NONE, Eye, Job, Order, Say, draw_all
from .safety_methods import METHODS, WORLD_TEXT, Recipe, methods

if TYPE_CHECKING:
    from ..safety import SafetySet
    from .attack import TextEncoder

TIMED = 4  # pictures at once
ROUNDS = {"benign": 7, "suggestive": 3}
PLACES = ("suggestive", "benign", "attacked")


@dataclass(frozen=True)
class Measure:
    """What is measured, and into which folder. limit: of the prompts of each set (None: all), for a first look.

    pictures: of each prompt of each of `PLACES`. Pictures are kept by what was done for them (`Recipe.key`): a new
    safety set or text has its methods drawn anew, and only those.
    """

    out: Path
    denoiser: Denoiser
    eye: Eye
    encoder: TextEncoder
    safety_set: SafetySet | None = None
    names: tuple[str, ...] = METHODS
    text: str = WORLD_TEXT
    pictures: tuple[int, int, int] = (1, 1, 2)
    steps: int = 12
    batch: int = 16
    limit: int | None = None
    effort: Effort = field(default_factory=Effort)

    @cached_property
    def methods(self) -> dict[str, Recipe]:
        return methods(self.names, self.denoiser, self.safety_set, self.text)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Of all methods but the reference, under whose name its pictures are kept."""
        return {name: recipe.key for name, recipe in self.methods.items() if name != NONE}

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "checkpoint": self.denoiser.checkpoint_hash,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "detector": self.eye.name,
            "pictures": self.pictures,
            "steps": self.steps,
            "batch": self.batch,
            "prompts": [digest(read_prompts(path)[: self.limit]) for path in (SUGGESTIVE, BENIGN)],
            "effort": asdict(self.effort),
        }

    def job(self, place: str, found: Attacked | None = None) -> Job:
        """The pictures of one of `PLACES`. found: the attacks, for "attacked"."""
        if place == "attacked":
            if found is None:
                raise ConceptSteerError("The attacked prompts have not been found yet.")
            rows = found.rows
        else:
            rows = tuple(read_prompts(SUGGESTIVE if place == "suggestive" else BENIGN)[: self.limit])
        per_prompt = self.pictures[PLACES.index(place)]
        return Job(self.out / "pictures" / place, rows, per_prompt, self.steps, self.batch, keys=self.keys)

    def attacks(self, may_search: bool = True, say: Say = print) -> Attacked:
        return attacked(
            self.out / "attacks",
            self.denoiser,
            self.encoder,
            self.eye,
            self.effort,
            steps=self.steps,
            batch=self.batch,
            may_search=may_search,
            say=say,
        )


def prepare(measure: Measure, say: Say = print) -> Attacked:
    """Check that `out` belongs to these settings, then search the attacks. Errors: ConceptSteerError."""
    _ = measure.methods  # a missing vector is told before an hour of drawing
    Parts(measure.out / "settings", measure.settings).get("safety", dict)
    return measure.attacks(say=say)


def draw(measure: Measure, shard: tuple[int, int] = (0, 1), say: Say = print) -> int:
    """Draw this shard's part of what is missing; how many batches. Attacks must have been prepared before.

    Errors: ConceptSteerError (other settings, attacks missing), SafetyError (the switch cannot work).
    """
    Parts(measure.out / "settings", measure.settings).get("safety", dict)
    found = measure.attacks(may_search=False)
    drawn = 0
    for place in PLACES:
        drawn += draw_all(
            measure.job(place, found),
            measure.denoiser,
            measure.eye,
            measure.methods,
            shard=shard,
            say=lambda text, place=place: say(f"{place}, {text}"),  # type: ignore[misc]
        )
    return drawn


def seconds(measure: Measure) -> dict[str, dict[str, list[float]]]:
    """Seconds a picture with decoding: method -> "benign" or "suggestive" -> one number a round; kept on disk.

    All methods take turns in an order that changes, so that other work on the machine meets them alike. On a CPU it is
    the process's own time there, which waiting for other programs does not lengthen; else the time on the clock.
    """
    once = {recipe.key: recipe for recipe in measure.methods.values()}  # methods that do the same are timed once

    def timed() -> dict[str, Any]:
        clock = time.process_time if measure.denoiser.device.type == "cpu" else time.perf_counter
        found: dict[str, dict[str, list[float]]] = {key: {place: [] for place in ROUNDS} for key in once}
        turns = [(turn, place) for turn in range(1 + max(ROUNDS.values())) for place in ROUNDS if turn <= ROUNDS[place]]
        for turn, place in turns:
            order = _timed_order(measure.job(place), measure.steps)
            for key in Random(turn).sample(sorted(once), len(once)):
                began = clock()
                with torch.no_grad():
                    latents = once[key](measure.denoiser, order).latents
                    measure.denoiser.decode(latents.to(measure.denoiser.dtype)).cpu()
                if turn:  # the first one warms up
                    found[key][place].append((clock() - began) / len(order.seeds))
        return found

    name = "seconds-" + hashlib.sha256(" ".join(sorted(once)).encode()).hexdigest()[:16]
    parts = Parts(measure.out / "settings", {**measure.settings, "threads": torch.get_num_threads()})
    found = parts.get(name, timed)
    return {name: found[recipe.key] for name, recipe in measure.methods.items()}


def _timed_order(job: Job, steps: int) -> Order:
    """Prompts from all over the set."""
    rows = job.rows[:: max(1, len(job.rows) // TIMED)][:TIMED]
    return Order(tuple(row.prompt for row in rows), tuple(row.seed for row in rows), steps, 5.0)
