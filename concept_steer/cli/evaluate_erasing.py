"""`concept-steer evaluate erasing`: what keeps unasked marks out, measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .evaluate import add_out, command_line, names
from .evaluate_safety import shard
from .help import Commands, command, positive
from .models import DTYPES
from .output import ready_folder

MARKS = "watermark,qr,text"
WAYS = "none,named,negative_prompt,sld_strong,geom_tokens,geom_lora,masked_lora,h_space,gated"
OPTIONS = (
    "checkpoint",
    "marks",
    "data",
    "style",
    "ablation",
    "ways",
    "count",
    "steps",
    "guidance",
    "batch",
    "lora_steps",
    "token_steps",
    "dtype",
)


def add_erasing(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "erasing",
        _erasing,
        help="how often watermarks, QR codes and text are painted unasked, by every way to keep them out",
        description="Learn what Geom-Erasing and its alternatives need, draw the same captions and seeds in every\n"
        "way, and write the table. In two processes: --prepare, then --shard 1/2 and --shard 2/2, then neither.",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="a build of the training pictures (demo.build_data)"
    )
    parser.add_argument(
        "--style", type=Path, metavar="DIR", help="a build of another style (build_data --extra): also fine-tuning "
        "on spoiled pictures"
    )  # fmt: skip
    parser.add_argument(
        "--ablation", type=names, help="also parts (name, places, weights, bins) or boxes (worse ones, masked), or both"
    )
    parser.add_argument(
        "--marks",
        type=names,
        default=names(MARKS),
        help=f"to erase, together; one at a time: only it (default: {MARKS})",
    )
    parser.add_argument(
        "--checkpoint",
        default="demo",
        metavar="FILE",
        help="'demo', or a model of the same world, such as the SD-like twin (demo.train --layout sd)",
    )
    parser.add_argument("--ways", type=names, default=names(WAYS), help=f"default: {WAYS}")
    parser.add_argument("--count", type=positive, default=1024, help="pictures a way (default: 1024)")
    parser.add_argument("--steps", type=positive, default=12, help="DDIM steps (default: 12)")
    parser.add_argument("--guidance", type=float, default=2.0, help="default: 2")
    parser.add_argument("--batch", type=positive, default=32, help="pictures at once (default: 32)")
    parser.add_argument("--token-steps", type=positive, default=300, help="of training (default: 300)")
    parser.add_argument("--lora-steps", type=positive, default=1000, help="of training (default: 1000)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of drawing (default: bfloat16)")
    parser.add_argument("--prepare", action="store_true", help="only learn")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="draw only this part of the pictures; no tables")
    add_out(parser)


def _erasing(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.ablation or () if name not in ("parts", "boxes")]:
        args.parser.error(f"--ablation is parts or boxes, not {unknown[0]}")
    if unknown := [name for name in args.marks if name not in MARKS.split(",")]:
        args.parser.error(f"--marks are of {MARKS}, not {unknown[0]}")
    out = ready_folder(args.out)
    from ..evaluate import erasing, erasing_ablation, erasing_report
    from ..evaluate.erasing_data import Build
    from ..evaluate.fairness import load_model

    denoiser, teacher = (load_model(args.checkpoint, kind) for kind in (args.dtype, "float32"))
    measure = erasing.Measure(
        out, denoiser, teacher, Build(args.data), erasing.chosen_ways(args.ways), args.count, args.steps,
        args.guidance, args.batch, erasing.Effort(tokens=args.token_steps, lora=args.lora_steps),
        tuple(args.marks),
    )  # fmt: skip
    erasing.prepare(measure, _say)
    if args.prepare:
        return 0
    erasing.draw(measure, args.shard or (0, 1), _say)
    if args.shard:
        return 0
    rows: list[Any] = []
    if args.style:
        rows += erasing_ablation.fine_tuning(measure, Build(args.style), _say)
    for name in args.ablation or ():
        rows += erasing_ablation.ABLATIONS[name](measure, _say)
    told = argparse.Namespace(**{**vars(args), "data": args.data.name, "style": args.style and args.style.name})
    told.checkpoint = Path(args.checkpoint).name
    about = {"model": f"{told.checkpoint} ({denoiser.checkpoint_hash[:10]}), {args.dtype}"}
    written = erasing_report.report(measure, command_line(told, "erasing", *OPTIONS), about, rows)
    print("Written: " + ", ".join(str(path) for path in written))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


MEASUREMENTS = (add_erasing,)
