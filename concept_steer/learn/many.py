"""Many concepts in one run: what they have in common is computed once, and a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..denoiser import Denoiser
from ..errors import LearnError, VectorFileError
from ..pictures import grid, to_images
from ..sampling import sample
from ..steering import Steer
from ..vector import ConceptVector
from ..vector_file import SUFFIX, write_atomic
from .concept_file import METHODS, Concept, read_concepts
from .result import LearnResult
from .trajectories import SharedNeutral

__all__ = ["Concept", "Outcome", "learn_many", "read_concepts", "strips"]

Status = Literal["learned", "already there", "unfinished", "failed"]
Progress = Callable[[str, int, int], None]  # name, done, total
SHARED_BY = ("trajectories", "sample_steps", "guidance", "seed", "batch")  # what shared trajectories depend on
STRIP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
UNFINISHED = "unfinished"  # in a vector's metadata: why it is only the best so far


@dataclass(frozen=True)
class Outcome:
    """What became of one concept. report: as `LearnResult.report`; error: why it failed or is unfinished.

    saved_rows: UNet rows that it would have cost besides, learned alone.
    """

    name: str
    status: Status
    path: str
    report: dict[str, Any] = field(default_factory=dict)
    saved_rows: float = 0.0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


def learn_many(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    folder: Path | str,
    *,
    overwrite: bool = False,
    rank: int = 0,
    processes: int = 1,
    told: Callable[[Outcome], None] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Outcome]:
    """Learn this process's share of the concepts; each is saved as NAME.safetensors and NAME.json when it is learned.

    A vector that is there already from the same prompts, settings and model is left as it is; one of the same name but
    other settings is an error before anything is learned, unless overwrite. A concept that fails, or stops at NaN with
    the last good vector, does not stop the others. stop() True ends the run: the concept at hand is kept as far as it
    came, marked unfinished, and the next run goes on there (as it does when killed, from the last check). rank,
    processes: every process is given the same list and learns its share (`split`). told(outcome) after each concept;
    progress(name, done, total) within one.
    The numbers do not depend on who shares with whom, nor on the number of processes, only on the threads of each.
    Errors: VectorFileError (a file in the way, a folder that cannot be written).
    """
    folder = Path(folder)
    if not 0 <= rank < processes:
        raise LearnError(f"rank is {rank}, but it counts from 0 to processes - 1 = {processes - 1}.")
    there = {concept.name: _there(denoiser, concept, folder, overwrite) for concept in concepts}
    outcomes: list[Outcome] = []
    shared = SharedNeutral(denoiser)
    for concept in split(concepts, processes)[rank]:
        if stop is not None and stop():
            break
        path = folder / (concept.name + SUFFIX)
        if there[concept.name]:
            outcome = Outcome(concept.name, "already there", str(path))
        else:
            saved = shared.saved_rows
            try:
                result = _learn(denoiser, concept, shared, folder, progress, stop)
            except LearnError as error:
                if stop is not None and stop():  # before its first step: there is nothing to keep
                    break
                outcome = Outcome(concept.name, "failed", str(path), error=str(error))
            else:
                interrupted = stop is not None and stop()
                outcome = _saved(denoiser, concept, result, path, shared.saved_rows - saved, interrupted)
        outcomes.append(outcome)
        if told is not None:
            told(outcome)
    return outcomes


def split(concepts: Sequence[Concept], processes: int) -> list[list[Concept]]:
    """One list per process: about the same work each, concepts that share in a row and, where it fits, together.

    It depends on nothing but its arguments, so that processes need not agree on it (nor on what is there already).
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, concept in enumerate(concepts):
        groups.setdefault(_kind(concept), []).append(number)
    work = [_work(concept) for concept in concepts]
    limit = sum(work) / processes * (1 + 1e-9)
    pieces: list[list[int]] = []
    for group in groups.values():
        pieces.append([])
        for number in group:
            if pieces[-1] and sum(work[n] for n in pieces[-1]) + work[number] > limit:
                pieces.append([])
            pieces[-1].append(number)
    shares: list[list[list[int]]] = [[] for _ in range(processes)]
    for piece in sorted(pieces, key=lambda piece: -sum(work[n] for n in piece)):  # the largest first, to the idlest
        min(shares, key=lambda share: sum(work[n] for part in share for n in part)).append(piece)
    return [[concepts[n] for piece in sorted(share) for n in piece] for share in shares]


def fingerprint(denoiser: Denoiser, concept: Concept) -> str:
    """SHA-256 of all that decides about the vector: prompts, method, settings and model."""
    return hashlib.sha256(json.dumps(_settings(denoiser, concept), sort_keys=True).encode()).hexdigest()


def strips(
    denoiser: Denoiser,
    vectors: Sequence[tuple[Concept, ConceptVector]],
    *,
    seed: int = 1000,
    steps: int = 12,
    guidance: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """A row for each vector: its first neutral prompt at strengths from -1 to 1.5, from the same noise everywhere."""
    rows = []
    with torch.inference_mode(False), torch.no_grad():
        for concept, vector in vectors:
            latents = sample(
                denoiser,
                [concept.pairs[0][0]] * len(STRIP),
                seeds=[seed] * len(STRIP),
                steps=steps,
                guidance=guidance,
                steers=[[Steer(vector, strength)] for strength in STRIP],
                batch=len(STRIP),
            )
            rows.append(to_images(denoiser.decode(latents)))
            if progress is not None:
                progress(len(rows), len(vectors))
    return grid(
        rows,
        columns=[f"strength {strength:g}" for strength in STRIP],
        rows=[f"{concept.name}: {concept.pairs[0][0]}" for concept, _ in vectors],
        title=f"Every vector on its first neutral prompt, seed {seed}",
    )


def _learn(
    denoiser: Denoiser,
    concept: Concept,
    shared: SharedNeutral,
    folder: Path,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> LearnResult:
    def at(done: int, total: int, *_: object) -> None:
        if progress is not None:
            progress(concept.name, done, total)

    hooks: dict[str, Any] = {"title": concept.name, "progress": at}
    if concept.method == "score":
        # named by the settings too: what was begun with others is not in the way
        checkpoint = folder / f".{concept.name}.{fingerprint(denoiser, concept)[:10]}.checkpoint"
        hooks |= {"caching": at, "stop": stop, "shared": shared, "checkpoint": checkpoint}
    return METHODS[concept.method](denoiser, concept.pairs, **hooks, **concept.options)


def _saved(
    denoiser: Denoiser, concept: Concept, result: LearnResult, path: Path, saved_rows: float, interrupted: bool
) -> Outcome:
    """Save the report, then the vector: only with the vector is the concept there."""
    reason = result.stopped if interrupted or "NaN" in result.stopped else ""
    marks = {"settings_fingerprint": fingerprint(denoiser, concept)} | ({UNFINISHED: reason} if reason else {})
    vector = result.vector.with_info(**marks)
    outcome = Outcome(
        concept.name, "unfinished" if reason else "learned", str(path), result.report(), saved_rows, reason
    )
    report = {**outcome.as_dict(), "settings": _settings(denoiser, concept), **marks}
    write_atomic(path.with_suffix(".json"), json.dumps(report, indent=1, ensure_ascii=False).encode(), overwrite=True)
    vector.save(path, overwrite=True)
    return outcome


def _there(denoiser: Denoiser, concept: Concept, folder: Path, overwrite: bool) -> bool:
    """Whether the finished vector is there. Errors: VectorFileError when something else is in its place."""
    path = folder / (concept.name + SUFFIX)
    if path.exists():
        try:
            info = ConceptVector.load(path).info
        except VectorFileError:
            if overwrite:
                return False
            raise
        if info.get("settings_fingerprint") == fingerprint(denoiser, concept):
            return UNFINISHED not in info
        in_the_way = path
    else:
        in_the_way = path.with_suffix(".json")
        if not in_the_way.exists() or _ours(in_the_way):
            return False
    if overwrite:
        return False
    raise VectorFileError(
        f"{in_the_way} exists already, but does not come from the prompts, settings and model at hand: rename the "
        f"concept {concept.name!r}, choose another folder, or allow overwriting."
    )


def _ours(report: Path) -> bool:
    """Whether a report was written by a run that was killed before it wrote the vector."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "settings_fingerprint" in found


def _settings(denoiser: Denoiser, concept: Concept) -> dict[str, Any]:
    return {
        "name": concept.name,
        "pairs": [list(pair) for pair in concept.pairs],
        "method": concept.method,
        "options": concept.settings(),
        "family": denoiser.family,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "latent_shape": list(denoiser.latent_shape),
    }


def _kind(concept: Concept) -> tuple[Any, ...]:
    """Equal for concepts that share their neutral trajectories."""
    if concept.method != "score":
        return (concept.method, concept.name)
    settings = concept.settings()
    return (tuple(neutral for neutral, _ in concept.pairs), *(settings[key] for key in SHARED_BY))


def _work(concept: Concept) -> float:
    """About how many UNet rows it costs to learn, a backward row of the decoder counted as a row."""
    settings = concept.settings()
    if concept.method == "difference":
        return float(2 * settings["seeds"] * len(concept.pairs) * len(settings["timesteps"]))
    return float(3 * settings["trajectories"] * settings["sample_steps"] + 1.5 * settings["steps"] * settings["batch"])
