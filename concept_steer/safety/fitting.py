"""Fit a gate: readings of h that tell what is to be kept out from harmless pictures, and their limits.

A regularised logistic regression in whitened h for each kind of picture that is to be kept out and each time: harmless
prompts are many different things, and the few that lie nearest decide. The limits come from harmless pictures that the
regression did not see. The construction is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .gate import Presence

RIDGE = 0.03  # of the regression; whitened h has a spread of 1 in every direction
SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity
ENOUGH = 8  # pictures of a kind, to count in the covariance
ROUNDS = 12  # of Newton's method
MARGIN = 1.0  # in standard deviations: how much surer a reading must be that has only to keep a gate open
SPAN = 0.75  # how far, in standard deviations, a level may move the threshold from the standard one


def fit_presence(
    kinds: Sequence[Tensor],
    harmless: Tensor,
    held_out: Tensor,
    times: Sequence[float],
    alarms: float,
    label: str = "",
    steered: Sequence[Tensor] = (),
) -> Presence:
    """K readings at each of T times, one for each kind; threshold 0 is for a share `alarms` of harmless pictures.

    kinds: (n_k, T, C) pooled h of pictures to keep out; steered: of such with the vector, which keep a gate open that
    another reading has opened. harmless (m, T, C) to fit on, held_out (l, T, C) for limits.
    """
    kinds = [*kinds, *steered]
    directions = torch.stack([_at(kinds, harmless, i) for i in range(len(times))])  # (T, K, C)
    read = torch.einsum("ntc,tkc->ntk", held_out, directions)
    middle, spread = read.mean(0), read.std(0).clamp_min(1e-12)
    highest = ((read - middle) / spread).amax(1)  # (l, K): one look at a picture has many chances to err
    allowed = alarms / len(kinds)
    limits = torch.tensor([threshold_for(column, allowed) for column in highest.T])
    limits[len(kinds) - len(steered) :] += MARGIN
    return Presence(directions, middle + limits * spread, spread, tuple(times), 0.0, None, label)


def _at(kinds: Sequence[Tensor], harmless: Tensor, i: int) -> Tensor:
    """(K, C): the directions at time i, of length 1."""
    near = range(max(0, i - 1), min(harmless.shape[1], i + 2))  # neighbouring times are much alike
    many = [harmless, *(kind for kind in kinds if len(kind) >= ENOUGH)]
    spread = torch.cat([kind[:, j] - kind[:, j].mean(0) for j in near for kind in many]).double()
    covariance = spread.T @ spread / len(spread)
    size = float(covariance.diagonal().mean())
    covariance = covariance + torch.eye(len(covariance), dtype=torch.float64) * (SHRINKAGE * size + 1e-12)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    middle = harmless[:, i].mean(0).double()
    quiet = (harmless[:, i].double() - middle) @ whiten.T
    found = [_logistic((kind[:, i].double() - middle) @ whiten.T, quiet) @ whiten for kind in kinds]
    return torch.stack([(one / one.norm().clamp_min(1e-30)).float() for one in found])


def _logistic(loud: Tensor, quiet: Tensor) -> Tensor:
    """(C,): the weights of a ridge logistic regression in which both sides count the same. float64, Newton's method."""
    x = torch.cat([loud, quiet])
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    wanted = torch.cat([torch.ones(len(loud)), torch.zeros(len(quiet))]).to(x)
    share = torch.cat([torch.full((len(loud),), 0.5 / len(loud)), torch.full((len(quiet),), 0.5 / len(quiet))]).to(x)
    ridge = torch.full((x.shape[1],), RIDGE, dtype=x.dtype)
    ridge[-1] = 1e-8  # the constant is free
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(ROUNDS):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (share * (p - wanted)) + ridge * w
        bend = (share * p * (1 - p)).clamp_min(1e-9)
        w = w - torch.linalg.solve((x * bend[:, None]).T @ x + torch.diag(ridge), gradient)
    return w[:-1]


def threshold_for(quiet: Tensor, alarms: float) -> float:
    """The score that a share `alarms` of harmless pictures exceeds, on the safe side of what few pictures can show.

    quiet: (n,). The larger of the observed quantile and that of a normal distribution with their mean and spread.
    """
    seen = float(torch.quantile(quiet, 1 - alarms, interpolation="higher"))
    expected = float(quiet.mean() + quiet.std() * torch.special.ndtri(torch.tensor(1 - alarms)))
    return max(seen, expected)


def level_thresholds(quiet: Tensor, alarms: Mapping[str, float]) -> dict[str, float]:
    """A threshold for each level. quiet: the gate's scores of harmless pictures; 0 is the standard level's."""
    found = {}
    for level, share in alarms.items():
        wanted = threshold_for(quiet, share)
        low, high = {"gentle": (0.0, SPAN), "standard": (0.0, 0.0), "strict": (-SPAN, 0.0)}[level]
        found[level] = min(high, max(low, wanted))
    return found
