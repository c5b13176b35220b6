"""`concept-steer evaluate ...`: the measurements behind the documentation's tables, one subcommand each."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .help import Commands, command, positive
from .output import ready_folder

OUT = Path("concept-steer-results")
CONCEPTS = "woman,man,dark skin,smiling,astronaut,knife"
METHODS = "self_discovery,self_discovery_cfg1,difference,score,score_short,score_channels,score_map,lora_slider"
FAIR_METHODS = "none,prompt_rewriting,negative_prompt,fair_diffusion,self_discovery,difference,fair_sampling"
TEMPLATES, ATTRIBUTES = "plain,successful", "gender,tone,both"
Add = Callable[[Commands, argparse.ArgumentParser], None]


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "evaluate",
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="measure on the embedded model: tables as JSON, Markdown and plots",
        description="Measure on the embedded model. Every table is written as NAME.json, NAME.md and plots; a run that "
        "was\nstopped goes on where it was.",
    )
    below = parser.add_subparsers(title="measurements", metavar="MEASUREMENT", required=True)
    from . import (
        evaluate_audit,
        evaluate_erasing,
        evaluate_latent_clip,
        evaluate_safety,
    )  # late: they use what this module has

    others = (evaluate_safety, evaluate_audit, evaluate_latent_clip, evaluate_erasing)
    for add_one in (*MEASUREMENTS, *(add_one for other in others for add_one in other.MEASUREMENTS)):
        add_one(below, common)


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"default: ./{OUT}")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="demo", metavar="FILE", help="'demo' or a model of the same world")


def names(text: str) -> list[str]:
    """Comma-separated names, as an argparse type."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("name at least one, separated by commas")
    return list(dict.fromkeys(found))


def command_line(args: argparse.Namespace, measurement: str, *options: str) -> str:
    """The command that measures the same again: options by their names in `args`, those that are not set left out."""
    words = ["concept-steer", "evaluate", measurement]
    for name in options:
        value: Any = getattr(args, name)
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(",".join(value) if isinstance(value, list) else str(value))
    return shlex.join(words)


def add_learning(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "learning",
        _learning,
        help="what learning a concept costs, by method",
        description="Learn concepts in every way, and read off how many UNet rows each way needs for which effect.",
    )
    parser.add_argument("--concepts", type=names, default=names(CONCEPTS), help=f"default: {CONCEPTS}")
    parser.add_argument("--methods", type=names, default=names(METHODS), help=f"default: {METHODS}")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of learning each (default: 3)")
    parser.add_argument("--scale", choices=("full", "quick", "tiny"), default="full", help="how much is spent on each")
    parser.add_argument("--pictures", type=positive, help="that self_discovery makes (published: 1000)")
    add_checkpoint(parser)
    add_out(parser)


def _learning(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    from dataclasses import replace

    from ..demo.job import Studio
    from ..evaluate import learning
    from ..evaluate.methods import SCALES
    from ..evaluate.tasks import tasks

    scale = SCALES[args.scale]
    if args.pictures:
        scale = replace(scale, name=f"{scale.name}-{args.pictures}", pictures=args.pictures)
    chosen = tasks(args.concepts)
    written = learning.run(
        Studio(args.checkpoint),
        chosen,
        args.methods,
        seeds=args.seeds,
        scale=scale,
        out=out,
        command=command_line(args, "learning", "concepts", "methods", "seeds", "scale", "pictures", "checkpoint"),
        say=_say,
    )
    return _done(written)


def add_generality(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "generality",
        _generality,
        help="one vector on other roles, seeds, samplers, steps, sizes and guidance; ablations",
        description="Learn a vector and use it where it was not learned; then learn it in other ways, to see which of "
        "the\ndefaults matter.",
    )
    parser.add_argument("--concepts", type=names, default=["woman", "dark skin"], help="default: woman,dark skin")
    parser.add_argument("--seeds", type=positive, default=2, help="runs of learning each (default: 2)")
    parser.add_argument("--judged", type=positive, default=8, help="pictures a role and condition (default: 8)")
    parser.add_argument("--roles", type=positive, default=4, help="unseen roles (default: 4)")
    parser.add_argument("--quick", action="store_true", help="fewer conditions and shorter learning, for a first look")
    add_checkpoint(parser)
    add_out(parser)


def _generality(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    from ..demo.job import Studio
    from ..evaluate import generality
    from ..evaluate.tasks import tasks

    written = generality.run(
        Studio(args.checkpoint),
        tasks(args.concepts),
        seeds=args.seeds,
        roles=args.roles,
        judged=args.judged,
        quick=args.quick,
        out=out,
        command=command_line(args, "generality", "concepts", "seeds", "judged", "roles", "quick", "checkpoint"),
        say=_say,
    )
    return _done(written)


def shard(text: str) -> tuple[int, int]:
    """ "1/2", as an argparse type: (number from 0, of how many)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/2 or 2/2")
    return int(found[1]) - 1, int(found[2])


def add_fairness(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "fairness",
        _fairness,
        help="deviation from fair shares, faithfulness and cost of fair generation, by method",
        description="Draw every role by every method, judge the pictures, and write the table of fair generation.\n"
        "In two processes: --learn-only, then --shard 1/2 and --shard 2/2 side by side, then without either.",
    )
    parser.add_argument("--roles", default="16", help="a number (the first of the world), names or 'all'; default: 16")
    parser.add_argument("--templates", type=names, default=names(TEMPLATES), help=f"default: {TEMPLATES}")
    parser.add_argument("--attributes", type=names, default=names(ATTRIBUTES), help=f"default: {ATTRIBUTES}")
    parser.add_argument("--methods", type=names, default=names(FAIR_METHODS), help=f"default: {FAIR_METHODS}")
    parser.add_argument("--pictures", type=positive, default=150, help="per role and template (default: 150)")
    parser.add_argument("--steps", type=positive, default=12, help="DDIM steps (default: 12)")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the assignments and of learning (default: 0)")
    add_checkpoint(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of drawing")
    parser.add_argument("--edit-scale", type=float, default=4.0, help="of fair_diffusion's edits (default: 4)")
    parser.add_argument("--self-discovery-pictures", type=positive, default=128, help="published: 1000; default: 128")
    parser.add_argument("--self-discovery-rate", type=float, default=0.1, help="published and default: 0.1")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="draw only this part of the pictures; no tables")
    parser.add_argument("--learn-only", action="store_true", help="learn and save the vectors, draw nothing")
    add_out(parser)


FAIR_OPTIONS = (
    "templates", "attributes", "methods", "pictures", "steps", "guidance", "seed", "checkpoint", "dtype",
    "edit_scale", "self_discovery_pictures", "self_discovery_rate",
)  # fmt: skip


def _fairness(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    from ..evaluate import fairness

    written = fairness.run(
        out,
        roles=fairness.roles_of(args.roles),
        **{name: getattr(args, name) for name in FAIR_OPTIONS},
        shard=args.shard,
        learn_only=args.learn_only,
        command=command_line(args, "fairness", "roles", *FAIR_OPTIONS),
        say=_say,
    )
    return _done(written) if written else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _done(written: list[Path]) -> int:
    print("Written: " + ", ".join(str(path) for path in written))
    return 0


MEASUREMENTS: tuple[Add, ...] = (add_learning, add_generality, add_fairness)  # in the order of the help
