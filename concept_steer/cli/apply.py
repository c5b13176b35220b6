"""`concept-steer apply`: pictures of one prompt without and with concept vectors, from the same noise."""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .help import Commands, command, positive
from .models import VectorSpec, add_model_options, load_checkpoint, load_vector, vector_spec
from .output import ready_folder, write_picture
from .safety import Guard, add_safety_options

if TYPE_CHECKING:
    from ..denoiser import Denoiser
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
        description="Draw each picture twice from the same noise, without and with the vectors (or with an embedding\n"
        "or a LoRA of erase learn); once where only the safety switch or the latent check is wanted. Writes the PNGs,\n"
        "which carry their settings, and a sheet. Runs are numbered; nothing is overwritten.",
        epilog="examples:\n"
        "  concept-steer apply --prompt 'a pilot' --vector woman:0.8 --vector smile:0.5:0:0.6 --count 4\n"
        "  concept-steer apply --prompt 'a cat' --embedding no-text.safetensors --lora no-text-lora.safetensors\n"
        "  concept-steer apply --prompt 'a night out' --safety standard\n",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--vector",
        dest="vectors",
        type=vector_spec,
        action="append",
        default=[],
        metavar="NAME_OR_FILE[:STRENGTH[:START[:END]]]",
        help="repeatable; strength 1 is the learned effect, start and end are shares of sampling (default: 1:0:1)",
    )
    parser.add_argument(
        "--embedding",
        dest="embeddings",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="repeatable; an embedding of erase learn, put into the negative prompt of the pictures with it",
    )
    parser.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA of erase learn, for the pictures with it")
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
    compared = bool(specs or args.embeddings or args.lora)
    if not compared and args.safety == "off" and not args.latent_check and not args.detector:
        args.parser.error("nothing to apply: name a --vector, an --embedding or a --lora, or turn --safety on")
    steers = [_steer(spec, args) for spec in specs]
    out = ready_folder(args.out)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    from ..steering import check_steers

    check_steers(steers, denoiser.family, denoiser.channels)
    denoiser, wearing, learned = _learned(args, denoiser)
    prompts = [args.prompt] * args.count
    seeds = [args.seed + i for i in range(args.count)]
    sampling = {"steps": args.steps, "guidance": args.guidance, "negative": args.negative, "batch": args.batch}
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
    guard = Guard(args, denoiser)
    before, told_before = guard.draw(prompts, seeds, label="without" if compared else "pictures", **sampling)
    run = _next_run(out)
    ending = "-without" if compared else ""
    for seed, old in zip(seeds, before, strict=True):
        write_picture(old, out / f"{run:04d}-{seed}{ending}.png", {**settings, **told_before, "seed": seed})
    under = [f"seed {seed}" for seed in seeds]
    from ..pictures import before_after, grid

    if not compared:
        sheet, told, words = grid([before], captions=[under], title=args.prompt), told_before, ""
        about = {**settings, **told, "seeds": seeds}
    else:
        negative = ", ".join([*([args.negative] if args.negative else []), *learned["embeddings"]])
        with wearing():
            after, told = guard.draw(prompts, seeds, steers, label="with", **{**sampling, "negative": negative})
        used = [_described(spec, steer) for spec, steer in zip(specs, steers, strict=True)]
        more = {name: value for name, value in learned.items() if value}
        own = {**settings, **told, **more, "negative": negative, "vectors": used}
        for seed, new in zip(seeds, after, strict=True):
            write_picture(new, out / f"{run:04d}-{seed}-with.png", {**own, "seed": seed})
        words = ", ".join(
            [*(f"{s.vector.name} {s.strength:g}" for s in steers), *learned["embeddings"], *learned["lora"]]
        )
        sheet = before_after(before, after, under, args.prompt, words)
        about = {**own, "seeds": seeds}
    path = write_picture(sheet, out / f"{run:04d}-sheet.png", about)
    if guard.on:
        print(guard.said)
    pictures = f"{args.count} pictures" + (f" without and {args.count} with {words}" if compared else "")
    print(f"{pictures} are in {out}; {'both side by side' if compared else 'all on one sheet'}: {path}")
    return 0


def _learned(args: argparse.Namespace, denoiser: Denoiser) -> tuple[Denoiser, Any, dict[str, list[str]]]:
    """The model that knows the embeddings, what puts the LoRA on it, and their names. Errors: LearnError."""
    if not args.embeddings and not args.lora:
        return denoiser, nullcontext, {"embeddings": [], "lora": []}
    from ..geom_erasing import LocationTokens, knowing, lora

    tokens = [LocationTokens.load(path.expanduser()) for path in args.embeddings]
    names = {"embeddings": [one.name for one in tokens], "lora": [args.lora.stem] if args.lora else []}
    wearing: Any = nullcontext
    if args.lora:
        state = lora.load(args.lora.expanduser(), denoiser)
        wearing = partial(lora.adapted, denoiser, lora.rank_of(state), 0, state)
    return knowing(denoiser, tokens), wearing, names


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
