"""Which rows of a ComfyUI batch a vector acts on, and what exactly is added to h there: the plan of one evaluation.

Rows come in chunks, one per conditioning, in whatever order and number ComfyUI's memory and guiders choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptSteerError, SafetyError
from ..steering import Gate, Steer, formula, in_order, sized

KEY = "concept_steer"
STEERS, PICTURES, ROWS, PLAN = (f"{KEY}_{name}" for name in ("steers", "pictures", "rows", "plan"))
SAFETY = f"{KEY}_safety"  # the guider's list of conditionings that only safety guidance looks at: never steered
ASIDE = "aside"  # its kind of row
Area = tuple[int, int, int, int]  # height, width, top, left, in cells of the latent


class Gated(NamedTuple):
    """A steer's gate at the timestep of one evaluation; `seen` receives what it opened, (B, 1, 1, 1) bool.

    None in it: another plan for the same rows was made, used and told of further in.
    """

    gate: Gate
    at: Any
    timestep: float
    pictures: list[int | None]
    seen: list[Tensor | None]


class Term(NamedTuple):
    """A steer that depends on h. c (1, C, H or 1, W or 1), gain (B, 1, 1, 1), mask (1 or B, 1, H, W)."""

    c: Tensor
    gain: Tensor
    operator: str
    threshold: float
    mask: Tensor | None
    gated: Gated | None = None


Plan = tuple[Tensor | None, tuple[Term, ...], Tensor | None]  # what is added, what depends on h, rows (B, 1, 1, 1)


@dataclass(frozen=True)
class Row:
    """What is known of one conditioning: is it the prompt's (None: look at its index), its area, its own steers."""

    kind: str | None
    area: Area | None = None
    steers: tuple[Steer, ...] = ()


@dataclass(frozen=True)
class Rows:
    """All conditionings of one evaluation by uuid, and the latent's size (H, W)."""

    by_uuid: Mapping[Any, Row] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    @staticmethod
    def of(guider: Any, x: Tensor) -> Rows:
        """Lists named negative or empty (PerpNeg's) are the unconditional side; all others are prompts (DualCFG)."""
        _tell_apart(guider)
        rows: dict[Any, Row] = {}
        for name, conds in (getattr(guider, "conds", None) or {}).items():
            kind: str | None = "uncond" if "negative" in name or "empty" in name else "cond"
            kind = ASIDE if name == SAFETY else kind
            for cond in conds or ():
                uuid = cond.get("uuid")
                seen = rows.get(uuid)
                mine = tuple(cond.get(KEY, ()))
                # one id in two lists, and nothing says whose it was: then the index decides
                rows[uuid] = Row(kind if seen is None or seen.kind == kind else None, _area(cond), mine)
        return Rows(rows, (int(x.shape[-2]), int(x.shape[-1])))


def plan_of(options: Mapping[str, Any], x: Tensor, timestep: float, halvings: int) -> Plan | None:
    """What to add to h (B, C, H, W) of a batch x (B, ...) at a timestep, or None when nothing acts.

    Chunk i of the batch is conditioning i of `cond_or_uncond` / `uuids`; where those are missing, all rows are prompts.
    Each chunk holds all pictures in order; a picture may have steers of its own (options[PICTURES]).
    """
    everywhere: tuple[Steer, ...] = options.get(STEERS, ())
    rows: Rows = options.get(ROWS) or Rows()
    indices = list(options.get("cond_or_uncond") or [0])
    uuids = list(options.get("uuids") or [None] * len(indices))
    if x.shape[0] % len(indices):
        raise ConceptSteerError(
            f"The batch has {x.shape[0]} rows for {len(indices)} conditionings: its layout is not understood, so "
            "nothing can be steered. Another node may change the batch; take it out to find which."
        )
    chunks = [_chunk(rows, uuid, index) for uuid, index in zip(uuids, indices, strict=True)]
    per_chunk = x.shape[0] // len(indices)
    pictures: Sequence[Sequence[Steer]] = options.get(PICTURES) or ((),) * per_chunk
    if len(pictures) != per_chunk:
        raise ConceptSteerError(
            f"{len(pictures)} pictures have steers of their own, but the batch has {per_chunk}: sample them unchanged."
        )
    total: Tensor | None = None
    terms: list[Term] = []
    acting = [False] * x.shape[0]
    own = [s for part in (*(chunk.steers for chunk in chunks), *pictures) for s in part]
    for steer in in_order(dict.fromkeys([*everywhere, *own])):
        gain = steer.gain(timestep)
        gains = [gain * _count(steer, [*everywhere, *mine], chunk) for chunk in chunks for mine in pictures]
        if not any(gains):
            continue
        acting = [was or bool(g) for was, g in zip(acting, gains, strict=True)]
        column = torch.tensor(gains, device=x.device).view(-1, 1, 1, 1)
        mask = _mask(steer, chunks, per_chunk, x, rows.size, halvings)
        c = sized(steer.vector.at(timestep, x.device), _halved(x.shape[-2:], halvings))
        if steer.operator == "add" and steer.gate is None:
            part = c * column if mask is None else c * column * mask
            total = part if total is None else total + part
        else:
            numbers = [i % per_chunk if g else None for i, g in enumerate(gains)]
            gated = _gated(steer, timestep, numbers, x.device)
            terms.append(Term(c, column, steer.operator, steer.threshold, mask, gated))
    if total is None and not terms:
        return None
    chosen = None
    if not all(acting):
        chosen = torch.tensor(acting, device=x.device).view(-1, 1, 1, 1)
    return total, tuple(terms), chosen


def steered(h: Tensor, plan: Plan) -> Tensor:
    """h (B, C, H, W) with the plan's sum, in at least fp32 and rounded once; rows nobody addresses keep their bits."""
    added, terms, chosen = plan
    added = None if added is None else _fitted(added, h)
    for c, gain, operator, threshold, mask, gated in terms:
        part = formula(h, _fitted(c, h), gain, operator, threshold)  # type: ignore[arg-type]
        part = part if mask is None else part * _fitted(mask, h)
        if gated is not None:
            opened = gated.gate.opened(h, gated.at)
            gated.seen.append(opened)
            part = torch.where(opened, part, torch.zeros_like(part))
        added = part if added is None else added + part
    wide = torch.promote_types(h.dtype, torch.float32)
    result = (h.to(wide) + added.to(wide)).to(h.dtype)  # type: ignore[union-attr]
    if any(term.gated is not None for term in terms):
        result = torch.where(added == 0, h, result)  # type: ignore[arg-type]  # adding 0 would turn the sign of -0
    return result if chosen is None else torch.where(chosen, result, h)


def tell_gates(plan: Plan) -> None:
    """After the evaluation, outside of compiled code: what was opened. Errors: SafetyError for a gate not asked."""
    for term in plan[1]:
        if term.gated is None:
            continue
        gate, _, timestep, pictures, seen = term.gated
        if not seen:
            raise SafetyError(
                "The UNet ran without its mid block's output passing the safety gate: another node or a replaced model "
                "(an engine, a cache) bypasses it. Take that out, or use Safe Latent Diffusion (method 'sld')."
            )
        if seen[-1] is not None:
            gate.saw(timestep, seen[-1], pictures)
        seen.clear()


def take_over(plan: Plan) -> None:
    """A plan made further in has been used in place of this one."""
    for term in plan[1]:
        if term.gated is not None:
            term.gated.seen.append(None)


def _gated(steer: Steer, timestep: float, pictures: list[int | None], device: torch.device) -> Gated | None:
    if steer.gate is None:
        return None
    return Gated(steer.gate, steer.gate.at(timestep, device), timestep, pictures, [])


def _tell_apart(guider: Any) -> None:
    """For every area ComfyUI copies its conditioning, id and vectors included, into the other lists (with their text).

    Such copies live for one run; they get ids of their own here, and do not keep vectors that were the original's.
    """
    given = getattr(guider, "original_conds", None) or {}
    home = {cond.get("uuid"): name for name, conds in given.items() for cond in conds or ()}
    for name, conds in (getattr(guider, "conds", None) or {}).items():
        for cond in conds or ():
            if home.get(cond.get("uuid"), name) != name:
                cond["uuid"] = uuid4()
                cond.pop(KEY, None)


def _chunk(rows: Rows, uuid: Any, index: int) -> Row:
    """A conditioning that no list of the guider has is another node's own (PerpNeg's empty prompt), and no prompt."""
    by_index = "cond" if index == 0 else "uncond"
    row = rows.by_uuid.get(uuid)
    if row is None:
        return Row("uncond" if rows.by_uuid and uuid is not None else by_index)
    return Row(row.kind or by_index, row.area, row.steers)


def _count(steer: Steer, everywhere: Sequence[Steer], chunk: Row) -> int:
    """How many times a steer acts on a chunk: as the model's, if the rows fit, and as this conditioning's own."""
    fits = steer.rows in (chunk.kind, "both") and chunk.kind != ASIDE
    return fits * sum(s is steer for s in everywhere) + sum(s is steer for s in chunk.steers)


def _halved(size: Sequence[int], times: int) -> tuple[int, int]:
    """The size of h for a latent of this size: every level down rounds up."""
    height, width = int(size[0]), int(size[1])
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _mask(
    steer: Steer, chunks: Sequence[Row], per_chunk: int, x: Tensor, size: tuple[int, int] | None, halvings: int
) -> Tensor | None:
    """(1 or B, 1, H, W) at the size of h. A conditioning with an area sees its own part of the mask."""
    if steer.mask is None:
        return None
    target = _halved(x.shape[-2:], halvings)
    if size is None or all(chunk.area is None for chunk in chunks):
        return steer.mask_at(target, x.device)
    parts = []
    for chunk in chunks:
        whole = steer.mask_at(size, x.device)
        if whole is None or chunk.area is None:
            part = steer.mask_at(target, x.device)
        else:
            height, width, top, left = chunk.area
            crop = whole[..., top : top + height, left : left + width]
            part = F.interpolate(crop, target, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
        parts.append(part.expand(per_chunk, -1, -1, -1))  # type: ignore[union-attr]
    return torch.cat(parts)


def _fitted(tensor: Tensor, h: Tensor) -> Tensor:
    """At the size of h, should another pack (DeepShrink) have changed that."""
    if tuple(tensor.shape[-2:]) in ((1, 1), tuple(h.shape[-2:])):
        return tensor
    return F.interpolate(tensor, h.shape[-2:], mode="bilinear", align_corners=False)


def _area(cond: Mapping[str, Any]) -> Area | None:
    area = cond.get("area")
    if area is None or len(area) != 4 or not all(isinstance(value, int) for value in area):
        return None
    return (area[0], area[1], area[2], area[3])
