"""The best seeds of many, found before anything is decoded: draw latents, score them, keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ConceptSteerError, SettingError
from ..sampling import Progress, sample
from .model import LatentClip
from .scoring import Scores, score
from .spaces import check_space, space_of


@dataclass(frozen=True, eq=False)
class Ranking:
    """Seeds from the best to the worst, with their values and scaled latents (N, C, H, W) in the same order.

    values: the cosine with the text; with texts to avoid, the logarithm of the text's probability among all of them.
    """

    text: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    latents: Tensor

    def best(self, count: int) -> Ranking:
        """The first `count`. Errors: SettingError when there are not so many."""
        if not 1 <= count <= len(self.seeds):
            raise SettingError(f"The best {count} of {len(self.seeds)} seeds cannot be picked: ask for fewer.")
        return Ranking(self.text, self.seeds[:count], self.values[:count], self.latents[:count])


def worth(scores: Scores) -> Tensor:
    """(B,): how well each latent fits the first text; with further texts, how much better than those."""
    if len(scores.texts) == 1:
        return scores.cosines[:, 0]
    return (scores.scale * scores.cosines).log_softmax(dim=1)[:, 0]


def order_latents(
    clip: LatentClip, latents: Tensor, seeds: Sequence[int], text: str, against: Sequence[str] = ()
) -> Ranking:
    """Latents that are there already, best first. seeds: their numbers, one each. Errors: ConceptSteerError."""
    if len(seeds) != len(latents):
        raise ConceptSteerError(f"{len(latents)} latents but {len(seeds)} seeds: give one seed per latent.")
    values = worth(score(clip, latents, [text, *against]))
    order = values.sort(descending=True, stable=True).indices.tolist()
    return Ranking(
        text,
        tuple(int(seeds[i]) for i in order),
        tuple(float(values[i]) for i in order),
        latents[torch.tensor(order, device=latents.device)],
    )


def rank(
    denoiser: Denoiser,
    clip: LatentClip,
    prompt: str,
    seeds: Sequence[int],
    *,
    text: str | None = None,
    against: Sequence[str] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Ranking:
    """Draw the prompt with every seed and rank the latents by a text, without decoding any.

    text: what they are ranked by (default: the prompt). against: texts that a good one should fit less. settings: of
    sampling.sample. Errors: FamilyMismatch, naming both, when the model draws in another latent space than the tower's.
    """
    check_space(clip.space, space_of(denoiser.family), f"The model ({denoiser.family})")
    if not seeds:
        raise SettingError("There are no seeds to rank: give at least one.")
    latents = sample(denoiser, [prompt] * len(seeds), seeds=seeds, progress=progress, **settings)
    return order_latents(clip, latents, seeds, text or prompt, against)
