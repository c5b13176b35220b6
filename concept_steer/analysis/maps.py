"""A map of prompts in two dimensions, and their clusters, named by the words that lie nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptSteerError, SettingError

METHODS = ("pca", "umap")
MOST = 12  # clusters that are tried when nobody says how many
STARTS = 8


@dataclass(frozen=True)
class Cluster:
    """names: the words nearest to it, with their cosines; members in the order of nearness to its middle."""

    names: tuple[tuple[str, float], ...]
    members: tuple[str, ...]

    def title(self) -> str:
        return ", ".join(name for name, _ in self.names) or self.members[0]

    def as_dict(self) -> dict[str, Any]:
        return {"names": [list(pair) for pair in self.names], "members": list(self.members)}


def principal_map(points: Tensor) -> tuple[Tensor, list[float]]:
    """(N, 2) coordinates along the two directions of largest variance of points (N, D), and their shares of it.

    The sign is fixed (the largest coordinate is positive), so that the same points give the same map.
    """
    if len(points) < 3:
        raise SettingError(f"A map needs three or more prompts, not {len(points)}.")
    centred = points.double() - points.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    found = u[:, :2] * s[:2]
    top = found.gather(0, found.abs().argmax(0, keepdim=True))
    share = (s[:2] ** 2 / (s**2).sum().clamp_min(1e-30)).tolist()
    return found * torch.where(top < 0, -1.0, 1.0), share


def check_method(method: str) -> None:
    """Before any work: whether a map can be made so. Errors: ConceptSteerError where umap-learn is not installed."""
    if method not in METHODS:
        raise SettingError(f"There is no method {method!r} of making a map; known are {' and '.join(METHODS)}.")
    if method == "umap" and find_spec("umap") is None:
        raise ConceptSteerError(
            "A UMAP map needs umap-learn: run pip install 'concept-steer[umap]', or use the method pca."
        )


def umap_map(points: Tensor, *, neighbours: int = 10, seed: int = 0) -> Tensor:
    """(N, 2) by UMAP (McInnes et al. 2018) on cosines; an extra. Errors: ConceptSteerError when it is not installed."""
    check_method("umap")
    import umap

    few = min(neighbours, len(points) - 1)
    work = umap.UMAP(n_neighbors=few, metric="cosine", random_state=seed, n_jobs=1)  # a seed allows one job only
    return torch.as_tensor(work.fit_transform(points.double().numpy()), dtype=torch.float64)


def cluster_labels(points: Tensor, count: int = 0, *, seed: int = 0) -> Tensor:
    """(N,) labels 0..count-1 of points (N, D) by k-means on the sphere; 0: the count of largest silhouette, 2 to 12.

    Errors: SettingError for more clusters than points.
    """
    if len(points) < 3 or count > len(points) or count == 1 or count < 0:
        raise SettingError(f"{count} clusters of {len(points)} prompts cannot be: give 2 or more, fewer than prompts.")
    unit = torch.nn.functional.normalize(points.double(), dim=1)
    tried = [count] if count else range(2, min(MOST, len(points) - 1) + 1)
    found = [_k_means(unit, k, seed) for k in tried]
    return max(found, key=lambda labels: silhouette(unit, labels)) if len(found) > 1 else found[0]


def _k_means(unit: Tensor, count: int, seed: int) -> Tensor:
    """The best of some starts; centres drawn far apart (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    best, best_fit = torch.zeros(len(unit), dtype=torch.long), -float("inf")
    for _ in range(STARTS):
        centres = unit[torch.randint(len(unit), (1,), generator=generator)]
        while len(centres) < count:
            far = (1 - (unit @ centres.T).max(1).values).clamp_min(1e-9)
            centres = torch.cat([centres, unit[torch.multinomial(far, 1, generator=generator)]])
        labels = torch.full((len(unit),), -1)
        for _ in range(100):
            near = unit @ centres.T
            fresh = near.argmax(1)
            if bool((fresh == labels).all()):
                break
            labels = fresh
            sums = torch.zeros_like(centres).index_add_(0, labels, unit)
            empty = sums.norm(dim=1) == 0
            centres = torch.where(empty[:, None], centres, torch.nn.functional.normalize(sums, dim=1))
        fit = float((unit @ centres.T).max(1).values.sum())
        if fit > best_fit:
            best, best_fit = labels, fit
    return best


def silhouette(unit: Tensor, labels: Tensor) -> float:
    """Mean of (b - a) / max(a, b): a the distance (1 - cosine) to the own cluster, b to the nearest other one."""
    apart = 1 - unit @ unit.T
    groups = labels.unique().tolist()
    if len(groups) < 2:
        return -1.0
    members = torch.stack([labels == group for group in groups]).double()
    sums = apart @ members.T
    sizes = members.sum(1)
    own = members.T.bool()
    a = (sums / (sizes - 1).clamp_min(1))[own]
    b = (sums / sizes).masked_fill(own, float("inf")).min(1).values
    alone = (sizes.expand_as(sums)[own]) == 1
    value = (b - a) / torch.maximum(a, b).clamp_min(1e-30)
    return float(value.masked_fill(alone, 0.0).mean())


def clusters(
    names: Sequence[str],
    points: Tensor,
    words: Mapping[str, Tensor] | None = None,
    *,
    count: int = 0,
    seed: int = 0,
    named_by: int = 2,
) -> list[Cluster]:
    """Clusters of named points (N, D), largest first, each with the words (D,) nearest to its middle."""
    labels = cluster_labels(points, count, seed=seed)
    centre = points.double().mean(0)
    unit = torch.nn.functional.normalize(points.double(), dim=1)
    word_names = list(words or {})
    table = torch.stack([w.double() for w in words.values()]) if words else torch.empty(0, points.shape[1])
    table = torch.nn.functional.normalize(table - table.mean(0), dim=1) if len(table) > 2 else table
    found = []
    for label in labels.unique().tolist():
        inside = (labels == label).nonzero().flatten()
        middle = unit[inside].mean(0)
        order = inside[(unit[inside] @ middle).argsort(descending=True)].tolist()
        apart = torch.nn.functional.normalize(points[inside].double().mean(0) - centre, dim=0)
        near = (table @ apart).tolist() if len(table) else []
        best = sorted(zip(word_names, near, strict=True), key=lambda pair: -pair[1])[:named_by]
        found.append(Cluster(tuple(best), tuple(names[i] for i in order)))
    return sorted(found, key=lambda cluster: -len(cluster.members))
