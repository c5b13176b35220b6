"""The figures of table 1 and their pages: from judged runs to learning.json, learning.md and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..pictures import stacked
from ..plots import curves as plot_curves
from ..statistics import bootstrap, mean
from .curves import Curve, Unit, curve, final_with_interval, rows_with_interval
from .figures import Figure, Section, markdown, pivot, write
from .methods import METHODS, Scale
from .tasks import Task

Results = Mapping[tuple[str, str], list[Unit]]  # by (concept, method)
Spent = Mapping[tuple[str, str], list[dict[str, Any]]]  # one result a seed
REFERENCES = ("self_discovery", "self_discovery_cfg1")
ALL = "all"  # the "concept" of figures over all concepts
COLOURS = ((38, 98, 204), (110, 170, 240), (40, 150, 80), (222, 110, 20), (190, 60, 60), (130, 80, 180), (70, 70, 74))
COLUMNS = {
    "rows_to_reference_effect": "rows to self_discovery's effect",
    "rows_to_90_percent": "rows to 90 % of the prompt's effect",
    "final_effect": "final effect (prompt = 1)",
    "rows_total": "rows in total",
    "rows_forward": "forward",
    "rows_backward": "backward",
    "seconds_to_learn": "seconds",
}


def reference_effect(results: Results, concept: str) -> float | None:
    """self_discovery's final effect, the better of its two guidances; None when it was not measured or has none."""
    finals = [curve(results[concept, name]).final for name in REFERENCES if (concept, name) in results]
    best = max((value for value in finals if math.isfinite(value)), default=0.0)
    return best if best > 0 else None


def figures_of(results: Results, spent: Spent, command: str) -> list[Figure]:
    """All figures, first over all concepts (where there are several), then by concept and method."""
    single: list[Figure] = []
    for (concept, method), units in results.items():
        n = sum(len(unit.base) for unit in units)
        extra = {"concept": concept}

        def add(
            metric: str, value: Sequence[float | None], count: int, method: str = method, extra: Any = extra
        ) -> None:
            single.append(Figure(method, metric, value[0], value[1], value[2], count, command, extra))

        target = reference_effect(results, concept)
        none = (None, None, None)
        add("rows_to_reference_effect", none if target is None else rows_with_interval(units, target), n)
        add("rows_to_90_percent", rows_with_interval(units, 0.9), n)
        add("final_effect", final_with_interval(units), n)
        runs = spent[concept, method]
        add("seconds_to_learn", _over([run["seconds"][-1] for run in runs]), len(runs))
        for metric, key in (("rows_total", "rows"), ("rows_forward", "forward"), ("rows_backward", "backward")):
            add(metric, _over([run[key][-1] for run in runs]), len(runs))
    return _over_concepts(single, command) + single


def _over(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean over seeds with its bootstrap interval; without one for a single seed."""
    if len(values) < 2:
        return mean(values), None, None
    return mean(values), *bootstrap(values, lambda sample: mean(sample))  # type: ignore[arg-type]


def _over_concepts(single: Sequence[Figure], command: str) -> list[Figure]:
    """Effects as means, costs as geometric means; the interval by bootstrap over concepts.

    A cost that some concept does not reach has no mean: then the value is None, and low the geometric mean with the
    rows spent there in its place, which is a lower bound.
    """
    if len({figure.extra["concept"] for figure in single}) < 2:
        return []
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in single:
        groups.setdefault((figure.method, figure.metric), []).append(figure)
    found = []
    for (method, metric), group in groups.items():
        known = [figure.low if figure.value is None else figure.value for figure in group]
        values = [value for value in known if value is not None and (value > 0 or metric == "final_effect")]
        if not values:
            continue
        middle = _plain_mean if metric == "final_effect" else _geometric_mean
        n, extra = len(values), {"concept": ALL}
        if any(figure.value is None for figure in group):
            found.append(Figure(method, metric, None, middle(values), None, n, command, extra))
        else:
            found.append(Figure(method, metric, middle(values), *bootstrap(values, middle), n, command, extra))
    return found


def _plain_mean(values: Sequence[Any]) -> float:
    return mean(values)


def _geometric_mean(values: Sequence[Any]) -> float:
    return math.exp(mean([math.log(value) for value in values]))


def write_report(
    out: Path,
    figures: Sequence[Figure],
    results: Results,
    tasks: Sequence[Task],
    methods: Sequence[str],
    rates: Mapping[str, float],
    scale: Scale,
    seeds: int,
    model: str,
) -> list[Path]:
    """learning.json, learning.md and learning-effect.png in `out`; the paths."""
    sections: list[Section] = [
        ("How it was measured", _about(scale, seeds, model)),
        ("Methods", _methods(methods, rates, scale)),
    ]
    for concept in dict.fromkeys(figure.extra["concept"] for figure in figures):
        mine = [figure for figure in figures if figure.extra["concept"] == concept]
        if concept == ALL:
            sections.append(("All concepts", pivot(mine, COLUMNS) + "\n\nEffects: means. Costs: geometric means."))
            continue
        task = next(task for task in tasks if task.name == concept)
        sections.append((concept, f"{_shares(results, task, methods)}\n\n{pivot(mine, COLUMNS)}"))
    plots = {"effect": stacked([_plot(results, task, methods) for task in tasks])}
    return write(out, "learning", figures, title="What learning a concept costs", sections=sections, plots=plots)


def _shares(results: Results, task: Task, methods: Sequence[str]) -> str:
    units = results[task.name, methods[0]]
    base, rich = (mean([hit for unit in units for hit in getattr(unit, key)]) for key in ("base", "rich"))
    values = " or ".join(task.values)
    target = reference_effect(results, task.name)
    said = "not measured, or none" if target is None else f"{target:.2f}"
    return (
        f"{task.note[0].upper()}{task.note[1:]}. Judged {values}: {base:.0%} under the neutral prompts, {rich:.0%} "
        f"under the rich ones ({sum(len(unit.base) for unit in units)} pictures each). "
        f"self_discovery's final effect: {said}."
    )


def _about(scale: Scale, seeds: int, model: str) -> str:
    return f"""Model {model}, {seeds} learning seeds, at each check the first {scale.roles} unseen roles with
{scale.judged} pictures each ({scale.sample_steps} DDIM steps, guidance {scale.guidance:g}; every learning seed is
judged on pictures of its own).
**Effect** = share that the judges find with the vector, less the share without, over the same gain of the rich prompt.
**Rows** = rows of the whole UNet, forward, with the making of pictures and trajectories, plus rows backward: one back
through the decoder half counts 1 (half of the UNet, twice as dear), one back through all of it (LoRA) 2.
**Rows to an effect**: read off the mean curve between its checks, linearly, where it is reached and kept at the next
check; at the first check it is an upper bound. "Not reached in N": N rows were spent, so the cost is above N.
Intervals are 95 % by bootstrap over learning seeds and roles, with the effect to be reached held fixed.
Nothing is extrapolated: self_discovery made {scale.pictures} pictures of {scale.picture_steps} steps and {scale.epochs}
epochs (published: 1000, 30, 20), the slider took {scale.slider_steps} steps of {scale.slider_batch} (published: 1000 of
1). Seconds are wall-clock on the machine that ran it."""


def _methods(methods: Sequence[str], rates: Mapping[str, float], scale: Scale) -> str:
    rows = []
    for name in methods:
        method = METHODS[name]
        grid = ", ".join(f"{rate:g}" for rate in method.rates if scale.tune) or "none"
        rows.append([name, method.about, grid, f"{rates[name]:g}" if method.rates else "-"])
    return markdown(("method", "what it is", "rates tried", "rate"), rows)


def _plot(results: Results, task: Task, methods: Sequence[str]) -> Image.Image:
    lines = []
    for number, name in enumerate(methods):
        found: Curve = curve(results[task.name, name])
        lines.append((name, COLOURS[number % len(COLOURS)], list(zip(found.rows, found.effects, strict=True))))
    return plot_curves(
        lines,
        title=f"{task.name}: effect on unseen roles (1 = the rich prompt)",
        x_label="UNet rows, forward and backward",
        size=(1240, 340),
        log_x=True,
    )
