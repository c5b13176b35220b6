"""Draw and judge in small blocks that are kept on disk: what was drawn before a kill, or by another process, stays.

A block is up to `BLOCK` pictures of one role in one template by one method. Its file holds verdicts, features and
distances to the unsteered pictures of the same seeds; only unsteered blocks keep the pictures themselves.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..demo import judges, world
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..fairness import Attribute, Target, assign
from ..fairness.assignment import Mode
from ..vector_file import write_atomic
from .fairness_methods import EDIT_SCALE, METHODS, STEERED, TEMPLATES, VALUES, Order, Vectors

BLOCK = 50
HEADS = ("gender", "tone", "role", "expression")
Block = dict[str, np.ndarray]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to draw. pictures: per role and template. seed: of the assignment; pictures have seeds of their own."""

    folder: Path
    roles: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES
    attributes: tuple[str, ...] = tuple(STEERED)
    methods: tuple[str, ...] = tuple(METHODS)
    pictures: int = 150
    steps: int = 12
    guidance: float = 4.0
    seed: int = 0
    edit_scale: float = EDIT_SCALE
    vectors: Mapping[str, Vectors] = field(default_factory=dict)  # by method
    sets: Mapping[str, Attribute] = field(default_factory=dict)

    def places(self) -> list[tuple[str, str, range]]:
        """(template, role, picture numbers) of every block; those of one role lie far apart, for even shards."""
        starts = range(0, self.pictures, BLOCK)
        blocks = [range(first, min(first + BLOCK, self.pictures)) for first in starts]
        return [(template, role, block) for block in blocks for template in self.templates for role in self.roles]

    def series(self) -> Iterator[tuple[str, str, Mode]]:
        """(method, attribute, mode) of everything that is drawn; "none" comes first and belongs to no attribute."""
        yield "none", "", "quota"
        for attribute in self.attributes:
            for method in self.methods:
                if method != "none":
                    yield method, attribute, "quota"
                if method == "fair_sampling":
                    yield method, attribute, "random"


def picture_seed(role: str, template: str, picture: int) -> int:
    """The same for every method; never one that learning uses (those start at 0)."""
    return 1_000_000 + 20_000 * world.ROLE_NAMES.index(role) + 10_000 * TEMPLATES.index(template) + picture


def wanted(job: Job, attribute: str, template: str, role: str, pictures: range, mode: Mode) -> list[dict[str, str]]:
    """What each picture is assigned. A role and template is one run: its quota is filled from its first picture on."""
    run = job.seed + 2 * world.ROLE_NAMES.index(role) + TEMPLATES.index(template)
    targets = [Target(job.sets[name]) for name in STEERED[attribute]]
    return assign(targets, len(pictures), seed=run, mode=mode, first=pictures.start)


def path_of(job: Job, method: str, attribute: str, mode: Mode, template: str, role: str, pictures: range) -> Path:
    series = "-".join(part for part in (attribute, method, "random" if mode == "random" else "") if part)
    name = f"{template}-{role.replace(' ', '_')}-{pictures.start:05d}-{pictures.stop:05d}.npz"
    return job.folder / "blocks" / series / name


class Studio:
    """The model and its judges."""

    def __init__(self, denoiser: Denoiser, judge: judges.Judges | None = None) -> None:
        self.denoiser, self.judges = denoiser, judge or judges.Judges()

    @torch.no_grad()
    def pixels(self, method: str, order: Order) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the CPU, where the judges are."""
        latents = METHODS[method](self.denoiser, order).to(self.denoiser.dtype)
        return torch.cat([self.denoiser.decode(part).float().cpu().clamp(-1, 1) for part in latents.split(order.batch)])

    def judged(self, pixels: Tensor) -> Block:
        """Most probable class per head (n,), pooled features (n, 480) in half precision."""
        verdict = self.judges(pixels)
        found = {head: verdict.probabilities[head].argmax(1).numpy().astype(np.int16) for head in HEADS}
        return {**found, "features": self.judges.features(pixels).numpy().astype(np.float16)}


def draw_all(job: Job, studio: Studio, *, shard: tuple[int, int] = (0, 1), say: Say = print) -> int:
    """Draw what is missing of this shard (number, of how many); how many blocks were drawn."""
    places = job.places()[shard[0] :: shard[1]]
    done = 0
    for number, (template, role, pictures) in enumerate(places):
        before = done
        for method, attribute, mode in job.series():
            path = path_of(job, method, attribute, mode, template, role, pictures)
            if path.is_file():
                continue
            block = draw_block(job, studio, method, attribute, mode, template, role, pictures)
            write_block(path, block)
            done += 1
        if done > before:
            say(f"{number + 1} of {len(places)}: {role}, {template}, pictures {pictures.start} to {pictures.stop - 1}")
    return done


def order_of(
    job: Job, method: str, attribute: str, mode: Mode, template: str, role: str, pictures: Sequence[int]
) -> Order:
    """The order for some pictures of one role, whatever blocks they lie in."""
    span = range(min(pictures), max(pictures) + 1)
    values = wanted(job, attribute, template, role, span, mode) if attribute else [{} for _ in span]
    return Order(
        role,
        template,
        [picture_seed(role, template, i) for i in pictures],
        [values[i - span.start] for i in pictures],
        job.steps,
        job.guidance,
        vectors=job.vectors.get(method, {}),
        sets=job.sets,
        edit_scale=job.edit_scale,
    )


def draw_block(
    job: Job, studio: Studio, method: str, attribute: str, mode: Mode, template: str, role: str, pictures: range
) -> Block:
    """Random draws only draw what their quota twins do not have: the pictures whose assigned values differ."""
    chosen = list(pictures)
    if mode == "random":
        other = wanted(job, attribute, template, role, pictures, "quota")
        mine = wanted(job, attribute, template, role, pictures, "random")
        chosen = [i for i, a, b in zip(pictures, mine, other, strict=True) if a != b]
    if not chosen:
        return {"pictures": np.zeros(0, np.int32)}
    order = order_of(job, method, attribute, mode, template, role, chosen)
    cost = studio.denoiser.cost.snapshot()
    pixels = studio.pixels(method, order)
    rows = studio.denoiser.cost.since(cost).unet_rows / len(chosen)
    block = {"pictures": np.array(chosen, np.int32), "rows": np.array(rows), **studio.judged(pixels)}
    for name, values in VALUES.items():
        block[f"wanted_{name}"] = np.array(
            [values.index(w[name]) if name in w else -1 for w in order.wanted], dtype=np.int16
        )
    eight_bit = ((pixels + 1) * 127.5).round().byte().numpy()
    if method == "none":
        return {**block, "pixels": eight_bit}
    plain = read_block(path_of(job, "none", "", "quota", template, role, pictures))
    places = [i - pictures.start for i in chosen]
    block["pixel_distance"] = (
        np.abs(plain["pixels"][places].astype(np.float32) - eight_bit).mean((1, 2, 3)) / 255
    ).astype(np.float32)
    block["feature_distance"] = _cosine_distance(plain["features"][places], block["features"])
    return block


def _cosine_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    a, b = torch.from_numpy(one).float(), torch.from_numpy(other).float()
    return (1 - torch.cosine_similarity(a, b)).numpy()


def write_block(path: Path, block: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(block)
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue(), overwrite=True)


def read_block(path: Path) -> Block:
    """Errors: ConceptSteerError, which names the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ConceptSteerError(f"{path} is damaged ({error}): delete it and run again.") from error


def load_series(
    job: Job, method: str, attribute: str, mode: Mode, template: str, role: str
) -> dict[str, np.ndarray[Any, Any]]:
    """All pictures of a role in order; random draws are completed from the quota's. Without pixels.

    Errors: ConceptSteerError when blocks are missing.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for _, _, pictures in replace(job, roles=(role,), templates=(template,)).places():
        path = path_of(job, method, attribute, mode, template, role, pictures)
        if not path.is_file():
            raise ConceptSteerError(f"{os.fspath(path)} is not drawn yet: run again without --shard to draw the rest.")
        block = read_block(path)
        if mode == "random":
            quota = read_block(path_of(job, method, attribute, "quota", template, role, pictures))
            block = _completed(quota, block)
        for name, values in block.items():
            if name != "pixels":
                parts.setdefault(name, []).append(np.full(len(pictures), values) if values.ndim == 0 else values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _completed(quota: Block, random: Block) -> Block:
    """The quota's block with the pictures of `random` in their places."""
    places = np.searchsorted(quota["pictures"], random["pictures"])
    merged = {name: values.copy() for name, values in quota.items()}
    for name, values in random.items():
        if len(places) and values.ndim:
            merged[name][places] = values
    return merged
