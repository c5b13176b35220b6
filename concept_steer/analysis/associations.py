"""Associations: which words lie near which prompts in h. Descriptors of a concept, and words against words.

v[p] = h[p] - h[neutral], seed by seed; near means a large cosine of the means over seeds. What all prompts of a side
have in common (whatever differs from the neutral prompt) is taken away first, so that they are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError

DRAWS = 200
FEWEST = 3  # of a side whose mean is taken away


@dataclass(frozen=True, eq=False)
class Associations:
    """values, low, high (R, C): cosines of rows with columns and their 95 % intervals over seeds."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor
    low: Tensor
    high: Tensor

    def strongest(self, count: int) -> list[tuple[str, str, float]]:
        """(row, column, cosine) whose intervals leave 0 out, largest in size first."""
        clear = (self.low > 0) | (self.high < 0)
        order = (self.values.abs() * clear).flatten().argsort(descending=True)[:count].tolist()
        wide = len(self.columns)
        return [
            (self.rows[i // wide], self.columns[i % wide], float(self.values.flatten()[i]))
            for i in order
            if bool(clear.flatten()[i])
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows),
            "columns": list(self.columns),
            **{name: getattr(self, name).tolist() for name in ("values", "low", "high")},
        }


def associations(
    rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], neutral: Tensor, *, seed: int = 0
) -> Associations:
    """rows, columns: name -> h (S, D); neutral: h (S, D), of the same seeds. Errors: SettingError for an empty side."""
    if not rows or not columns:
        raise SettingError("Associations need at least one word on either side.")
    seeds = neutral.shape[0]
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.arange(seeds)] + [torch.randint(seeds, (seeds,), generator=generator) for _ in range(DRAWS)]
    sides = [torch.stack([h - neutral for h in side.values()]) for side in (rows, columns)]
    found = torch.stack([_cosines(*(_told_apart(side[:, pick].mean(1)) for side in sides)) for pick in picks])
    low, high = torch.quantile(found[1:], torch.tensor([0.025, 0.975]), dim=0)
    return Associations(tuple(rows), tuple(columns), found[0], low, high)


def descriptors(
    concept: Tensor, words: Mapping[str, Tensor], neutral: Tensor, *, seed: int = 0
) -> list[tuple[str, float, float, float]]:
    """(word, cosine, low, high), nearest first, of one concept's h (S, D)."""
    table = associations({"concept": concept}, words, neutral, seed=seed)
    found = zip(words, table.values[0].tolist(), table.low[0].tolist(), table.high[0].tolist(), strict=True)
    return sorted(found, key=lambda one: -one[1])


def _told_apart(v: Tensor) -> Tensor:
    return v - v.mean(0) if len(v) >= FEWEST else v


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
