"""A direction that was found rather than learned: its vector, how much it explains, and what it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..vector import ConceptVector


@dataclass(frozen=True)
class FoundDirection:
    """One direction. number: its rank, from 1. value: its share of the variance (0..1), or its singular value.

    iterations: applications of the Jacobian's square until then (0 for PCA). names: (prompt, cosine), nearest first.
    """

    vector: ConceptVector
    method: str
    number: int
    value: float
    iterations: int = 0
    converged: bool = True
    names: tuple[tuple[str, float], ...] = field(default=())

    @property
    def label(self) -> str:
        return f"{self.method} {self.number}"

    def summary(self) -> str:
        """One line in plain words."""
        value = f"{self.value:.1%} of the variance" if self.method == "pca" else f"singular value {self.value:.3g}"
        open_end = "" if self.converged else f", not converged in {self.iterations} iterations"
        named = ", ".join(f"{name} {cosine:+.2f}" for name, cosine in self.names) or "no names"
        return f"{self.label}: {value}{open_end}; {named}"

    def report(self) -> dict[str, Any]:
        """All but the tensor, ready for JSON."""
        return {
            "method": self.method,
            "number": self.number,
            "value": self.value,
            "iterations": self.iterations,
            "converged": self.converged,
            "names": [[name, cosine] for name, cosine in self.names],
            "title": self.vector.title,
            "fingerprint": self.vector.fingerprint,
            "norm": self.vector.norm,
            "shape": list(self.vector.tensor.shape),
        }


def named(direction: FoundDirection, names: Sequence[tuple[str, float]]) -> FoundDirection:
    """With its nearest prompts, the first of them in the title; turned round where that one's cosine is negative."""
    if not names:
        return direction
    turn = -1.0 if names[0][1] < 0 else 1.0
    vector = direction.vector
    info = {**vector.info, "names": ", ".join(f"{name} {turn * cosine:+.3f}" for name, cosine in names)}
    title = f"{vector.title} {names[0][0]}".strip()
    return replace(
        direction,
        vector=replace(vector, tensor=vector.tensor * turn, title=title, info=info),
        names=tuple((name, turn * cosine) for name, cosine in names),
    )


def signs(rows: Tensor) -> Tensor:
    """(k, 1) of 1 or -1 that make each row's value of largest size positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)


def vector_of_rank(
    denoiser: Denoiser, tensor: Tensor, method: str, number: int, title: str, moments: Sequence[float], **info: Any
) -> ConceptVector:
    texts = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in info.items()}
    name = f"{title} {method} {number}".strip()
    return ConceptVector(
        tensor, denoiser.family, name, timesteps=tuple(moments), info={"method": method, **texts, "rank": str(number)}
    )
