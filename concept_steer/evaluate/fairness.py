"""`concept-steer evaluate fairness`: how fair, how faithful and how near to the unsteered pictures each way is.

Protocol of Li et al. 2311.17216 (sec. 4.1) on the embedded model's world: pictures of every role, judged for gender and
skin tone; the deviation ratio per role, averaged over roles. All methods draw the same seeds and get the same assigned
values. Vectors are learned once, on `LEARN_ROLES`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..demo import model, world
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..fairness import Attribute, learn_attribute
from ..hosts.diffusers import DiffusersDenoiser
from ..learn.difference import learn_difference
from ..learn.self_discovery import learn_self_discovery
from ..vector import ConceptVector
from .fairness_drawing import Job, Say, Studio, draw_all, order_of
from .fairness_methods import CONCEPTS, EDIT_SCALE, LEARNED, METHODS, STEERED, TEMPLATES, VALUES, known, namings, pairs
from .fairness_report import write_report
from .parts import Parts

LEARN_ROLES = ("doctor", "nurse", "scientist", "teacher", "detective", "receptionist")  # half mostly men, half women
GATE_ROLES = ("villain", "fairy", "juggler")  # what the gate is judged on
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMED, ROUNDS = 8, 3  # pictures at once, rounds


def roles_of(text: str) -> tuple[str, ...]:
    """ "16": the first so many roles of the world (jobs come first); "doctor,nurse": these; "all".

    Errors: ConceptSteerError for a role that is not known, or a number out of range.
    """
    if text == "all":
        return world.ROLE_NAMES
    if text.isdigit():
        if not 0 < int(text) <= len(world.ROLE_NAMES):
            raise ConceptSteerError(f"There are 1 to {len(world.ROLE_NAMES)} roles, not {text}.")
        return world.ROLE_NAMES[: int(text)]
    return known("role", [name.strip() for name in text.split(",")], world.ROLE_NAMES)


def load_model(checkpoint: str, dtype: str = "float32") -> DiffusersDenoiser:
    """'demo' or the file of a model of the same world (such as the SD-like twin) as a Denoiser on the CPU or a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = model.load(model.file_of(checkpoint), device=device, dtype=DTYPES[dtype])
    return DiffusersDenoiser(model.pipeline(made))


def run(
    out: Path,
    *,
    roles: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    attributes: Sequence[str] = tuple(STEERED),
    methods: Sequence[str] = tuple(METHODS),
    pictures: int = 150,
    steps: int = 12,
    guidance: float = 4.0,
    seed: int = 0,
    checkpoint: str = "demo",
    dtype: str = "float32",
    edit_scale: float = EDIT_SCALE,
    self_discovery_pictures: int = 128,
    self_discovery_rate: float = 0.1,
    shard: tuple[int, int] | None = None,
    learn_only: bool = False,
    command: str = "",
    say: Say = print,
) -> list[Path]:
    """Learn, draw, judge and write fairness.json, fairness.md, plots and sheets into `out`; the files.

    pictures: per role and template. What `out` holds already is not done again. shard (number from 0, of how many):
    draw a part of the pictures and write no tables; its vectors must have been learned before (learn_only).
    Errors: ConceptSteerError (unknown names, `out` belongs to other settings, vectors missing for a shard).
    """
    job = Job(
        out,
        known("role", roles, world.ROLE_NAMES),
        known("template", templates, TEMPLATES),
        known("attribute", attributes, tuple(STEERED)),
        known("method", ["none", *methods], tuple(METHODS)),
        pictures,
        steps,
        guidance,
        seed,
        edit_scale,
    )
    learning = {"pictures": self_discovery_pictures, "rate": self_discovery_rate}
    settings = {
        "checkpoint": model.file_hash(model.file_of(checkpoint)),
        "learn_roles": LEARN_ROLES,
        "gate_roles": GATE_ROLES,
        "self_discovery": learning,
        "seed": seed,
    }
    Parts(out / "settings", settings).get("learning", dict)
    drawing = {**settings, "dtype": dtype, "steps": steps, "guidance": guidance, "edit_scale": edit_scale}
    Parts(out / "settings", drawing).get("drawing", dict)
    job = learned(job, checkpoint, learning, shard is None, say)
    if learn_only:
        return []
    studio = Studio(load_model(checkpoint, dtype))
    draw_all(job, studio, shard=shard or (0, 1), say=say)
    if shard is not None:
        return []
    timed = "-".join(["seconds", *job.attributes, *job.methods])
    seconds = Parts(out / "settings", drawing).get(timed, lambda: time_methods(job, studio))
    about = {**drawing, "checkpoint_name": Path(checkpoint).name, "threads": torch.get_num_threads()}
    return write_report(job, studio, LEARN_ROLES, seconds, about, command)


def learned(job: Job, checkpoint: str, self_discovery: dict[str, Any], may_learn: bool, say: Say) -> Job:
    """The job with its vectors and attribute sets: from files, or learned now in float32 and saved."""
    loaded: list[Denoiser] = []

    def teacher(path: Path) -> Denoiser:
        if not may_learn:
            raise ConceptSteerError(
                f"{path} is missing: learn all vectors first with --learn-only, then start the shards."
            )
        if not loaded:
            loaded.append(load_model(checkpoint))
        return loaded[0]

    wanted = sorted({name for attribute in job.attributes for name in STEERED[attribute]})
    vectors: dict[str, dict[str, dict[str, ConceptVector]]] = {}
    sets: dict[str, Attribute] = {}
    for attribute in wanted:
        path = job.folder / "vectors" / f"{attribute}.attribute.safetensors"
        if not path.is_file():
            _learn_set(teacher(path), attribute, path, job.seed, say)
        sets[attribute] = Attribute.load(path)
        for method in [name for name in job.methods if name in LEARNED]:
            for value in VALUES[attribute]:
                path = job.folder / "vectors" / f"{method}-{attribute}-{value}.safetensors"
                if not path.is_file():
                    _learn_vector(teacher(path), method, attribute, value, path, job.seed, self_discovery, say)
                vectors.setdefault(method, {}).setdefault(attribute, {})[value] = ConceptVector.load(path)
    return replace(job, vectors=vectors, sets=sets)


def _learn_set(denoiser: Denoiser, attribute: str, path: Path, seed: int, say: Say) -> None:
    began, cost = time.perf_counter(), denoiser.cost.snapshot()
    roles = [*LEARN_ROLES, *GATE_ROLES]
    made = learn_attribute(
        denoiser, attribute, namings(attribute), roles, holdout=len(GATE_ROLES) / len(roles), seed=seed
    )
    made.save(path, overwrite=True)
    spent = denoiser.cost.since(cost)
    words = f"{spent.unet_rows:.0f} UNet rows, {spent.backward_rows} backward, {time.perf_counter() - began:.0f} s"
    say(f"fair_sampling, all values of {attribute} and the gate: {words}")


def _learn_vector(
    denoiser: Denoiser,
    method: str,
    attribute: str,
    value: str,
    path: Path,
    seed: int,
    self_discovery: dict[str, Any],
    say: Say,
) -> None:
    prompts, title = pairs(attribute, value, LEARN_ROLES), CONCEPTS[attribute][value]
    if method == "difference":
        result = learn_difference(denoiser, prompts, seed=seed, title=title)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".checkpoint")
        result = learn_self_discovery(
            denoiser, prompts, seed=seed, title=title, checkpoint=unfinished, **self_discovery
        )
    result.vector.save(path, overwrite=True)
    say(f"{method}, {title}: {result.unet_rows:.0f} UNet rows, {result.backward_rows} backward, {result.seconds:.0f} s")


def time_methods(job: Job, studio: Studio) -> dict[str, Any]:
    """Seconds a picture with decoding, in batches of `TIMED`: method -> attribute -> the least of some rounds.

    All methods take turns, so that other work on the machine meets them alike; the least is what it disturbed least.
    """
    role, template = job.roles[0], job.templates[0]
    series = [(method, attribute) for method, attribute, mode in job.series() if mode == "quota"]
    found: dict[str, dict[str, float]] = {}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for method, attribute in series:
            order = order_of(job, method, attribute, "quota", template, role, range(TIMED))
            began = time.perf_counter()
            studio.pixels(method, order)
            spent = (time.perf_counter() - began) / TIMED
            if turn:
                mine = found.setdefault(method, {})
                mine[attribute] = min(spent, mine.get(attribute, spent))
    return found
