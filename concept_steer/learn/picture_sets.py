"""The batches of pictures that learning is given: checked, divided and described."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError

FEWEST = 2  # pictures in each batch: one to learn from and one to check with


def checked_sets(denoiser: Denoiser, pixels: Tensor, without: Tensor | None, latents: bool) -> list[Tensor]:
    """The pictures and, where given, those without the concept: fp32 on the CPU. Errors: LearnError."""
    sets = [_checked(denoiser, pixels, "pictures", latents)]
    if without is not None:
        sets.append(_checked(denoiser, without, "pictures without the concept", latents))
        if sets[0].shape[1:] != sets[1].shape[1:]:
            sizes = " and ".join(" x ".join(str(n) for n in part.shape[2:]) for part in sets)
            raise LearnError(f"The pictures with and without the concept differ in size ({sizes}): use one size.")
        if torch.equal(*sets):
            raise LearnError("The pictures with and without the concept are the same: there is nothing to learn.")
    return sets


def _checked(denoiser: Denoiser, pixels: Tensor, what: str, latents: bool) -> Tensor:
    channels = denoiser.latent_shape[0] if latents else 3
    kind = "latents" if latents else "pixels from -1 to 1"
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise LearnError(f"The {what} must be {kind} as a floating point tensor, not {found}.")
    if pixels.ndim != 4 or pixels.shape[1] != channels or 0 in pixels.shape[2:]:
        raise LearnError(f"The {what} must have the shape (N, {channels}, H, W), not {tuple(pixels.shape)}.")
    if len(pixels) < FEWEST:
        raise LearnError(f"There are too few {what}: {len(pixels)}. Give at least {FEWEST}, better 5 to 20.")
    values = pixels.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise LearnError(f"The {what} hold values that are not finite (NaN or infinity).")
    low, high = float(values.min()), float(values.max())
    if not latents and max(-low, high) > 1 + 1e-3:
        raise LearnError(f"The {what} must be {kind}; these go from {low:.4g} to {high:.4g}.")
    if bool((values == values[:1]).all()):
        raise LearnError(f"All {len(values)} {what} are identical: what they have in common cannot be told.")
    return values


def held_out(count: int, holdout: float, generator: torch.Generator) -> Tensor:
    """(count,) bool: whole pictures, at least one and not all."""
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=generator)[: min(count - 1, max(1, round(holdout * count)))]] = True
    return held


def about(sets: list[Tensor]) -> dict[str, str]:
    """How many pictures, and a sha256 of their values (fp32, as given), for the vector's metadata."""
    found = {}
    for part, ending in zip(sets, ("", "_without"), strict=False):
        found[f"pictures{ending}"] = str(len(part))
        found[f"picture_set_hash{ending}"] = hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()
    return found
