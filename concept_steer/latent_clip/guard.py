"""A look at pictures while they are still latents: is "an image of X" likelier than "an image of no X"?

At a chosen moment of sampling the estimate of the finished picture is held against the texts of each category, without
decoding it (the two texts: Becker et al. 2503.08455; several texts for each, and the check in the middle of sampling,
are ours). What is found there can stop the picture, have the safety switch act on it, or have it drawn again: see
`guarded`. The same check of finished latents is a detector as those of `safety.detectors` are.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SafetyError, SettingError
from ..safety.detectors import Verdict
from ..vector_file import write_atomic
from .model import LatentClip
from .scoring import class_vectors, encode_batches
from .spaces import check_space, space_of

TEMPLATES = ("an image of {}", "a picture of {}", "a photo of {}")
ABSENT = "no {}"
FINISHED = 0.0  # the training timestep of finished latents
VERSION = 1


@dataclass(frozen=True, eq=False)
class Limits:
    """From which log-odds on a category counts as found, by training timestep.

    times (T,): rising, from FINISHED. limits, scales (T, K): the value of a picture is (log-odds - limit) / scale.
    rate: the share of harmless pictures that was to be flagged, NaN where nobody measured it.
    """

    times: tuple[float, ...]
    limits: Tensor
    scales: Tensor
    rate: float = math.nan

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.times, self.times[1:], strict=False))
        good = self.limits.ndim == 2 and self.limits.shape == self.scales.shape and len(self.limits) == len(self.times)
        numbers = bool(torch.isfinite(self.limits).all() and torch.isfinite(self.scales).all())
        if not (self.times and rising and good and numbers and bool((self.scales > 0).all())):
            raise SafetyError(
                f"The latent check has limits for the times {self.times[:4]} of {tuple(self.limits.shape)}: expected "
                "rising times with a finite limit and a scale above 0 for every category. Calibrate it again."
            )

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """Limits and scales (K,) at a training timestep: between two times linear, beyond them the nearest."""
        after = min(bisect_left(self.times, t), len(self.times) - 1)
        before = max(0, after - 1)
        gap = self.times[after] - self.times[before]
        share = min(1.0, max(0.0, (t - self.times[before]) / gap)) if gap else 0.0
        return tuple(part[before] * (1 - share) + part[after] * share for part in (self.limits, self.scales))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """The check of one latent CLIP. shown, absent: of each category unit vectors (N, D) of texts with it and without.

    threshold: of the score, 0..1, which is .5 at the limit. Without `limits` a category is found where the texts with
    it are the likelier ones.
    """

    clip: LatentClip
    categories: tuple[str, ...]
    shown: tuple[Tensor, ...]
    absent: tuple[Tensor, ...]
    limits: Limits | None = None
    threshold: float = 0.5
    name: str = "latent-clip"

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold <= 1:  # False for NaN as well
            raise SettingError(f"The latent check's threshold is {self.threshold!r}; it is a number from 0 to 1.")
        counts = {len(self.categories), len(self.shown), len(self.absent)}
        if self.limits is not None:
            counts.add(self.limits.limits.shape[1])
        if len(counts) > 1:
            raise SafetyError(
                f"The latent check has texts or limits for {sorted(counts)} categories, but they are "
                f"{', '.join(self.categories)}: calibrate it with the same categories."
            )

    def check_model(self, family: str, source: str = "The model") -> None:
        """Errors: FamilyMismatch, naming both, for a model of another latent space; ConceptSteerError, unknown ones."""
        check_space(self.clip.space, space_of(family), f"{source} ({family})")

    def log_odds(self, latents: Tensor) -> Tensor:
        """(B, K) fp32 on the CPU, for scaled latents (B, C, H, W): log p(with it) - log p(without), if it is either.

        Errors: ConceptSteerError for latents of another shape or that are not finite; SafetyError for such scores.
        """
        seen = self.clip.scale * encode_batches(self.clip, latents)
        pairs = zip(self.shown, self.absent, strict=True)
        found = torch.stack([_likely(seen, shown) - _likely(seen, absent) for shown, absent in pairs], dim=1)
        if found.shape != (len(latents), len(self.categories)) or not bool(torch.isfinite(found).all()):
            raise SafetyError(
                "The latent check gave no finite score for each picture and category, so no picture is handed out."
            )
        return found

    def values(self, latents: Tensor, t: float = FINISHED) -> Tensor:
        """(B, K): above 0 a category is found. t: the training timestep that the estimate was made at."""
        found = self.log_odds(latents)
        if self.limits is None:
            return found
        limit, scale = self.limits.at(t)
        return (found - limit) / scale

    def verdicts(self, latents: Tensor, t: float = FINISHED) -> list[Verdict]:
        """One of each picture, as of a detector; the score is that of its worst category."""
        rows = self.values(latents, t).sigmoid().tolist()
        return [
            Verdict(max(row) >= self.threshold, max(row), dict(zip(self.categories, row, strict=True))) for row in rows
        ]


def make_guard(
    clip: LatentClip,
    categories: Mapping[str, Sequence[str]],
    *,
    limits: Limits | None = None,
    threshold: float = 0.5,
    templates: Sequence[str] = TEMPLATES,
    absent: str | Sequence[str] = ABSENT,
) -> LatentGuard:
    """The check for categories, each with the words that show it ("a knife", "blood").

    absent: what a picture without it is called: "{}" stands for the words without their article; or texts that are the
    same for all categories, for a text tower that does not understand "no". Errors: SafetyError without a model or
    categories.
    """
    if clip is None:
        raise SafetyError("The latent check has no latent CLIP, so no picture can be looked at: name one.")
    if not categories or not all(words and not isinstance(words, str) for words in categories.values()):
        raise SafetyError("The latent check needs at least one category, each with a list of words that show it.")
    shown = tuple(class_vectors(clip, list(words), templates) for words in categories.values())
    if isinstance(absent, str):
        bare = [[re.sub(r"^(an?|the) ", "", word) for word in words] for words in categories.values()]
        without = [[absent.replace("{}", word) for word in words] for words in bare]
        absent_vectors = tuple(class_vectors(clip, words, templates) for words in without)
    else:
        absent_vectors = (class_vectors(clip, list(absent), templates),) * len(shown)
    return LatentGuard(clip, tuple(categories), shown, absent_vectors, limits, threshold)


def _likely(seen: Tensor, texts: Tensor) -> Tensor:
    """(B,): the logarithm of how well pictures (B, D), times CLIP's scale, fit any of the texts (N, D)."""
    return (seen @ texts.T).logsumexp(dim=1)


def calibrate(plain: LatentGuard, harmless: Mapping[float, Tensor], rate: float = 0.02) -> LatentGuard:
    """The same check with limits that flag a share `rate` of harmless pictures at each time, over all categories.

    harmless: training timestep (FINISHED for finished latents) -> estimates (N, C, H, W) of harmless pictures. All
    categories get the same limit: with limits of their own the rarest things, which few pictures come near, would be
    found worse (measured on the embedded model). The scale is the deviation of the pictures' highest log-odds.
    """
    if not 0 < rate < 1 or not harmless:
        raise SettingError(f"A latent check is calibrated on harmless pictures and a share of them, not {rate!r}.")
    limits, scales = [], []
    for t in sorted(harmless):
        worst = plain.log_odds(harmless[t]).amax(1)
        if len(worst) * rate < 1:
            raise SafetyError(f"{len(worst)} harmless pictures are too few for a share of {rate:g}: give more.")
        limits.append(torch.quantile(worst, 1 - rate).expand(len(plain.categories)))
        scales.append(worst.std().clamp_min(1e-6).expand(len(plain.categories)))
    return replace(plain, limits=Limits(tuple(sorted(harmless)), torch.stack(limits), torch.stack(scales), rate))


def save_limits(limits: Limits, categories: Sequence[str], path: Path, *, overwrite: bool = False) -> Path:
    """As JSON. Errors: ConceptSteerError when it cannot be written."""
    told = {
        "version": VERSION,
        "categories": list(categories),
        "rate": limits.rate,
        "times": list(limits.times),
        "limits": [[round(v, 4) for v in row] for row in limits.limits.tolist()],
        "scales": [[round(v, 4) for v in row] for row in limits.scales.tolist()],
    }
    return write_atomic(path, (json.dumps(told) + "\n").encode(), overwrite=overwrite)


def read_limits(path: Path, categories: Sequence[str]) -> Limits:
    """Errors: SafetyError for a file that is missing, damaged, or made for other categories."""
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        times, rate = tuple(float(t) for t in told["times"]), float(told["rate"])
        limits, scales = (torch.tensor(told[name], dtype=torch.float32) for name in ("limits", "scales"))
        names, version = list(told["categories"]), int(told["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SafetyError(f"{path} holds no limits of a latent check ({error!r}): calibrate it again.") from error
    if version > VERSION or names != list(categories):
        raise SafetyError(
            f"{path} holds limits for {', '.join(map(str, names))} (version {version}), but the check is for "
            f"{', '.join(categories)}: calibrate it again."
        )
    return Limits(times, limits, scales, rate)


class LatentDetector:
    """The check as a detector of finished pictures (`safety.Detector`): they are encoded, or given as latents.

    encode: pixels (B, 3, H, W) in -1 to 1 -> scaled latents, of the guard's space (a Denoiser's encode_pictures).
    """

    def __init__(self, guard: LatentGuard, encode: Callable[[Tensor], Tensor]) -> None:
        self.guard, self.encode, self.name = guard, encode, guard.name

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """One verdict a picture, in order."""
        found = []
        for image in images:
            array = np.array(image.convert("RGB"))
            pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                found += self.guard.verdicts(self.encode(pixels).float())
        return found

    def scores_of_latents(self, latents: Tensor) -> list[Verdict]:
        """One verdict for each of the scaled latents (B, C, H, W), without encoding anything."""
        return self.guard.verdicts(latents)
