"""What steering adds to h, as pure functions: Steer(vector, strength, schedule, rows, mask, operator) -> delta(h).

h: (B, C, H, W), the output of the UNet's mid block. Adding a vector: Haas et al. 2303.11073, Li et al. 2311.17216;
taking the positive projection away, or acting only where the concept is present: CASteer 2503.09630.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConceptSteerError, FamilyMismatch, SettingError
from .family import check
from .family import family as family_of
from .schedule import Schedule, percent_of_timestep
from .vector import ConceptVector

Rows = Literal["cond", "uncond", "both"]
Operator = Literal["add", "remove", "gated"]


class Gate(Protocol):
    """Decides, from h at every step, for which pictures a steer acts. The others keep their bits."""

    @property
    def fingerprint(self) -> str:
        """Of what it does."""
        ...

    def at(self, timestep: float, device: torch.device | str = "cpu") -> Any:
        """The tensors that `opened` needs at a timestep."""
        ...

    def opened(self, h: Tensor, at: Any) -> Tensor:
        """(B, 1, 1, 1) bool for h (B, C, H, W): tensor code only."""
        ...

    def saw(self, timestep: float, opened: Tensor, pictures: Sequence[int | None] | None = None) -> None:
        """Told what it opened. pictures: of each row of h its picture's number, None where the steer does not act.

        None for all: row i is picture i. What a gate is told never changes what it opens.
        """
        ...


@dataclass(frozen=True, eq=False)
class Steer:
    """One vector at work. Immutable, so it may be shared between threads, branches of a graph and copies of a model.

    rows: which part of the CFG batch. mask: (H, W) or (1, H, W), 0..1, any size. threshold: for "gated", in units of h.
    gate: with one, the steer acts on those pictures only whose h opens it, step by step.
    Errors: SettingError for a value out of range.
    """

    vector: ConceptVector
    strength: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    rows: Rows = "cond"
    mask: Tensor | None = None
    operator: Operator = "add"
    threshold: float = 0.0
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for name, value in (("strength", self.strength), ("threshold", self.threshold)):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise SettingError(f"The {name} of {self.vector.name!r} is {value!r}; it must be a finite number.")
        for name, choice, known in (("rows", self.rows, Rows), ("operator", self.operator, Operator)):
            if choice not in get_args(known):
                raise SettingError(
                    f"The {name} of {self.vector.name!r} is {choice!r}; known are {', '.join(get_args(known))}."
                )
        mask = None if self.mask is None else _checked_mask(self.mask, self.vector.name)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "_masks", {})

    def __copy__(self) -> Steer:
        return self

    def __deepcopy__(self, memo: Any) -> Steer:
        return self  # immutable; ComfyUI deep-copies everything that hangs on a model

    def gain(self, timestep: float) -> float:
        """strength * ramp at a training timestep (0..999); exactly 0.0 when nothing is to be added."""
        return self.strength * self.schedule.weight(percent_of_timestep(timestep))

    def mask_for(self, h: Tensor) -> Tensor | None:
        """(1, 1, H, W), fp32, at the size of h and on its device; kept with the steer."""
        return self.mask_at(h.shape[-2:], h.device)

    def mask_at(self, size: Sequence[int], device: torch.device) -> Tensor | None:
        """As `mask_for`, for a size (H, W) that is known before h is."""
        if self.mask is None:
            return None
        key = (tuple(size), device)
        masks: dict[Any, Tensor] = self.__dict__["_masks"]
        if key not in masks:
            with torch.inference_mode(False):  # kept for later, perhaps for learning
                # antialias: from 512 pixels down to 8, plain bilinear reads so few that a small region may vanish
                resized = F.interpolate(self.mask[None], key[0], mode="bilinear", align_corners=False, antialias=True)
                masks[key] = resized.clamp(0, 1).to(device)
        return masks[key]

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """A key that depends on the content only: sums are taken in this order."""
        s = self.schedule
        digest = "" if self.mask is None else hashlib.sha256(self.mask.numpy().tobytes()).hexdigest()
        start_end = (s.start, s.end, s.fade)
        gate = "" if self.gate is None else self.gate.fingerprint
        return (
            self.vector.fingerprint,
            self.strength,
            self.rows,
            self.operator,
            *start_end,
            self.threshold,
            digest,
            gate,
        )


def delta(h: Tensor, steer: Steer, timestep: float, pictures: Sequence[int | None] | None = None) -> Tensor | None:
    """What one steer adds to h (B, C, H, W; any float dtype): fp32, broadcastable to h; None when it adds nothing.

    `timestep`: the model's training timestep, 999 (noise) .. 0 (picture). `pictures`: of each row, None where it will
    not be steered; only a gate wants to know them, see `Gate.saw`.
    With c the vector and v its unit vector, both per position:
    add: strength * ramp * c * mask; remove: -strength * ramp * max(<h, v>, 0) * v * mask;
    gated: as add, where <h, v> > threshold. Errors: FamilyMismatch when h has other channels than the vector.
    """
    if h.ndim != 4 or not h.is_floating_point():
        raise ConceptSteerError(f"h must be a (B, C, H, W) tensor of floats, not {tuple(h.shape)} of {h.dtype}.")
    if h.shape[1] != steer.vector.channels:
        raise FamilyMismatch(
            f"{steer.vector.name!r} has {steer.vector.channels} channels (made for "
            f"{family_of(steer.vector.family).title}), but the steered block has "
            f"{h.shape[1]}: load the model it was made for, or choose another vector."
        )
    gain = steer.gain(timestep)
    if gain == 0.0:
        return None
    c = sized(steer.vector.at(timestep, h.device), h.shape[-2:])
    result = formula(h, c, gain, steer.operator, steer.threshold)
    if steer.gate is not None:
        opened = steer.gate.opened(h, steer.gate.at(timestep, h.device))
        steer.gate.saw(timestep, opened, pictures)
        result = torch.where(opened, result, torch.zeros_like(result))
    mask = steer.mask_for(h)
    return result if mask is None else result * mask


def formula(h: Tensor, c: Tensor, gain: float | Tensor, operator: Operator, threshold: float | Tensor = 0.0) -> Tensor:
    """The three operators, fp32: h (B, C, H, W), c (1, C, H or 1, W or 1) fp32, gain a number or (B, 1, 1, 1).

    Pure tensor code without branches on values, so that a compiled UNet stays in one graph.
    """
    if operator == "add":
        return c * gain
    v = F.normalize(c, dim=1)
    presence = (h.float() * v).sum(dim=1, keepdim=True)  # (B, 1, H, W)
    if operator == "remove":
        return presence.clamp_min(0) * v * -gain
    return c * gain * (presence > threshold)


def total(
    h: Tensor, steers: Sequence[Steer], timestep: float, pictures: Sequence[int | None] | None = None
) -> Tensor | None:
    """The sum of all deltas, fp32, broadcastable to h, or None. The order of `steers` never changes a bit."""
    result: Tensor | None = None
    for steer in in_order(steers):
        part = delta(h, steer, timestep, pictures)
        if part is not None:
            result = part if result is None else result + part
    return result


def apply(
    h: Tensor,
    steers: Sequence[Steer],
    timestep: float,
    is_cond: Sequence[bool] | Tensor,
    pictures: Sequence[int] | None = None,
) -> Tensor:
    """h (B, C, H, W) steered: a new tensor of the same dtype, or the very same `h` when nothing acts.

    `is_cond`: for each of the B rows, whether it belongs to the prompt (cond) or to the negative prompt (uncond).
    `pictures`: the number of each row's picture, for gates; by default the rows of each side are the pictures in order.
    Rows that no steer addresses keep their bits. Differentiable with respect to h.
    """
    flags = [bool(x) for x in (is_cond.tolist() if isinstance(is_cond, Tensor) else is_cond)]
    if len(flags) != h.shape[0]:
        raise ConceptSteerError(
            f"h has {h.shape[0]} rows, but {len(flags)} were named cond or uncond: the batch layout is not understood."
        )
    numbers = places(flags) if pictures is None else pictures
    result = h
    for kind, wanted in (("cond", True), ("uncond", False)):
        if wanted not in flags:
            continue
        mine = [s for s in steers if s.rows in (kind, "both")]
        own = [number if flag == wanted else None for flag, number in zip(flags, numbers, strict=True)]
        added = total(h, mine, timestep, own)
        if added is None:
            continue
        # summed in at least fp32 and rounded once, so that half precision hosts lose as little as possible
        wide = torch.promote_types(h.dtype, torch.float32)
        steered = (h.to(wide) + added.to(wide)).to(h.dtype)
        if any(s.gate is not None for s in mine):
            steered = torch.where(added == 0, h, steered)  # adding 0 would turn the sign of -0
        if flags.count(wanted) == len(flags):
            return steered
        chosen = torch.tensor([flag == wanted for flag in flags], device=h.device).view(-1, 1, 1, 1)
        result = torch.where(chosen, steered, result)
    return result


def places(flags: Sequence[bool]) -> list[int]:
    """For each row, how many rows of its own side (cond or uncond) come before it."""
    return [list(flags[:row]).count(flag) for row, flag in enumerate(flags)]


def check_steers(steers: Sequence[Steer], family: str, channels: int) -> None:
    """Errors: FamilyMismatch when a vector was not made for a model of this family and mid-block width."""
    for steer in steers:
        source = f"The vector {steer.vector.name!r}"
        check(steer.vector.family, steer.vector.channels, family, channels, source=source)


def in_order(steers: Iterable[Steer]) -> list[Steer]:
    """Sorted by what they are, so that no sum depends on the order in which they were given."""
    found = list(steers)
    return found if len(found) < 2 else sorted(found, key=lambda s: s.order)


def sized(c: Tensor, size: Sequence[int]) -> Tensor:
    """(C,) as (1, C, 1, 1); (C, H, W) as (1, C, *size), bilinear."""
    if c.ndim == 1:
        return c.view(1, -1, 1, 1)
    if tuple(c.shape[-2:]) == tuple(size):
        return c[None]
    return F.interpolate(c[None], tuple(size), mode="bilinear", align_corners=False)


def _checked_mask(mask: Tensor, name: str) -> Tensor:
    if (
        not isinstance(mask, Tensor)
        or mask.ndim not in (2, 3)
        or (mask.ndim == 3 and mask.shape[0] != 1)
        or mask.numel() == 0
    ):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SettingError(f"The mask of {name!r} is {shape}; it must be one picture, (H, W) or (1, H, W).")
    with torch.inference_mode(False):
        mask = mask.detach().clone().to("cpu", torch.float32).contiguous()
    if not bool(((mask >= 0) & (mask <= 1)).all()):  # also false for NaN
        raise SettingError(f"The mask of {name!r} must hold values from 0 (no effect) to 1 (full effect) only.")
    return mask if mask.ndim == 3 else mask[None]
