"""Table 4: a vector where it was not learned (roles, seeds, samplers, steps, sizes, guidance), and ablations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..demo.job import Studio
from ..learn.result import LearnResult
from ..learn.score import learn_score
from ..statistics import bootstrap, mean, wilson
from ..steering import Steer
from . import composition
from .figures import Figure, Section, markdown, pivot, write
from .parts import Parts
from .studio import SAMPLERS, Drawing, found, verdicts
from .tasks import Task

Say = Callable[[str], None]
SHARES = {"share_before": "without", "share_after": "with the vector", "share_prompt": "rich prompt"}
ABLATED = {
    "explained": "explained",
    "share_after": "share on unseen roles",
    "kept": "kept as before",
    "rows_total": "rows in total",
    "seconds_to_learn": "seconds",
}


@dataclass(frozen=True)
class Condition:
    """One way of use. pairs: how many pairs the vector was learned from. offset: of the seeds drawn with."""

    group: str
    name: str
    drawing: Drawing = field(default_factory=Drawing)
    pairs: int = 4
    offset: int = 0


def conditions() -> list[Condition]:
    """All of them; the first is the one that learning is measured in elsewhere, and each other differs from it once."""
    usual = Drawing()
    return [
        Condition("usual", "12 DDIM steps, CFG 4, 128 px, four roles"),
        Condition("learned on", "one role", pairs=1),
        Condition("seeds", "another range", offset=77_000_000),
        *(Condition("sampler", name, replace(usual, sampler=name)) for name in SAMPLERS),
        *(Condition("steps", f"{steps} steps", replace(usual, steps=steps)) for steps in (8, 20, 40)),
        *(Condition("size", f"{8 * size} px", replace(usual, size=size)) for size in (12, 20)),
        *(Condition("guidance", f"CFG {scale:g}", replace(usual, guidance=scale)) for scale in (1.5, 7.5)),
    ]


ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "25 steps": {"steps": 25},
    "200 steps": {"steps": 200},
    "8 trajectories": {"trajectories": 8},
    "64 trajectories": {"trajectories": 64},
    "preservation 0": {"preservation": 0.0},
    "preservation 1": {"preservation": 1.0},
    "a map (C, H, W)": {"spatial": True},
    "4 groups of timesteps": {"timestep_groups": 4},
    "one pair": {"pairs": 1},
    "start at zero": {"start": "zero"},
    "not lengthened": {"calibrate": False},
}
QUICK = {"steps": 20, "trajectories": 8}
QUICK_ABLATIONS = ("default", "preservation 0", "a map (C, H, W)", "one pair")


def run(
    studio: Studio,
    tasks: Sequence[Task],
    *,
    seeds: int,
    roles: int,
    judged: int,
    quick: bool,
    out: Path,
    command: str,
    say: Say = print,
) -> list[Path]:
    """Measure what `out` does not hold yet, then write generality.json and generality.md.

    quick: only one condition a group, four ablations, and short learning. Errors: ConceptSteerError for results of
    other settings in `out`.
    """
    wanted = list(_first_of_each(conditions())) if quick else conditions()
    variants = {name: ABLATIONS[name] for name in (QUICK_ABLATIONS if quick else ABLATIONS)}
    base = QUICK if quick else {}
    settings = {"model": studio.denoiser.checkpoint_hash, "roles": roles, "judged": judged, "quick": quick}
    parts = Parts(out / "generality-parts" / ("quick" if quick else "full"), settings)
    figures: list[Figure] = []
    for task in tasks:
        vectors = _Vectors(studio, task, base)
        for condition in wanted:
            results = [
                parts.get(
                    f"{task.name}-{condition.group}-{condition.name}-{seed}",
                    lambda: _use(studio, task, condition, vectors, seed, roles, judged),  # noqa: B023
                    task=task.fingerprint,
                    condition=asdict(condition),
                )
                for seed in range(seeds)
            ]
            figures += use_figures(task, condition, results, roles, command)
            shares = [mean([hit for result in results for hit in result[key]]) for key in SHARES]
            say(f"{task.name}, {condition.group}, {condition.name}: " + " / ".join(f"{share:.0%}" for share in shares))
        for name, changes in variants.items():
            results = [
                parts.get(
                    f"{task.name}-ablation-{name}-{seed}",
                    lambda: _ablate(studio, task, {**base, **changes}, seed, roles, judged),  # noqa: B023
                    task=task.fingerprint,
                    options={**base, **changes},
                )
                for seed in range(seeds)
            ]
            figures += ablation_figures(task, name, results, command)
            say(f"{task.name}, {name}: explained {mean([result['explained'] for result in results]):.3f}")
        followed = [
            parts.get(
                f"{task.name}-strengths-{seed}",
                lambda: _follow(studio, task, vectors, seed, roles, judged),  # noqa: B023
                task=task.fingerprint,
            )
            for seed in range(seeds)
        ]
        figures += composition.follow_figures(task, followed, command)
        say(f"{task.name}: rank correlation with strength {mean([one['rank_correlation'] for one in followed]):.2f}")
    for one, other in composition.composable(tasks):
        both = [_Vectors(studio, task, base) for task in (one, other)]
        results = [
            parts.get(
                f"{one.name}-with-{other.name}-{seed}",
                lambda: _together(studio, one, other, both, seed, roles, judged),  # noqa: B023
                tasks=[one.fingerprint, other.fingerprint],
            )
            for seed in range(seeds)
        ]
        figures += composition.together_figures(one, other, results, command)
    sections = list(_sections(tasks, figures, seeds, roles, judged, studio.name))
    return write(out, "generality", figures, title="Where a vector works, and what made it so", sections=sections)


def _first_of_each(wanted: Iterable[Condition]) -> Iterator[Condition]:
    seen: set[str] = set()
    for condition in wanted:
        if condition.group not in seen:
            yield condition
        seen.add(condition.group)


def _learn(studio: Studio, task: Task, seed: int, options: dict[str, Any]) -> LearnResult:
    given = dict(options)
    pairs = task.pairs[: given.pop("pairs", 4)]
    return learn_score(studio.denoiser, pairs, seed=10_000 * (seed + 1), title=task.name, **given)


class _Vectors:
    """The vectors of one task, learned when they are first needed."""

    def __init__(self, studio: Studio, task: Task, base: dict[str, Any]) -> None:
        self._studio, self._task, self._base = studio, task, base
        self._made: dict[tuple[int, int], Steer] = {}

    def get(self, seed: int, pairs: int) -> Steer:
        if (seed, pairs) not in self._made:
            result = _learn(self._studio, self._task, seed, {**self._base, "pairs": pairs})
            self._made[seed, pairs] = Steer(result.vector)
        return self._made[seed, pairs]


def _seeds(seed: int, judged: int, offset: int = 0) -> list[int]:
    return [6_000_000 + offset + 1_000 * seed + i for i in range(judged)]


def _use(
    studio: Studio, task: Task, condition: Condition, vectors: _Vectors, seed: int, roles: int, judged: int
) -> dict[str, Any]:
    """1 where the judges find the concept: without, with, and under the rich prompt; role by role."""
    neutral, rich = ([test[i] for test in task.tests[:roles]] for i in (0, 1))
    drawn = _seeds(seed, judged, condition.offset)
    before = verdicts(studio, neutral, drawn, condition.drawing)
    after = verdicts(studio, neutral, drawn, condition.drawing, [vectors.get(seed, condition.pairs)])
    prompt = verdicts(studio, rich, drawn, condition.drawing)
    return {key: found(task, verdict) for key, verdict in zip(SHARES, (before, after, prompt), strict=True)}


def _follow(studio: Studio, task: Task, vectors: _Vectors, seed: int, roles: int, judged: int) -> dict[str, Any]:
    return composition.follow(studio, task, vectors.get(seed, 4), _seeds(seed, judged), roles, Drawing())


def _together(
    studio: Studio, one: Task, other: Task, vectors: Sequence[_Vectors], seed: int, roles: int, judged: int
) -> dict[str, Any]:
    steers = [each.get(seed, 4) for each in vectors]
    return composition.together(studio, one, other, steers, _seeds(seed, judged), roles, Drawing())


def _ablate(studio: Studio, task: Task, options: dict[str, Any], seed: int, roles: int, judged: int) -> dict[str, Any]:
    """One vector learned with changed settings, judged in the usual way of drawing. kept: 1 where the judges give the
    same role (of a role as the concept: the same gender) as without the vector."""
    result = _learn(studio, task, seed, options)
    prompts, drawn = [neutral for neutral, _ in task.tests[:roles]], _seeds(seed, judged)
    before = verdicts(studio, prompts, drawn, Drawing())
    after = verdicts(studio, prompts, drawn, Drawing(), [Steer(result.vector)])
    head = "gender" if task.head == "role" else "role"
    kept = [int(a == b) for a, b in zip(before.labels(head), after.labels(head), strict=True)]
    return {
        "explained": result.explained,
        "share_after": found(task, after),
        "kept": kept,
        "rows_total": result.unet_rows + result.backward_rows,
        "seconds_to_learn": result.seconds,
    }


def _share(metric: str, hits: Sequence[int], command: str, extra: dict[str, str]) -> Figure:
    return Figure("score", metric, mean(hits), *wilson(sum(hits), len(hits)), len(hits), command, extra)


def use_figures(
    task: Task, condition: Condition, results: Sequence[dict[str, Any]], roles: int, command: str
) -> list[Figure]:
    """Shares over all roles, then by role, with Wilson intervals."""
    extra = {"concept": task.name, "group": condition.group, "condition": condition.name}
    figures = [_share(key, [hit for result in results for hit in result[key]], command, extra) for key in SHARES]
    for number, key in product(range(roles), SHARES):
        each = len(results[0][key]) // roles
        part = slice(number * each, (number + 1) * each)
        hits = [hit for result in results for hit in result[key][part]]
        figures.append(_share(key, hits, command, {**extra, "role": task.tests[number][0]}))
    return figures


def ablation_figures(task: Task, name: str, results: Sequence[dict[str, Any]], command: str) -> list[Figure]:
    """Shares with Wilson intervals; the rest as means over seeds, with a bootstrap interval from two seeds on."""
    extra = {"concept": task.name, "ablation": name}
    figures = []
    for metric in ABLATED:
        values = [result[metric] for result in results]
        if metric in ("share_after", "kept"):
            figures.append(_share(metric, [hit for value in values for hit in value], command, extra))
            continue
        low, high = bootstrap(values, mean) if len(values) > 1 else (None, None)  # type: ignore[arg-type]
        figures.append(Figure("score", metric, mean(values), low, high, len(values), command, extra))
    return figures


def _sections(
    tasks: Sequence[Task], figures: Sequence[Figure], seeds: int, roles: int, judged: int, model: str
) -> Iterator[Section]:
    yield (
        "How it was measured",
        f"Model {model}, vectors learned by `score` with its defaults but for what a line names, {seeds} learning "
        f"seeds, {roles} unseen roles with {judged} pictures each a seed. Intervals: 95 %, Wilson for shares, "
        "bootstrap over learning seeds for the rest (so with two seeds no more than the two values).",
    )
    for task in tasks:
        mine = [figure for figure in figures if figure.extra["concept"] == task.name]
        used = [f for f in mine if "condition" in f.extra and f.extra["group"] != composition.GROUP]
        whole = [figure for figure in used if "role" not in figure.extra]
        yield (
            f"{task.name}: used elsewhere",
            f"{task.note}. Share judged {' or '.join(task.values)}.\n\n"
            + pivot(whole, SHARES, label="condition", of=lambda f: f"{f.extra['group']}: {f.extra['condition']}"),
        )
        yield f"{task.name}: by role", _by_role(used)
        yield composition.section_of_strengths(task, mine)
        tried = [figure for figure in mine if "ablation" in figure.extra]
        yield f"{task.name}: ablations", pivot(tried, ABLATED, label="changed", of=lambda f: f.extra["ablation"])
    for one, other in composition.composable(tasks):
        yield composition.section_of_pair(one, other, figures)


def _by_role(figures: Sequence[Figure]) -> str:
    """The share with the vector by role; one column per condition of learning."""
    groups = {"usual": "learned on four roles", "learned on": "learned on one role"}
    table: dict[str, dict[str, str]] = {}
    for figure in figures:
        if "role" in figure.extra and figure.extra["group"] in groups and figure.metric == "share_after":
            table.setdefault(figure.extra["role"], {})[figure.extra["group"]] = figure.text()
    rows = [[role, *(cells.get(group, "-") for group in groups)] for role, cells in table.items()]
    return markdown(["role", *groups.values()], rows)
