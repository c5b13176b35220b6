"""Latents held against texts, without decoding: scores, also in the middle of sampling, and zero-shot classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import NoiseSchedule, Time
from ..errors import ConceptSteerError
from .model import LatentClip
from .templates import PUBLISHED, filled


@dataclass(frozen=True, eq=False)
class Scores:
    """How well B latents fit T texts. cosines (B, T) fp32 on the CPU; scale: CLIP's, for probabilities."""

    texts: tuple[str, ...]
    cosines: Tensor
    scale: float

    def __len__(self) -> int:
        return self.cosines.shape[0]

    @property
    def probabilities(self) -> Tensor:
        """(B, T): which of the texts it is, if it is one of them."""
        return (self.scale * self.cosines).softmax(dim=1)

    def best(self) -> list[str]:
        """The best text of each latent."""
        return [self.texts[i] for i in self.cosines.argmax(dim=1).tolist()]


def encode_batches(clip: LatentClip, latents: Tensor, batch: int = 64) -> Tensor:
    """Unit vectors (B, D) of scaled latents (B, C, H, W), on the CPU, without gradients."""
    if batch < 1:
        raise ValueError(f"A batch has at least one latent, not {batch}.")
    clip.space.check(latents)
    if len(latents) == 0:
        raise ConceptSteerError("There are no latents to look at: give at least one.")
    with torch.no_grad():
        return torch.cat([clip.encode_latents(part).cpu() for part in latents.split(batch)])


def score(clip: LatentClip, latents: Tensor, texts: Sequence[str], *, batch: int = 64) -> Scores:
    """Each scaled latent (B, C, H, W) against each text. Errors: ConceptSteerError for latents of another shape."""
    given = _texts(texts)
    return Scores(given, encode_batches(clip, latents, batch) @ clip.encode_text(given).cpu().T, clip.scale)


def score_noisy(
    clip: LatentClip,
    schedule: NoiseSchedule,
    x_t: Tensor,
    prediction: Tensor,
    t: Time,
    texts: Sequence[str],
    *,
    batch: int = 64,
) -> Scores:
    """What a picture in the middle of sampling will fit: scores of its estimate of x_0.

    x_t, prediction: (B, C, H, W) noisy latents and the model's prediction at the training timestep t (one, or (B,));
    after guidance, if that is what sampling goes on with. On the embedded model (128 pictures) the right one of eight
    prompts comes first for 91 % of them at the first step of twenty, for 97 % after five steps and 98 % at the end.
    """
    return score(clip, schedule.to_x0(x_t, prediction, t), texts, batch=batch)


def class_vectors(clip: LatentClip, names: Sequence[str], templates: Sequence[str] = PUBLISHED) -> Tensor:
    """Unit vectors (classes, D) on the CPU: of each class the mean over the templates (Radford et al. sec. 3.1.4)."""
    if not templates:
        raise ConceptSteerError("Zero-shot classification needs at least one template, such as 'a photo of a {}.'.")
    rows = [clip.encode_text(filled(tuple(templates), name)).cpu().mean(dim=0) for name in _texts(names)]
    return F.normalize(torch.stack(rows), dim=-1)


def classify(
    clip: LatentClip,
    latents: Tensor,
    names: Sequence[str],
    templates: Sequence[str] = PUBLISHED,
    *,
    batch: int = 64,
) -> Scores:
    """Zero-shot: which of the named classes each scaled latent (B, C, H, W) shows; `best()` and `probabilities`."""
    vectors = class_vectors(clip, names, templates)
    return Scores(tuple(names), encode_batches(clip, latents, batch) @ vectors.T, clip.scale)


def _texts(texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str) or not texts or not all(text.strip() for text in texts):
        raise ConceptSteerError("Give a list of at least one text, none of them empty.")
    return tuple(texts)
