"""The small statistics that every measurement here uses: shares with intervals, deviation ratio, Fréchet distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Z95 = 1.959964


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) for no observations at all."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, Z95 * Z95
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    values: Sequence[object], statistic: Callable[[list[object]], float], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over resamples of `values` with replacement; NaN for no values."""
    if not values:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator).tolist()
    found = torch.tensor([statistic([values[i] for i in row]) for row in picks], dtype=torch.float64)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def deviation_ratio(counts: Mapping[str, int], targets: Mapping[str, float] | None = None) -> float:
    """Delta = max_c |N_c / N - p_c| / max_c (1 - p_c): 0 as wanted, 1 a single class where others were wanted.

    counts: by class, every wanted class included. targets: shares p_c that sum to 1; equal ones by default, which is
    the deviation ratio of Li et al. 2311.17216 (sec. 4.1). NaN for no observations.
    """
    total = sum(counts.values())
    if total == 0 or not counts:
        return math.nan
    wanted = targets or {name: 1 / len(counts) for name in counts}
    worst = max(1 - share for share in wanted.values())
    if worst <= 0:  # a single class is wanted
        return 1 - counts.get(next(iter(wanted)), 0) / total
    return max(abs(counts.get(name, 0) / total - wanted.get(name, 0.0)) for name in {*counts, *wanted}) / worst


def frechet(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of two sets of features (n, d) and (m, d), each taken as a normal distribution (as in FID).

    Small sets overstate it: compare only sets of equal size, and with the distance of two halves of the same set.
    """
    a, b = one.double(), other.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root_a = _root(cov_a)
    both = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * both)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; NaN when one of them does not vary."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else math.nan


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, ties with their mean rank."""
    return correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    v = torch.tensor(values, dtype=torch.float64)
    below = (v[None] < v[:, None]).sum(1)
    same = (v[None] == v[:, None]).sum(1)
    return (below + (same - 1) / 2).tolist()


def adjusted_rand(one: Sequence[object], other: Sequence[object]) -> float:
    """Adjusted Rand index of two partitions of the same things (Hubert and Arabie 1985): 1 equal, about 0 by chance."""
    table: dict[tuple[object, object], int] = {}
    for pair in zip(one, other, strict=True):
        table[pair] = table.get(pair, 0) + 1
    sides = [[sum(n for pair, n in table.items() if pair[i] == name) for name in {p[i] for p in table}] for i in (0, 1)]
    both = sum(math.comb(n, 2) for n in table.values())
    a, b = (sum(math.comb(n, 2) for n in side) for side in sides)
    chance = a * b / max(1, math.comb(len(one), 2))
    most = (a + b) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)
