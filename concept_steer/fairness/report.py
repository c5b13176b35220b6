"""What was asked, given and seen: shares with intervals and the deviation ratio beside what chance alone would give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptSteerError
from ..statistics import deviation_ratio, rank_correlation, wilson
from ..steering import Steer
from ..vector import ConceptVector
from .assignment import Assignment, Mode, Target
from .gate import GateDecision
from .phrases import Found

Labels = Mapping[str, Sequence[str]]  # attribute name -> the judged label of each picture
Judge = Callable[[Tensor], Labels]  # pictures (N, 3, H, W) in [-1, 1] -> labels


def chance_deviation(shares: Mapping[str, float], count: int, draws: int = 2000) -> float:
    """The mean deviation ratio of a sampler that draws `count` pictures with just these shares: N's own noise.

    By simulation with a fixed seed; for two equal shares about sqrt(2 / (pi N)).
    """
    if count == 0:
        return math.nan
    names, generator = list(shares), torch.Generator().manual_seed(0)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    picks = torch.multinomial(weights, count * draws, replacement=True, generator=generator).view(draws, count)
    counts = torch.stack([(picks == i).sum(1) for i in range(len(names))], 1).tolist()
    found = [deviation_ratio(dict(zip(names, row, strict=True)), shares) for row in counts]
    return sum(found) / draws


def report(
    prompt: str,
    targets: Sequence[Target],
    assignments: Sequence[Assignment],
    *,
    mode: Mode,
    seed: int,
    decisions: Mapping[str, GateDecision] | None = None,
    phrases: Sequence[Found] = (),
    observed: Labels | None = None,
) -> dict[str, Any]:
    """All of a run, ready for JSON. decisions: by attribute; observed: as a `Judge` gives them, if there is one."""
    decisions = decisions or {}
    attributes = {}
    for target in targets:
        name, wanted = target.attribute.name, dict(target.wanted)
        decision = decisions.get(name)
        left_alone = decision is not None and decision.named
        counts = Counter(one[name] for one in assignments)
        told: dict[str, Any] = {
            "targets": wanted,
            "left_alone": left_alone,
            "gate": None if decision is None else decision.text(),
            "gate_measured": {} if target.attribute.gate is None else dict(target.attribute.gate.measured),
            "assigned": {} if left_alone else {label: counts.get(label, 0) for label in wanted},
            "chance_delta": chance_deviation(wanted, len(assignments)),
        }
        if observed is not None and name in observed:
            told["observed"] = _observed(observed[name], assignments, name, wanted, left_alone)
        attributes[name] = told
    return {
        "prompt": prompt,
        "pictures": len(assignments),
        "mode": mode,
        "seed": seed,
        "phrases": [one.text() for one in phrases],
        "attributes": attributes,
    }


def _observed(
    labels: Sequence[str], assignments: Sequence[Assignment], name: str, wanted: Mapping[str, float], left_alone: bool
) -> dict[str, Any]:
    total = len(labels)
    if total != len(assignments):
        raise ConceptSteerError(f"The judge of {name!r} saw {total} pictures, but {len(assignments)} were assigned.")
    counts = {label: 0 for label in wanted} | Counter(labels)
    same = sum(one[name] == label for one, label in zip(assignments, labels, strict=True))
    return {
        "counts": counts,
        "shares": {label: many / total for label, many in counts.items()} if total else {},
        "intervals": {label: list(wilson(many, total)) for label, many in counts.items()},
        "delta": deviation_ratio(counts, wanted),
        "as_assigned": None if left_alone or not total else same / total,
    }


def describe(told: Mapping[str, Any]) -> str:
    """The report in plain words."""
    lines = [f"{told['prompt']!r}: {told['pictures']} pictures, {told['mode']} (seed {told['seed']})."]
    lines += [f"Phrase: {text}." for text in told["phrases"]]
    for name, about in told["attributes"].items():
        if about["left_alone"]:
            lines.append(f"{name}: {about['gate']}.")
        else:
            given = ", ".join(f"{v} {about['assigned'][v]} ({s:.0%})" for v, s in about["targets"].items())
            lines.append(f"{name}: assigned {given}" + (f"; {about['gate']}." if about["gate"] else "."))
        seen = about.get("observed")
        if seen:
            shares = ", ".join(
                f"{v} {seen['counts'][v]} ({s:.0%}, 95% {seen['intervals'][v][0]:.0%}-{seen['intervals'][v][1]:.0%})"
                for v, s in seen["shares"].items()
            )
            lines.append(f"  seen by the judge: {shares}.")
            lines.append(
                f"  deviation ratio {seen['delta']:.3f} (N = {told['pictures']}, {told['mode']}); a perfect random "
                f"sampler would show {about['chance_delta']:.3f} by chance."
            )
            if seen["as_assigned"] is not None:
                lines.append(f"  seen as assigned: {seen['as_assigned']:.0%}.")
    return "\n".join(lines)


def interpolation_curve(
    draw: Callable[[Sequence[Steer]], Tensor],
    judge: Callable[[Tensor], Tensor],
    vector: ConceptVector,
    strengths: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
) -> dict[str, Any]:
    """How a judge's mean probability follows the strength: the points and their rank correlation (1: monotone).

    draw(steers) gives the same prompts and seeds each time; judge gives the concept's probability per picture (N,).
    """
    points = [(float(s), float(judge(draw([Steer(vector, float(s))])).float().mean())) for s in strengths]
    return {
        "strengths": [s for s, _ in points],
        "probabilities": [p for _, p in points],
        "rank_correlation": rank_correlation([s for s, _ in points], [p for _, p in points]),
    }
