"""`concept-steer evaluate latent-clip`: the latent CLIP's towers and its check, measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from .evaluate import add_out, command_line
from .help import Commands, command, positive
from .models import DTYPES, load_checkpoint
from .output import ready_folder


def add_latent_clip(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "latent-clip",
        _latent_clip,
        help="the latent tower against a pixel tower, and the check while a picture is drawn",
        description="Zero-shot accuracy of the embedded latent tower, beside a pixel tower of its size where there is "
        "one,\nand what the latent check finds at which step, leaves, costs and saves.",
    )
    parser.add_argument(
        "--pair", type=Path, metavar="FILE", help="a latent and a pixel tower, as demo.tower_pair trains them"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="a build of the training pictures, for held-out art")
    parser.add_argument("--suggestive-every", type=positive, default=2, help="take one prompt in so many (default: 2)")
    parser.add_argument("--harmless-every", type=positive, default=3, help="take one prompt in so many (default: 3)")
    parser.add_argument("--at", type=float, default=0.5, help="share of the steps before the check (default: 0.5)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of drawing (default: bfloat16)")
    parser.add_argument(
        "--part",
        choices=("towers", "guard", "reno"),
        help="measure only this one; the others stay as they are in --out (default: all)",
    )
    add_out(parser)


def _latent_clip(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    from ..evaluate import latent_clip

    every = (args.suggestive_every, args.harmless_every)
    measure = latent_clip.Measure(out, load_checkpoint("demo", "cpu", args.dtype), args.pair, args.data, every, args.at)
    options = ("pair", "data", "suggestive_every", "harmless_every", "at", "dtype", "part")
    told = argparse.Namespace(**{**vars(args), **_names_only(args)})
    written = latent_clip.run(
        measure,
        command_line(told, "latent-clip", *options),
        lambda text: print(text, flush=True),
        [args.part] if args.part else (),
    )
    print("Written: " + ", ".join(str(path) for path in written))
    return 0


def _names_only(args: argparse.Namespace) -> dict[str, str | None]:
    """Paths as they stand in the table: without the folders of this machine."""
    return {name: path.name if (path := getattr(args, name)) else None for name in ("pair", "data")}


MEASUREMENTS = (add_latent_clip,)
