"""`concept-steer apply`: pictures of one prompt without and with concept vectors, from the same noise."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .help import Commands, command, positive
from .models import VectorSpec, add_model_options, load_checkpoint, load_vector, vector_spec
from .output import ready_folder, write_picture
from .safety import Guard, add_safety_options

if TYPE_CHECKING:
    from ..steering import Steer

# The choices of steering.Rows and steering.Operator, which would need torch to look up; a test keeps them equal.
ROWS = ("cond", "uncond", "both")
OPERATORS = ("add", "remove", "gated")


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "apply",
        _apply,
        help="draw pictures without and with concept vectors",
        description="Draw each picture twice from the same noise, without and with the vectors. Writes the PNGs,\n"
        "which carry their settings, and a sheet that shows both. Runs are numbered; nothing is overwritten.",
        epilog="example:\n"
        "  concept-steer apply --prompt 'a pilot' --vector woman:0.8 --vector smile:0.5:0:0.6 --count 4\n",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--vector",
        dest="vectors",
        type=vector_spec,
        action="append",
        required=True,
        metavar="NAME_OR_FILE[:STRENGTH[:START[:END]]]",
        help="repeatable; strength 1 is the learned effect, start and end are shares of sampling (default: 1:0:1)",
    )
    parser.add_argument("--negative", default="", help="the negative prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on (default: 0)")
    parser.add_argument("--count", type=positive, default=4, help="pictures (default: 4)")
    parser.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance (default: 5)")
    parser.add_argument("--rows", choices=ROWS, default="cond", help="the part of the CFG batch (default: cond)")
    parser.add_argument("--operator", choices=OPERATORS, default="add", help="default: add")
    parser.add_argument("--batch", type=positive, default=4, help="pictures at once (default: 4)")
    parser.add_argument(
        "--out", type=Path, default=Path("concept-steer-out"), metavar="DIR", help="default: ./concept-steer-out"
    )
    add_safety_options(parser)
    add_model_options(parser)


def _apply(args: argparse.Namespace) -> int:
    specs: list[VectorSpec] = args.vectors
    steers = [_steer(spec, args) for spec in specs]
    out = ready_folder(args.out)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    from ..steering import check_steers

    check_steers(steers, denoiser.family, denoiser.channels)
    prompts = [args.prompt] * args.count
    seeds = [args.seed + i for i in range(args.count)]
    sampling = {"steps": args.steps, "guidance": args.guidance, "negative": args.negative, "batch": args.batch}
    guard = Guard(args, denoiser)
    before, told_before = guard.draw(prompts, seeds, label="without", **sampling)
    after, told = guard.draw(prompts, seeds, steers, label="with", **sampling)

    settings: dict[str, Any] = {
        "version": __version__,
        "checkpoint": args.checkpoint,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "family": denoiser.family,
        "prompt": args.prompt,
        "sampler": "DDIM",
        **sampling,
        "vectors": [],
    }
    used = [_described(spec, steer) for spec, steer in zip(specs, steers, strict=True)]
    run = _next_run(out)
    for seed, old, new in zip(seeds, before, after, strict=True):
        write_picture(old, out / f"{run:04d}-{seed}-without.png", {**settings, **told_before, "seed": seed})
        with_settings = {**settings, **told, "seed": seed, "vectors": used}
        write_picture(new, out / f"{run:04d}-{seed}-with.png", with_settings)
    words = ", ".join(f"{steer.vector.name} {steer.strength:g}" for steer in steers)
    from ..pictures import before_after

    sheet = before_after(before, after, [f"seed {seed}" for seed in seeds], args.prompt, words)
    about = {**settings, **told, "seeds": seeds, "vectors": used}
    path = write_picture(sheet, out / f"{run:04d}-sheet.png", about)
    if guard.on:
        print(guard.said)
    print(f"{args.count} pictures without and {args.count} with {words} are in {out}; both side by side: {path}")
    return 0


def _steer(spec: VectorSpec, args: argparse.Namespace) -> Steer:
    from ..schedule import Schedule
    from ..steering import Steer

    vector, _ = load_vector(spec.name)
    schedule = Schedule(spec.start, spec.end)
    return Steer(vector, spec.strength, schedule, rows=args.rows, operator=args.operator)


def _described(spec: VectorSpec, steer: Steer) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": steer.vector.title,
        "fingerprint": steer.vector.fingerprint,
        "strength": steer.strength,
        "start": steer.schedule.start,
        "end": steer.schedule.end,
        "rows": steer.rows,
        "operator": steer.operator,
    }


def _next_run(out: Path) -> int:
    taken = [int(found[1]) for p in out.iterdir() if (found := re.match(r"(\d{4,})-.+\.png$", p.name))]
    return max(taken, default=0) + 1
