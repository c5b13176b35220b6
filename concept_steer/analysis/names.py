"""The name of a vector: the word whose own direction it follows best, told from its neighbours by what varies.

A word's direction is the mean, over some contexts, of h(prompt with the word) - h(the same without). Near words ("dark
skin", "on a dark background") share most of theirs, so that a plain cosine names by chance; what tells them apart is
small, but steady over contexts. Hence Fisher's discriminant (1936): the cosine is taken where h is divided by the
scatter of directions over contexts, to which noise is added, equal in all directions, as large as the part of the
vector that no word explains: a vector with little of it (a difference) is held to the steady differences, one with much
of it (a gradient's) to the plain cosine. The construction is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError
from ..vector import ConceptVector
from .naming import pooled
from .reading import Reader

SPAN = 0.999  # share of the directions' variance in what counts as explained by words
LEAST_NOISE = 1e-3  # of the scatter's mean: a vector that words explain wholly is still not without noise
SEEDS = 4  # usual; twice as many name no better


@dataclass(frozen=True)
class Names:
    """words: name -> direction (C,). scatter (C, C): of directions over contexts. span (C, K): orthonormal columns."""

    words: Mapping[str, Tensor]
    scatter: Tensor
    span: Tensor

    @classmethod
    def of(cls, changes: Mapping[str, Tensor]) -> Names:
        """changes: name -> (contexts, C), what the word adds to h in each. Errors: SettingError for none."""
        if not changes:
            raise SettingError("There are no words to name a vector with: give at least one.")
        known = {name: rows.double() for name, rows in changes.items()}
        words = {name: rows.mean(0) for name, rows in known.items()}
        around = torch.cat([rows - words[name] for name, rows in known.items() if len(rows) > 1] or [torch.empty(0)])
        channels = len(next(iter(words.values())))
        scatter = around.T @ around / len(around) if len(around) else torch.zeros(channels, channels).double()
        _, sizes, axes = torch.linalg.svd(torch.cat(list(known.values())), full_matrices=False)
        shares = (sizes**2).cumsum(0) / (sizes**2).sum().clamp_min(1e-30)
        return cls(words, scatter, axes[: int((shares < SPAN).sum()) + 1].T)

    def nearest(self, vector: ConceptVector, count: int = 3) -> list[tuple[str, float]]:
        """The `count` likeliest names with their likeness (-1 to 1), largest first; maps are averaged to (C,) first.

        Without scatter (every word in a single context) the likeness is the plain cosine.
        """
        own, table = pooled(vector), torch.stack(list(self.words.values()))
        explained = self.span @ (self.span.T @ own)
        usual = table.norm(dim=1).median().clamp_min(1e-30)
        scatter = self.scatter * (explained.norm() / usual) ** 2
        free = max(1, len(own) - self.span.shape[1])
        noise = torch.maximum((own - explained).norm() ** 2 / free, LEAST_NOISE * scatter.trace() / len(own))
        variances, axes = torch.linalg.eigh(scatter)
        change = axes / (variances.clamp_min(0) + noise.clamp_min(1e-30)).sqrt()
        likeness = torch.nn.functional.cosine_similarity(table @ change, (own @ change)[None], dim=1)
        return sorted(zip(self.words, likeness.tolist(), strict=True), key=lambda pair: -pair[1])[:count]


def read_names(
    reader: Reader,
    contexts: Mapping[str, Sequence[tuple[str, str]]],
    progress: Callable[[int, int], None] | None = None,
) -> Names:
    """From each name's pairs of prompts, with the word and without (see `word_list.in_contexts`).

    Errors: SettingError unless the reader's space is "mean" at one moment.
    """
    if reader.settings.space != "mean" or len(reader.settings.moments) != 1:
        raise SettingError("Directions are named in the space 'mean', at a single moment.")
    asked = dict.fromkeys(prompt for pairs in contexts.values() for pair in pairs for prompt in pair)
    h = {prompt: seeds.mean(0) for prompt, seeds in reader.stream(list(asked), progress)}
    return Names.of({name: torch.stack([h[high] - h[low] for high, low in pairs]) for name, pairs in contexts.items()})
