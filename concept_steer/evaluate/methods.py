"""Every way to get a concept under one roof: learn it, and keep what it was at a few costs on the way."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ..demo.job import Studio
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..learn.difference import learn_difference
from ..learn.score import learn_score
from ..learn.self_discovery import learn_self_discovery
from ..steering import Steer
from ..vector import ConceptVector
from .tasks import Task

SLIDER_FILE = Path(__file__).parents[2] / "benchmarks" / "lora_slider.py"
RANK = 4
Learned = ConceptVector | dict[str, Tensor]  # a vector, or the weights of a LoRA


@dataclass(frozen=True)
class Scale:
    """How much is spent. pictures .. epochs: of self_discovery (published: 1000, 30, 20 at batch 8); score_* and
    short_*: of `learn_score`; slider_*: steps, batch and steps of a drawn picture (published: 1000, 1, 50); checks:
    points of a curve; judged: pictures a role and check."""

    name: str
    pictures: int = 128
    picture_steps: int = 30
    epochs: int = 20
    score_steps: int = 50
    trajectories: int = 32
    short_steps: int = 20
    short_trajectories: int = 8
    slider_steps: int = 200
    slider_batch: int = 4
    slider_picture_steps: int = 12
    checks: int = 6
    roles: int = 4
    judged: int = 8
    sample_steps: int = 12
    guidance: float = 4.0
    tune: bool = True


SCALES = {
    scale.name: scale
    for scale in (
        Scale("full"),
        Scale("quick", pictures=64, slider_steps=100, checks=4, judged=4),
        Scale(
            "tiny", 2, 2, 4, score_steps=4, trajectories=4, short_steps=2, short_trajectories=4, slider_steps=2,
            slider_batch=2, slider_picture_steps=3, checks=2, roles=2, judged=2, sample_steps=3, tune=False,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """What had been learned when so much was spent.

    forward: rows of the whole UNet. backward: rows back through its decoder half; as this is half of the UNet and going
    back costs twice as much as going forward, each counts as one forward row, and a row back through the whole UNet
    (LoRA) as two.
    """

    forward: float
    backward: float
    seconds: float
    learned: Learned

    @property
    def rows(self) -> float:
        return self.forward + self.backward


class Recorder:
    """Takes snapshots during one run of learning: at steps/2, /4, /8 ... and at the end."""

    def __init__(self, denoiser: Denoiser, checks: int) -> None:
        self.snapshots: list[Snapshot] = []
        self._denoiser, self._checks = denoiser, checks
        self._cost, self._began = denoiser.cost.snapshot(), time.perf_counter()

    def at(self, step: int, steps: int, learned: Callable[[], Learned]) -> None:
        if step in planned(steps, self._checks):
            self.take(learned())

    def take(self, learned: Learned) -> None:
        spent, seconds = self._denoiser.cost.since(self._cost), time.perf_counter() - self._began
        self.snapshots.append(Snapshot(spent.unet_rows, spent.backward_rows, seconds, learned))


def planned(steps: int, checks: int) -> set[int]:
    """The steps after which a snapshot is taken, beside the one at the end: a half, a quarter, an eighth ..."""
    return {steps >> k for k in range(1, checks)} - {0}


Run = Callable[[Denoiser, Task, int, float, Scale], list[Snapshot]]


def _self_discovery(guidance: float) -> Run:
    def run(denoiser: Denoiser, task: Task, seed: int, rate: float, scale: Scale) -> list[Snapshot]:
        recorder = Recorder(denoiser, scale.checks)
        result = learn_self_discovery(
            denoiser,
            task.pairs,
            pictures=scale.pictures,
            picture_steps=scale.picture_steps,
            guidance=guidance,
            epochs=scale.epochs,
            rate=rate,
            seed=seed,
            title=task.name,
            progress=lambda step, steps, loss, vector: recorder.at(step, steps, lambda: vector),
        )
        recorder.take(result.vector)
        return recorder.snapshots

    return run


def _score(short: bool = False, **options: Any) -> Run:
    def run(denoiser: Denoiser, task: Task, seed: int, rate: float, scale: Scale) -> list[Snapshot]:
        recorder = Recorder(denoiser, scale.checks)
        result = learn_score(
            denoiser,
            task.pairs,
            steps=scale.short_steps if short else scale.score_steps,
            trajectories=scale.short_trajectories if short else scale.trajectories,
            batch=8 if short else 16,
            **options,
            rate=rate,
            seed=seed,
            title=task.name,
            progress=lambda step, steps, loss, vector: recorder.at(step, steps, lambda: vector),
        )
        recorder.take(result.vector)
        return recorder.snapshots

    return run


def _difference(denoiser: Denoiser, task: Task, seed: int, rate: float, scale: Scale) -> list[Snapshot]:
    """Not a descent: its curve is over the number of seeds a pair, each point a run of its own; it has no rate."""
    found = []
    for seeds in (1, 2, 4, 8)[-min(scale.checks, 4) :]:
        recorder = Recorder(denoiser, scale.checks)
        recorder.take(learn_difference(denoiser, task.pairs, seeds=seeds, seed=seed, title=task.name).vector)
        found += recorder.snapshots
    return found


def _slider(denoiser: Denoiser, task: Task, seed: int, rate: float, scale: Scale) -> list[Snapshot]:
    recorder = Recorder(denoiser, scale.checks)
    triples = [(*pair, opposite) for pair, opposite in zip(task.pairs, task.opposites, strict=True)]
    weights = slider_module().learn_slider(
        denoiser,
        triples,
        steps=scale.slider_steps,
        batch=scale.slider_batch,
        picture_steps=scale.slider_picture_steps,
        rate=rate,
        rank=RANK,
        seed=seed,
        progress=lambda step, steps, loss, weights: recorder.at(step, steps, weights),
    )
    recorder.take(weights)
    return recorder.snapshots


@lru_cache(maxsize=1)
def slider_module() -> ModuleType:
    """benchmarks/lora_slider.py, which is no part of the package. Errors: ConceptSteerError outside a checkout."""
    spec = importlib.util.spec_from_file_location("concept_steer_lora_slider", SLIDER_FILE)
    if spec is None or spec.loader is None or not SLIDER_FILE.is_file():
        raise ConceptSteerError(
            f"The method lora_slider needs {SLIDER_FILE.name} of the repository's benchmarks folder: run it from a "
            "checkout (pip install -e .), or leave it out with --methods."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Method:
    """rates: the grid to choose from, the published or default one in `rate`; none without training."""

    run: Run
    rates: tuple[float, ...]
    rate: float
    about: str


METHODS = {
    "self_discovery": Method(
        _self_discovery(7.5), (0.01, 0.03, 0.1), 0.1, "the published recipe, pictures made at CFG 7.5"
    ),
    "self_discovery_cfg1": Method(_self_discovery(1.0), (0.01, 0.03, 0.1), 0.1, "the same with pictures at CFG 1"),
    "difference": Method(_difference, (), 0.0, "difference of means, over 1, 2, 4 and 8 seeds a pair"),
    "score": Method(_score(), (0.03, 0.1, 0.3), 0.1, "the default: a map where one value per channel explains little"),
    "score_short": Method(_score(short=True), (0.03, 0.1, 0.3), 0.1, "the same with fewer steps and trajectories"),
    "score_channels": Method(
        _score(map_below=0.0), (0.03, 0.1, 0.3), 0.1, "one value per channel, whatever it explains"
    ),
    "score_map": Method(_score(spatial=True), (0.03, 0.1, 0.3), 0.1, "a map (C, H, W) at once"),
    "lora_slider": Method(_slider, (2e-4, 1e-3, 5e-3), 2e-4, "Concept Slider: LoRA of rank 4, eta 4"),
}


def applied(studio: Studio, learned: Learned | None) -> tuple[AbstractContextManager[Any], list[Steer]]:
    """What has to be in force while pictures are drawn: a context (for a LoRA) and steers (for a vector)."""
    if learned is None:
        return nullcontext(), []
    if isinstance(learned, ConceptVector):
        return nullcontext(), [Steer(learned)]
    return slider_module().adapted(studio.denoiser, RANK, 0, learned), []
