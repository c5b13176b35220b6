"""Table 1: what learning a concept costs, and how much of the rich prompt's effect each way reaches for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from ..demo.job import Studio
from ..errors import ConceptSteerError
from ..statistics import mean
from .curves import Unit, curve, effect
from .learning_report import figures_of, write_report
from .methods import METHODS, Scale
from .parts import Parts
from .studio import hits
from .tasks import TASKS, Task

Say = Callable[[str], None]
TUNED_ON = ("woman", "smiling")  # what a person is, and what sits at a place
TUNING = 99  # the seed that rates are chosen with: never among the measured ones


def run(
    studio: Studio,
    tasks: Sequence[Task],
    methods: Sequence[str],
    *,
    seeds: int,
    scale: Scale,
    out: Path,
    command: str,
    say: Say = print,
) -> list[Path]:
    """Measure every (concept, method, seed) that `out` does not hold yet; then learning.json, .md and -effect.png.

    Errors: ConceptSteerError for unknown methods, or results of other settings in `out`.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConceptSteerError(f"The method {unknown[0]!r} is not known here; known are {', '.join(METHODS)}.")
    settings = {"model": studio.denoiser.checkpoint_hash, **asdict(scale)}
    parts = Parts(out / "learning-parts" / scale.name, settings)
    rates = {name: chosen_rate(studio, name, scale, parts, say) for name in methods}
    results: dict[tuple[str, str], list[Unit]] = {}
    spent: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task, seed in product(tasks, range(seeds)):
        of_task = {"task": task.fingerprint}
        reference = parts.get(
            f"{task.name}-reference-{seed}",
            lambda: _reference(studio, task, seed, scale),  # noqa: B023
            **of_task,
        )
        shares = ", ".join(f"{key} prompt {mean(reference[key]):.0%}" for key in ("base", "rich"))
        say(f"{task.name}, seed {seed}: {shares}")
        for name in methods:
            result = parts.get(
                f"{task.name}-{name}-{seed}",
                lambda: measure(studio, task, name, seed, rates[name], scale),  # noqa: B023
                rate=rates[name],
                **of_task,
            )
            units = units_of(result, reference, scale.roles)
            results.setdefault((task.name, name), []).extend(units)
            spent.setdefault((task.name, name), []).append(result)
            rows, took = units[0].rows[-1], result["seconds"][-1]
            say(f"  {name}: effect {curve(units).final:.2f} for {rows:.0f} rows, {took:.1f} s")
    figures = figures_of(results, spent, command)
    return write_report(out, figures, results, list(tasks), list(methods), rates, scale, seeds, studio.name)


def _learning_seed(seed: int) -> int:
    return 10_000 * (seed + 1)  # far apart: learning counts its own pictures upwards from here


def _judging_seeds(seed: int, count: int) -> list[int]:
    return [5_000_000 + 1_000 * seed + i for i in range(count)]


def _reference(studio: Studio, task: Task, seed: int, scale: Scale) -> dict[str, Any]:
    """The unseen roles without any vector, under the neutral and under the rich prompt."""
    tests, seeds = task.tests[: scale.roles], _judging_seeds(seed, scale.judged)
    base, rich = (hits(studio, task, [test[i] for test in tests], seeds, scale, None) for i in (0, 1))
    return {"base": base, "rich": rich}


def measure(studio: Studio, task: Task, method: str, seed: int, rate: float, scale: Scale) -> dict[str, Any]:
    """One run of learning, judged at its checks: forward, backward, seconds and hits by check."""
    prompts = [neutral for neutral, _ in task.tests[: scale.roles]]
    return _measure(studio, task, method, seed, rate, scale, prompts)


def _measure(
    studio: Studio, task: Task, method: str, seed: int, rate: float, scale: Scale, prompts: Sequence[str]
) -> dict[str, Any]:
    snapshots = METHODS[method].run(studio.denoiser, task, _learning_seed(seed), rate, scale)
    seeds = _judging_seeds(seed, scale.judged)
    return {
        "rate": rate,
        "forward": [snapshot.forward for snapshot in snapshots],
        "backward": [snapshot.backward for snapshot in snapshots],
        "rows": [snapshot.rows for snapshot in snapshots],
        "seconds": [snapshot.seconds for snapshot in snapshots],
        "hits": [hits(studio, task, prompts, seeds, scale, snapshot.learned) for snapshot in snapshots],
    }


def units_of(result: dict[str, Any], reference: dict[str, Any], roles: int) -> list[Unit]:
    """One unit a role: the pictures are stored role by role."""
    each = len(reference["base"]) // roles
    found = []
    for role in range(roles):
        part = slice(role * each, (role + 1) * each)
        by_check = tuple(tuple(check[part]) for check in result["hits"])
        base, rich = tuple(reference["base"][part]), tuple(reference["rich"][part])
        found.append(Unit(tuple(result["rows"]), by_check, base, rich))
    return found


def chosen_rate(studio: Studio, method: str, scale: Scale, parts: Parts, say: Say) -> float:
    """The rate of the method's grid with the largest final effect, among equals with the largest mean of its checks.

    Chosen on two concepts with a seed that is not measured, judged on the very prompts that were learned on.
    """
    grid = METHODS[method].rates
    if not scale.tune or not grid:
        return METHODS[method].rate
    by_concept = [_tried(studio, method, TASKS[name], scale, parts) for name in TUNED_ON]
    effects = {  # a run that ended early has fewer checks
        rate: [mean([of(found[rate]) for found in by_concept]) for of in (mean, lambda checks: checks[-1])]
        for rate in grid
    }
    chosen = best_rate(effects)
    tried = ", ".join(f"{rate:g}: {values[-1]:.2f}" for rate, values in effects.items())
    say(f"{method}: rate {chosen:g} (final effect by rate: {tried})")
    return chosen


def _tried(studio: Studio, method: str, task: Task, scale: Scale, parts: Parts) -> dict[float, list[float]]:
    """Rate -> effect at each check."""
    pairs = task.pairs[: scale.roles]
    seeds = _judging_seeds(TUNING, scale.judged)

    def references() -> dict[str, Any]:
        base, rich = (hits(studio, task, [pair[i] for pair in pairs], seeds, scale, None) for i in (0, 1))
        return {"base": base, "rich": rich}

    reference = parts.get(f"tuning-{task.name}-reference", references, task=task.fingerprint)
    base, rich = mean(reference["base"]), mean(reference["rich"])
    effects: dict[float, list[float]] = {}
    for rate in METHODS[method].rates:
        result = parts.get(
            f"tuning-{task.name}-{method}-{rate:g}",
            lambda: _measure(studio, task, method, TUNING, rate, scale, [neutral for neutral, _ in pairs]),  # noqa: B023
            task=task.fingerprint,
        )
        effects[rate] = [effect(mean(check), base, rich) for check in result["hits"]]
    return effects


def best_rate(effects: dict[float, list[float]]) -> float:
    """By final effect, then by the mean over the checks; the smaller rate when both are equal."""

    def worth(rate: float) -> tuple[float, float, float]:
        values = [value if math.isfinite(value) else -math.inf for value in effects[rate]]
        return values[-1], mean(values), -rate

    return max(effects, key=worth)
