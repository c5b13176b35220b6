"""Latent spaces by name: which VAE made a latent, and at which scale. A tower understands one space only.

Latents in this package are *scaled* ones, as the UNet sees them (standard deviation about 1). What the VAE itself
gives, and what ComfyUI hands from node to node, is unscaled: scaled = unscaled * scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import ConceptSteerError, FamilyMismatch


@dataclass(frozen=True)
class LatentSpace:
    """One VAE's latents. scaling: what the VAE's output is multiplied by for the UNet. families: whose VAE it is."""

    name: str
    title: str
    channels: int
    scaling: float
    families: tuple[str, ...]

    def words(self) -> str:
        return f"{self.title} ({self.name}, {self.channels} channels, scaling {self.scaling:.5g})"

    def check(self, latents: Tensor, source: str = "The latents") -> None:
        """Errors: ConceptSteerError for a shape other than (B, channels, H, W), and for values that are not finite."""
        shape = tuple(latents.shape)
        if latents.ndim != 4 or shape[1] != self.channels or 0 in shape[2:]:
            raise ConceptSteerError(
                f"{source} have the shape {shape}; expected (B, {self.channels}, H, W), as the latents of "
                f"{self.words()} are. Give latents of that model."
            )
        if not latents.is_floating_point():
            raise ConceptSteerError(f"{source} hold {latents.dtype} numbers; expected floating point ones.")
        if not bool(torch.isfinite(latents).all()):
            raise ConceptSteerError(f"{source} hold values that are not finite (NaN or infinity): make them anew.")

    def scaled(self, stored: Tensor, is_scaled: bool, source: str) -> Tensor:
        """Latents that somebody kept, as scaled ones, fp32. A spread that fits the other scale only is an error.

        Scaled latents of pictures have a standard deviation near 1, unscaled ones near 1 / scaling; the borders lie
        halfway (in the logarithm) and three quarters of the way, as a plain picture spreads little.
        """
        self.check(stored, source)
        latents = stored.float() * (1.0 if is_scaled else self.scaling)
        spread = float(latents.std())
        if spread == 0:
            raise ConceptSteerError(f"{source} hold the same number everywhere: nothing has been drawn in them yet.")
        if is_scaled and spread > self.scaling**-0.5:
            raise ConceptSteerError(
                f"{source} should be scaled latents of {self.words()}, with a standard deviation near 1, but it is "
                f"{spread:.2f}: they look unscaled, as the VAE gives them. Say so (--unscaled)."
            )
        if not is_scaled and spread < self.scaling**0.75:
            raise ConceptSteerError(
                f"{source} should be unscaled latents of {self.words()}, with a standard deviation near "
                f"{1 / self.scaling:.1f}, but it is {spread / self.scaling:.2f}: they look scaled, as the UNet sees "
                "them. Say so (--scaled)."
            )
        return latents


SPACES = MappingProxyType(
    {
        one.name: one
        for one in (
            LatentSpace("sd1", "the VAE of Stable Diffusion 1 and 2", 4, 0.18215, ("sd1", "sd2")),
            LatentSpace("sdxl", "the VAE of SDXL", 4, 0.13025, ("sdxl", "sdxl-refiner")),
            LatentSpace("demo", "the VAE of the embedded demo model", 4, 0.1938706, ("demo",)),
        )
    }
)


def space(name: str) -> LatentSpace:
    """The space of that name. Errors: ConceptSteerError, with the names there are."""
    if name not in SPACES:
        raise ConceptSteerError(f"The latent space {name!r} is not known; known are {', '.join(SPACES)}.")
    return SPACES[name]


def space_of(family: str) -> LatentSpace:
    """The space that models of a family draw in. Errors: ConceptSteerError when it cannot be told."""
    for one in SPACES.values():
        if family in one.families:
            return one
    raise ConceptSteerError(
        f"Which latent space models of the family {family!r} draw in is not known; known are "
        f"{', '.join(f for one in SPACES.values() for f in one.families)}. Use a model of one of these families."
    )


def check_space(wanted: LatentSpace, found: LatentSpace, source: str) -> None:
    """Errors: FamilyMismatch, naming both, when `source` (a model, a file) has latents of another space or scale."""
    same_scale = abs(found.scaling / wanted.scaling - 1) < 1e-3
    if found.name != wanted.name or found.channels != wanted.channels or not same_scale:
        raise FamilyMismatch(
            f"{source} has latents of {found.words()}, but this latent CLIP reads those of {wanted.words()}. Load a "
            "latent CLIP of the first space, or use a model and latents of the second."
        )


def fit(latents: Tensor, size: int, source: str = "The latents") -> Tensor:
    """(B, C, H, W) averaged over areas to (B, C, size, size): 1024 pixels for a tower of 512, and other shapes.

    Errors: ConceptSteerError when they are smaller than the tower's own size.
    """
    height, width = latents.shape[2:]
    if (height, width) == (size, size):
        return latents
    if min(height, width) < size:
        raise ConceptSteerError(
            f"{source} are {height} x {width} cells, but this latent CLIP reads {size} x {size} and larger: draw "
            "larger pictures."
        )
    return torch.nn.functional.interpolate(latents, (size, size), mode="area")
