"""How a vector's effect follows its strength, and two vectors at once: part of table 4."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

from ..demo.job import Studio
from ..demo.judges import CLASSES, Verdict
from ..fairness.report import interpolation_curve
from ..statistics import bootstrap, mean, wilson
from ..steering import Steer
from .figures import Figure, Section, markdown
from .studio import Drawing, found, verdicts
from .tasks import Task

GROUP = "strength"
BOTH = {"none": "no vector", "first": "the first", "second": "the second", "sum": "their sum"}


def probability(task: Task, verdict: Verdict) -> Tensor:
    """(N,): the judges' probability of the task's concept."""
    index = [CLASSES[task.head].index(value) for value in task.values]
    return verdict.probabilities[task.head][:, index].sum(1)


def follow(
    studio: Studio, task: Task, steer: Steer, seeds: Sequence[int], roles: int, drawing: Drawing
) -> dict[str, Any]:
    """The judges' mean probability at strengths from -1 to 1.5 on the same pictures, and its rank correlation."""
    prompts = [test[0] for test in task.tests[:roles]]
    return interpolation_curve(
        lambda steers: probability(task, verdicts(studio, prompts, seeds, drawing, steers)), lambda p: p, steer.vector
    )


def together(
    studio: Studio, one: Task, other: Task, steers: Sequence[Steer], seeds: Sequence[int], roles: int, drawing: Drawing
) -> dict[str, Any]:
    """1 where the judges find the first concept, the second, and both: without, with either, with both vectors."""
    prompts = [test[0] for test in one.tests[:roles]]
    result: dict[str, Any] = {}
    for name, mine in zip(BOTH, ([], steers[:1], steers[1:], steers), strict=True):
        verdict = verdicts(studio, prompts, seeds, drawing, list(mine))
        result[name] = [found(one, verdict), found(other, verdict)]
    return result


def composable(tasks: Sequence[Task]) -> list[tuple[Task, Task]]:
    """Pairs of concepts of which different judges see one each, on the same pictures."""
    people = [task for task in tasks if task.head in ("gender", "tone")]
    return [(a, b) for a, b in combinations(people, 2) if a.head != b.head]


def follow_figures(task: Task, results: Sequence[dict[str, Any]], command: str) -> list[Figure]:
    """Mean probability by strength, and the rank correlation, over learning seeds."""
    figures = []
    extra = {"concept": task.name, "group": GROUP}
    for i, strength in enumerate(results[0]["strengths"]):
        values = [result["probabilities"][i] for result in results]
        figures.append(_over("probability", values, command, {**extra, "condition": f"{strength:g}"}))
    values = [result["rank_correlation"] for result in results]
    return [*figures, _over("rank_correlation", values, command, {**extra, "condition": "all"})]


def _over(metric: str, values: Sequence[float], command: str, extra: dict[str, str]) -> Figure:
    low, high = bootstrap(values, mean) if len(values) > 1 else (None, None)  # type: ignore[arg-type]
    return Figure("score", metric, mean(values), low, high, len(values), command, extra)


def together_figures(one: Task, other: Task, results: Sequence[dict[str, Any]], command: str) -> list[Figure]:
    """Shares with Wilson intervals: share_first, share_second, share_both."""
    figures = []
    for name in BOTH:
        first, second = ([hit for result in results for hit in result[name][i]] for i in (0, 1))
        both = [a * b for a, b in zip(first, second, strict=True)]
        extra = {"concept": f"{one.name} + {other.name}", "group": "together", "condition": name}
        for metric, hits in (("share_first", first), ("share_second", second), ("share_both", both)):
            figures.append(
                Figure("score", metric, mean(hits), *wilson(sum(hits), len(hits)), len(hits), command, extra)
            )
    return figures


def section_of_strengths(task: Task, figures: Sequence[Figure]) -> Section:
    mine = [f for f in figures if f.extra.get("group") == GROUP and f.extra["concept"] == task.name]
    rows = [[f.extra["condition"], f.text()] for f in mine if f.metric == "probability"]
    (rank,) = (f for f in mine if f.metric == "rank_correlation")
    text = f"The judges' mean probability. Rank correlation with the strength: {rank.text()}.\n\n"
    return f"{task.name}: by strength", text + markdown(["strength", "probability"], rows)


def section_of_pair(one: Task, other: Task, figures: Sequence[Figure]) -> Section:
    rows = []
    for name, words in BOTH.items():
        mine = [f for f in figures if f.extra["concept"] == f"{one.name} + {other.name}"]
        cells = {f.metric: f.text() for f in mine if f.extra["condition"] == name}
        rows.append([words, *(cells[key] for key in ("share_first", "share_second", "share_both"))])
    return f"{one.name} and {other.name} together", markdown(["vectors", one.name, other.name, "both"], rows)
