"""Taking other concepts out of a vector: Gram-Schmidt (Haas et al. 2303.11073, sec. 4.3), or ridge regression.

With the others' unit vectors as rows of A: c - A'(AA' + ridge)^-1 A c, the residual of c regressed on the others. Ridge
0 is the exact projection, whatever the order of the others; above that a part of them stays: of a single other one
ridge / (1 + ridge). Unlike `ConceptVector.orthogonal_to` the result keeps its own shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..family import check
from ..vector import ConceptVector

SMALL = 1e-6  # of the length: what is left of a vector that lies in the others' span


@dataclass(frozen=True)
class Others:
    """Orthonormal directions (k, n), fp64 on the CPU (not every device has fp64), and the share (k,) taken of each."""

    directions: Tensor
    share: Tensor
    names: str

    def without(self, c: Tensor) -> Tensor:
        """c (..., C) or (..., C, H, W) without the others, in its own shape and dtype, on its device."""
        rows = c.detach().to("cpu", torch.float64).reshape(-1, self.directions.shape[1])
        for _ in range(1 if bool((self.share < 1).any()) else 2):  # the second time takes what rounding left
            rows = rows - (rows @ self.directions.T * self.share) @ self.directions
        return rows.reshape(c.shape).to(c.device, c.dtype)

    def __call__(self, c: Tensor) -> Tensor:
        """As `without`. Errors: LearnError when nothing is left."""
        result = self.without(c)
        if bool(c.any()) and float(result.norm()) <= SMALL * float(c.norm()):
            raise LearnError(f"Nothing of the vector is left without {self.names}: they mean the same direction.")
        return result


def others_of(
    against: Sequence[ConceptVector], denoiser: Denoiser, shape: Sequence[int], ridge: float = 0.0
) -> Others | None:
    """What to take out of vectors of `shape`, (C,) or (C, H, W); None for no others.

    A map counts by its mean for a (C,) vector (added to h at all positions, the two are then orthogonal) and is resized
    for a map; a vector that differs per timestep counts as one for each. Errors: FamilyMismatch, LearnError.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise LearnError(f"ridge is {ridge}; it is 0 (exactly orthogonal) or above (a part of the others stays).")
    if not against:
        return None
    found = []
    for other in against:
        source = f"The vector {other.name!r} to be orthogonal to"
        check(other.family, other.channels, denoiser.family, denoiser.channels, source=source)
        tensors = other.tensor if other.per_timestep else other.tensor[None]
        found += [_shaped(tensor, shape).double().flatten() for tensor in tensors]
    rows = torch.stack([row / row.norm() for row in found if bool(row.any())] or [torch.zeros_like(found[0])])
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    real = sizes > SMALL
    share = sizes[real].square() / (sizes[real].square() + ridge)
    names = ", ".join(repr(other.name) for other in against)
    return Others(directions[real], share, names)


def _shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if len(shape) == 1:
        return tensor if tensor.ndim == 1 else tensor.mean((1, 2))
    if tensor.ndim == 1:
        return tensor.view(-1, 1, 1).expand(tuple(shape))
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    return F.interpolate(tensor[None], tuple(shape[1:]), mode="bilinear", align_corners=False)[0]


def about_others(against: Sequence[ConceptVector], ridge: float = 0.0) -> dict[str, str]:
    """For a vector's metadata: what it was made orthogonal to."""
    if not against:
        return {}
    found = {"orthogonal_to": " | ".join(f"{other.name} ({other.fingerprint[:10]})" for other in against)}
    return found | ({"ridge": f"{ridge:g}"} if ridge else {})
