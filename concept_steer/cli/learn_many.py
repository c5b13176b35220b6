"""`concept-steer learn --concepts FILE`: many concepts in one run, on several processes where a launcher starts them.

    accelerate launch --num_processes 2 -m concept_steer learn --concepts concepts.yaml --out vectors

With two GPUs or more each process takes one. On CPUs the launcher starts several only with --multi_gpu (its name for
"several processes"), and gives each one thread unless told otherwise with --num_cpu_threads_per_process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ConceptSteerError
from .models import bar, load_checkpoint
from .output import ready_folder, write_picture

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..learn.many import Concept, Outcome

# options of `learn` that go with --concepts; all others are the file's business
MINE = ("concepts", "out", "overwrite", "no_preview", "checkpoint", "device", "dtype", "debug", "run", "parser")
SUMMARY, SHEET = "summary.json", "strips.png"
FOREVER = timedelta(days=365)  # processes wait for the slowest, however long it learns
Interruptible = Callable[[], AbstractContextManager[Event]]


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, its device, and how to bring lists of all of them together."""

    device: str
    rank: int = 0
    processes: int = 1
    gather: Callable[[list[Any]], list[Any]] = field(default=list)


def run(args: argparse.Namespace, interruptible: Interruptible) -> int:
    """Exit code 1 when a concept failed, 130 when interrupted. interruptible: gives the event that Ctrl-C sets."""
    others = [name for name, value in vars(args).items() if name not in MINE and value != args.parser.get_default(name)]
    if others:
        args.parser.error(f"--concepts does not go with --{others[0].replace('_', '-')}: name it in the file")
    if not args.out:
        args.parser.error("--concepts needs --out DIR, the folder for the vectors")
    from ..learn.many import learn_many, read_concepts

    concepts = read_concepts(args.concepts)
    folder = ready_folder(Path(args.out).expanduser())
    with process_place(args.device) as place, interruptible() as asked:
        denoiser = load_checkpoint(args.checkpoint, place.device, args.dtype)
        mine = f" on process {place.rank + 1} of {place.processes}" if place.processes > 1 else ""
        with bar("learning") as progress:
            outcomes = learn_many(
                denoiser,
                concepts,
                folder,
                overwrite=args.overwrite,
                rank=place.rank,
                processes=place.processes,
                told=lambda outcome: print(_line(outcome) + mine, flush=True),
                progress=lambda name, done, total: progress.at(done, total, name),
                stop=asked.is_set,
            )
        found = place.gather(outcomes)
        if place.rank > 0:
            return 130 if asked.is_set() else 0
        return _finish(denoiser, concepts, found, folder, asked.is_set(), args)


@contextmanager
def process_place(device: str) -> Iterator[Place]:
    """This process among those of `accelerate launch` (or torchrun); alone where nothing of the kind started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Place(device)
        return
    if device not in ("auto", "cpu"):
        raise ConceptSteerError(
            f"Every process takes a device of its own, so --device {device} cannot be given to all: leave it out, or "
            "give --device cpu."
        )
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=FOREVER)
    if on_cpu:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))
    try:
        yield Place(str(state.device), state.process_index, state.num_processes, gather_object)
    finally:
        state.destroy_process_group()


def _line(outcome: Outcome) -> str:
    """One line for people about one concept."""
    if outcome.status in ("failed", "already there"):
        return f"{outcome.name}: {outcome.status}{': ' * bool(outcome.error)}{outcome.error}"
    explained, rows = outcome.report["explained"], outcome.report["unet_rows"]
    share = "" if explained is None else f", {explained:.0%} of the prompt's own effect"
    cost = f"{rows:,.0f} UNet rows, {outcome.report['seconds']:.1f} s"
    return f"{outcome.name}: {outcome.status}{share}, {cost}{': ' * bool(outcome.error)}{outcome.error}"


def _finish(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    outcomes: Sequence[Outcome],
    folder: Path,
    interrupted: bool,
    args: argparse.Namespace,
) -> int:
    """What one process does for all: the summary as a file and in words, and the sheet of strips."""
    from ..vector_file import write_atomic

    order = {concept.name: number for number, concept in enumerate(concepts)}
    outcomes = sorted(outcomes, key=lambda outcome: order[outcome.name])
    learned = [outcome for outcome in outcomes if outcome.report]
    rows = sum(outcome.report["unet_rows"] for outcome in learned)
    alone = rows + sum(outcome.saved_rows for outcome in learned)
    summary = {
        "version": __version__,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "unet_rows": rows,
        "unet_rows_one_by_one": alone,
        "backward_rows": sum(outcome.report["backward_rows"] for outcome in learned),
        "concepts": [outcome.as_dict() for outcome in outcomes],
    }
    data = json.dumps(summary, indent=1, ensure_ascii=False).encode()
    write_atomic(folder / SUMMARY, data, overwrite=True)
    there = sum(outcome.status in ("learned", "already there") for outcome in outcomes)
    print(f"{there} of {len(concepts)} concepts are in {folder}.")
    if learned:
        print(f"{rows:,.0f} UNet rows instead of {alone:,.0f} one by one.")
    if interrupted:
        print("Learning was interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    if not args.no_preview:
        there_now = {outcome.name for outcome in outcomes if outcome.status != "failed"}
        _sheet(denoiser, [concept for concept in concepts if concept.name in there_now], folder)
    bad = [outcome for outcome in outcomes if outcome.status in ("failed", "unfinished")]
    for outcome in bad:
        print(f"{outcome.name} {outcome.status}: {outcome.error}", file=sys.stderr)
    return 1 if bad else 0


def _sheet(denoiser: Denoiser, concepts: Sequence[Concept], folder: Path) -> None:
    from ..learn.many import strips
    from ..vector import ConceptVector
    from ..vector_file import SUFFIX

    paths = [(concept, folder / (concept.name + SUFFIX)) for concept in concepts]
    vectors = [(concept, ConceptVector.load(path)) for concept, path in paths if path.exists()]
    if not vectors:
        return
    with bar("strips") as progress:
        sheet = strips(denoiser, vectors, progress=progress.at)
    settings = {"vectors": {concept.name: vector.fingerprint for concept, vector in vectors}}
    print(f"All of them at work: {write_picture(sheet, folder / SHEET, settings)}")
