"""Effect against cost: the curve of a way to learn, and at which cost it first reaches a given effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import bootstrap, mean

NEVER = 1e15  # stands for "not reached" among resampled costs; far above any cost


@dataclass(frozen=True)
class Unit:
    """One learning seed on one unseen role, the unit that is resampled.

    rows (checks,): cost at each check; hits (checks, pictures) 0 or 1: the judges found the concept; base, rich
    (pictures,): the same pictures under the neutral and under the rich prompt.
    """

    rows: tuple[float, ...]
    hits: tuple[tuple[int, ...], ...]
    base: tuple[int, ...]
    rich: tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """Effect at each cost, rows ascending: 0 is no vector at all, 1 the rich prompt's own effect."""

    rows: tuple[float, ...]
    effects: tuple[float, ...]

    @property
    def final(self) -> float:
        return self.effects[-1]


def effect(share: float, base: float, rich: float) -> float:
    """The share gained over the share that the rich prompt gains; NaN where the prompt gains nothing."""
    return (share - base) / (rich - base) if rich > base else math.nan


def curve(units: Sequence[Unit]) -> Curve:
    """The mean over units, check by check; a run with fewer checks (it stopped early) keeps its last one."""
    checks = max(len(unit.rows) for unit in units)
    base = mean([hit for unit in units for hit in unit.base])
    rich = mean([hit for unit in units for hit in unit.rich])
    rows, effects = [], []
    for check in range(checks):
        at = [min(check, len(unit.rows) - 1) for unit in units]
        rows.append(mean([unit.rows[i] for unit, i in zip(units, at, strict=True)]))
        share = mean([hit for unit, i in zip(units, at, strict=True) for hit in unit.hits[i]])
        effects.append(effect(share, base, rich))
    return Curve(tuple(rows), tuple(effects))


def rows_to_effect(found: Curve, target: float) -> float | None:
    """The cost at which the curve first reaches `target` and still has it at the next check; None when it never does.

    Between two checks the effect is taken as linear in the cost. A curve that has it at its first check gets that
    check's cost, which is then an upper bound.
    """
    if not math.isfinite(target):
        return None
    for check, value in enumerate(found.effects):
        kept = check + 1 == len(found.effects) or found.effects[check + 1] >= target
        if not value >= target or not kept:
            continue
        if check == 0:
            return found.rows[0]
        before, low, high = found.effects[check - 1], found.rows[check - 1], found.rows[check]
        if before >= target:  # reached there, but it was not kept: this check is the first that counts
            return high
        return low + (high - low) * (target - before) / (value - before)
    return None


def rows_with_interval(units: Sequence[Unit], target: float, draws: int = 1000) -> tuple[float | None, ...]:
    """(value, low, high) of `rows_to_effect`, the interval by bootstrap over units with the target held fixed.

    None for a value or an end of the interval that is not reached; where the value is not, low is the cost spent.
    """
    whole = curve(units)
    value = rows_to_effect(whole, target)
    if value is None:
        return None, whole.rows[-1], None

    def cost(sample: list[object]) -> float:
        found = rows_to_effect(curve(sample), target)  # type: ignore[arg-type]
        return NEVER if found is None else found

    ends = bootstrap(units, cost, draws=draws)
    return value, *(None if end > 2 * whole.rows[-1] else end for end in ends)


def final_with_interval(units: Sequence[Unit], draws: int = 1000) -> tuple[float, float, float]:
    """(value, low, high) of the last check's effect, the interval by bootstrap over units.

    Resamples in which the rich prompt gains nothing have no effect and are left out.
    """
    found: list[float] = []

    def final(sample: list[object]) -> float:
        found.append(curve(sample).final)  # type: ignore[arg-type]
        return found[-1]

    value = curve(units).final
    low, high = bootstrap(units, final, draws=draws)
    if math.isnan(low):
        finite = sorted(v for v in found if math.isfinite(v))
        low, high = (finite[int(q * (len(finite) - 1))] for q in (0.025, 0.975)) if finite else (math.nan, math.nan)
    return value, low, high
