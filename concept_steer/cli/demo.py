"""`concept-steer demo` and `concept-steer export-demo`: the embedded model at work, and as a diffusers folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConceptSteerError
from .help import Commands, command, positive
from .models import bar
from .output import ready_folder


def add_demo(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "demo",
        _demo,
        help="learn 'woman' on the embedded model, use it on other roles, measure",
        description="Learn a concept on the embedded model in two ways, apply it to roles it was not learned on,\n"
        "and write a strip, a before/after sheet, the vector files and a report.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("concept-steer-demo"), metavar="DIR", help="default: ./concept-steer-demo"
    )
    parser.add_argument("--count", type=positive, default=64, help="pictures to judge before and after (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def add_export(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "export-demo",
        _export,
        help="write the embedded model as a diffusers folder",
        description="Write the embedded model (fp16) as a diffusers folder, for any tool that reads one.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")


def _demo(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    from ..demo import job

    @contextmanager
    def watch(label: str) -> Iterator[job.Advance]:
        with bar(label) as progress:
            yield progress.at

    job.run(out, count=args.count, seed=args.seed, say=lambda text: print(text, flush=True), watch=watch)
    print(f"Written to {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))}")
    return 0


def _export(args: argparse.Namespace) -> int:
    folder = ready_folder(args.folder)
    if any(folder.iterdir()):
        raise ConceptSteerError(f"{folder} is not empty: name a new or empty folder for the model.")
    from ..demo import model

    model.to_diffusers(folder)
    print(f"The embedded model is in {folder}; use it with --checkpoint {folder}")
    return 0
