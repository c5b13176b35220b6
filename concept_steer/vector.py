"""ConceptVector: a direction in h-space (the output of the UNet's mid block), its algebra and its file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import vector_file
from .errors import ConceptSteerError, FamilyMismatch, VectorFileError
from .family import family as family_of


@dataclass(frozen=True, eq=False)
class ConceptVector:
    """A direction c to add to h (B, C, H, W). Immutable: every operation returns a new vector.

    tensor: (C,), (C, H, W), or per timestep (T, C), (T, C, H, W); kept as a contiguous fp32 CPU copy, all finite.
    timesteps: the T training timesteps (0..999) of a per-timestep vector, else (). info: further metadata, all strings.
    `==` and hash compare what a vector does (tensor, family, site, timesteps), not its title or info.
    Errors: ConceptSteerError for a shape, a number or a key that cannot be.
    """

    tensor: Tensor
    family: str
    title: str = ""
    site: str = "mid"
    timesteps: tuple[float, ...] = ()
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or not self.tensor.is_floating_point():
            raise ConceptSteerError("A concept vector is a tensor of floating point numbers; convert it with .float().")
        with torch.inference_mode(False):  # a tensor made in inference mode could not be used in learning
            tensor = self.tensor.detach().clone().to("cpu", torch.float32).contiguous() + 0.0  # no negative zeros
        values: dict[str, Any] = {
            "tensor": tensor,
            "timesteps": tuple(float(t) for t in self.timesteps),
            "info": MappingProxyType({key: _text(key, value) for key, value in dict(self.info).items()}),
            "_copies": {},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        shape = tuple(self.tensor.shape)
        if self.tensor.ndim not in vector_file.NDIMS or self.tensor.numel() == 0:
            raise ConceptSteerError(
                f"A concept vector cannot have the shape {shape}; expected {' or '.join(vector_file.NDIMS.values())}."
            )
        if not bool(torch.isfinite(self.tensor).all()):
            bad = int((~torch.isfinite(self.tensor)).sum())
            raise ConceptSteerError(
                f"The vector {self.name!r} holds {bad} values that are not finite (NaN or infinity), which would spoil "
                "every picture: learn it again (a lower rate helps), or get it again from its source."
            )
        kind = family_of(self.family)
        if self.channels != kind.channels:
            raise FamilyMismatch(
                f"A vector for {kind.title} ({self.family}) must have {kind.channels} channels, but the shape {shape} "
                f"has {self.channels}: it was made for another model family."
            )
        steps = self.timesteps
        wanted = shape[0] if self.per_timestep else 0
        if len(steps) != wanted or len(set(steps)) != len(steps) or not all(0 <= t <= 999 for t in steps):
            raise ConceptSteerError(
                f"The shape {shape} needs {wanted} different timesteps from 0 to 999, not {list(steps)[:12]}."
            )
        if not isinstance(self.site, str) or not self.site or not isinstance(self.title, str):
            raise ConceptSteerError("A vector's title is a text, and its site a text such as 'mid'.")

    @property
    def name(self) -> str:
        """The title, or for a vector without one the first ten digits of its fingerprint."""
        return self.title or self.fingerprint[:10]

    @property
    def per_timestep(self) -> bool:
        return self.tensor.ndim in (2, 4)

    @property
    def spatial(self) -> bool:
        return self.tensor.ndim >= 3

    @property
    def channels(self) -> int:
        return self.tensor.shape[1 if self.per_timestep else 0]

    @property
    def norm(self) -> float:
        """The Euclidean norm of the whole tensor."""
        return float(self.tensor.double().norm())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of what the vector does; titles and other texts do not change it."""
        about = [list(self.tensor.shape), self.family, self.site, list(self.timesteps)]
        return hashlib.sha256(json.dumps(about).encode() + b"\0" + self.tensor.numpy().tobytes()).hexdigest()

    def at(self, timestep: float | None, device: torch.device | str = "cpu") -> Tensor:
        """(C,) or (C, H, W), fp32, at a training timestep (the nearest one stored). Do not change it in place.

        Copies to other devices are kept with the vector. Errors: ConceptSteerError when a timestep is needed.
        """
        tensor = self._on(torch.device(device))
        if not self.per_timestep:
            return tensor
        if timestep is None or math.isnan(timestep):
            raise ConceptSteerError(f"The vector {self.name!r} differs from step to step: it needs the timestep.")
        nearest = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))
        return tensor[nearest]

    def _on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self.tensor
        copies: dict[torch.device, Tensor] = self.__dict__["_copies"]
        if device not in copies:
            with torch.inference_mode(False):  # see __post_init__
                copies[device] = self.tensor.to(device)
        return copies[device]

    def __add__(self, other: ConceptVector) -> ConceptVector:
        if not isinstance(other, ConceptVector):
            return NotImplemented
        (a, b), timesteps, spatial = _aligned(self, other)
        common = {k: v for k, v in self.info.items() if other.info.get(k) == v}
        title = " + ".join(t for t in (self.title, other.title) if t)
        return ConceptVector(
            _compact(a + b, timesteps, spatial), self.family, title, self.site, timesteps, _without_effect(common)
        )

    def __sub__(self, other: ConceptVector) -> ConceptVector:
        return self + -other if isinstance(other, ConceptVector) else NotImplemented

    def __mul__(self, factor: float) -> ConceptVector:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return replace(self, tensor=self.tensor * factor, info=_without_effect(self.info))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ConceptVector:
        if isinstance(divisor, bool) or not isinstance(divisor, (int, float)):
            return NotImplemented
        if divisor == 0:
            raise ConceptSteerError(f"The vector {self.name!r} cannot be divided by zero.")
        return replace(self, tensor=self.tensor / divisor, info=_without_effect(self.info))

    def __neg__(self) -> ConceptVector:
        plain = self.title.removeprefix("opposite of ")
        title = f"opposite of {plain}" if plain and plain == self.title else plain
        return replace(self, tensor=-self.tensor, title=title, info=_without_effect(self.info))

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, ConceptVector) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __copy__(self) -> ConceptVector:
        return self

    def __deepcopy__(self, memo: Any) -> ConceptVector:
        return self  # immutable; ComfyUI deep-copies everything that hangs on a model

    def __reduce__(self) -> tuple[Any, ...]:
        return ConceptVector, (self.tensor, self.family, self.title, self.site, self.timesteps, dict(self.info))

    def cosine(self, other: ConceptVector) -> float:
        """Cosine of the angle between two vectors, -1..1; 0.0 when one of them is zero. Shapes broadcast as in `+`."""
        (a, b), _, _ = _aligned(self, other)
        a, b = a.double(), b.double()
        length = float(a.norm() * b.norm())
        return max(-1.0, min(1.0, float((a * b).sum()) / length)) if length > 0 else 0.0

    def orthogonal_to(self, *others: ConceptVector) -> ConceptVector:
        """This vector without its parts along all `others` (Gram-Schmidt, Haas et al. 2303.11073), per timestep.

        Errors: FamilyMismatch; ConceptSteerError when nothing would be left.
        """
        tensors, timesteps, spatial = _aligned(self, *others)
        rows = [t.double().flatten(1) for t in tensors]
        basis: list[Tensor] = []
        for row in rows[1:]:
            rest = _without(row, basis)
            keep = rest.norm(dim=1, keepdim=True) > 1e-6 * row.norm(dim=1, keepdim=True)
            basis.append(torch.where(keep, F.normalize(rest, dim=1, eps=1e-300), torch.zeros_like(rest)))
        result = _without(rows[0], basis)
        if others and 0 < float(rows[0].norm()) * 1e-6 >= float(result.norm()):
            names = ", ".join(repr(o.name) for o in others)
            raise ConceptSteerError(f"Nothing of {self.name!r} is left without {names}: they mean the same direction.")
        tensor = _compact(result.reshape(tensors[0].shape), timesteps, spatial)
        return replace(self, tensor=tensor, timesteps=timesteps, info=_without_effect(self.info))

    def with_info(self, **kw: Any) -> ConceptVector:
        """The same vector with further metadata; None takes an entry away."""
        return replace(self, info={k: v for k, v in {**self.info, **kw}.items() if v is not None})

    def with_title(self, title: str) -> ConceptVector:
        return replace(self, title=title)

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write one .safetensors file, atomically; missing folders are made. Errors: VectorFileError."""
        path = Path(path)
        if path.suffix != vector_file.SUFFIX:
            raise VectorFileError(
                f"{path} must end in {vector_file.SUFFIX}: concept vectors are saved in no other format."
            )
        data = vector_file.to_bytes(
            self.tensor,
            family=self.family,
            title=self.title,
            site=self.site,
            channels=self.channels,
            timesteps=self.timesteps,
            info=self.info,
        )
        if len(data) > vector_file.MAX_BYTES:
            raise VectorFileError(
                f"{path} would have {len(data) / 2**20:.0f} MiB, more than the {vector_file.MAX_BYTES // 2**20} MiB "
                "a vector may have: keep fewer timesteps or a smaller map."
            )
        return vector_file.write_atomic(path, data, overwrite=overwrite)

    @classmethod
    def load(cls, path: Path | str) -> ConceptVector:
        """Read and check one file. Errors: VectorFileError, which names the file and says what is wrong with it."""
        fields = vector_file.read(Path(path))
        try:
            return cls(**fields)
        except ConceptSteerError as error:
            raise VectorFileError(f"{path}: {error}") from error


def _text(key: object, value: object) -> str:
    if not isinstance(key, str) or not key or key in vector_file.RESERVED_INFO:
        raise ConceptSteerError(
            f"{key!r} cannot be a key of a vector's info; use a text other than {vector_file.RESERVED_INFO}."
        )
    if not isinstance(value, (str, int, float)):
        raise ConceptSteerError(
            f"A vector's info holds texts only, but {key} is {type(value).__name__}: write it as JSON."
        )
    return str(value)


def _without_effect(info: Mapping[str, str]) -> dict[str, str]:
    """A measured effect belongs to the vector it was measured on."""
    return {k: v for k, v in info.items() if k != "effect"}


def _aligned(*vectors: ConceptVector) -> tuple[list[Tensor], tuple[float, ...], bool]:
    """All tensors in one common shape (T or 1, C, H or 1, W or 1), their timesteps, and whether any has a map."""
    first = vectors[0]
    for other in vectors[1:]:
        if other.family != first.family:
            raise FamilyMismatch(
                f"{first.name!r} was made for {family_of(first.family).title} ({first.family}) and {other.name!r} for "
                f"{family_of(other.family).title} ({other.family}): vectors of different families cannot be combined."
            )
        if other.site != first.site:
            raise ConceptSteerError(
                f"{first.name!r} acts at {first.site!r}, {other.name!r} at {other.site!r}: use them side by side."
            )
    timesteps = {v.timesteps for v in vectors if v.per_timestep}
    maps = {tuple(v.tensor.shape[-2:]) for v in vectors if v.spatial}
    for what, found in (("timesteps", timesteps), ("map sizes", maps)):
        if len(found) > 1:
            names = " and ".join(repr(v.name) for v in vectors)
            raise ConceptSteerError(
                f"{names} have different {what}, {found}: use them side by side instead, their effects add up."
            )
    full = [v.tensor if v.per_timestep else v.tensor[None] for v in vectors]
    full = [t if t.ndim == 4 else t[..., None, None] for t in full]
    return list(torch.broadcast_tensors(*full)), next(iter(timesteps), ()), bool(maps)


def _compact(tensor: Tensor, timesteps: tuple[float, ...], spatial: bool) -> Tensor:
    """The inverse of `_aligned`, for a result of shape (T or 1, C, H or 1, W or 1)."""
    tensor = tensor if timesteps else tensor[0]
    return tensor if spatial else tensor[..., 0, 0]


def _without(rows: Tensor, basis: list[Tensor]) -> Tensor:
    for unit in basis + basis:  # twice: nearly parallel vectors lose digits the first time
        rows = rows - (rows * unit).sum(1, keepdim=True) * unit
    return rows
