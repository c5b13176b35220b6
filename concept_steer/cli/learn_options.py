"""Options of `concept-steer learn` that belong to single methods, and whether those given go together."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from ..errors import ConceptSteerError
from .help import positive

METHODS = ("score", "difference", "pictures", "self-discovery")
DRAWING = ("pictures_count", "picture_steps", "guidance", "negative")
CHECKPOINT = ".checkpoint"  # beside the vector, in place of its suffix
# option, the methods it belongs to
BELONGS = {
    "steps": ("score", "pictures"),
    "trajectories": ("score",),
    "timestep_groups": ("score",),
    "orthogonal_to": ("score", "difference"),
    "pictures_count": ("self-discovery",),
    "picture_steps": ("self-discovery",),
    "guidance": ("self-discovery",),
    "epochs": ("self-discovery",),
    "negative": ("self-discovery",),
    "resume": ("score", "pictures", "self-discovery"),
}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timestep-groups",
        type=positive,
        metavar="N",
        help="score: a vector for each of N groups of neighbouring timesteps (default: 1, one for all)",
    )
    parser.add_argument(
        "--orthogonal-to",
        action="append",
        metavar="NAME_OR_FILE",
        help="score, difference: take another concept's vector out of this one; repeatable",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run that was killed or stopped left its checkpoint"
    )
    recipe = parser.add_argument_group(
        "self-discovery (the published recipe; the defaults are the paper's and take hours)",
        "With --pictures FOLDER and --prompt it learns from those pictures instead of drawing its own.",
    )
    recipe.add_argument("--pictures-count", type=positive, metavar="N", help="pictures to draw (default: 1000)")
    recipe.add_argument("--picture-steps", type=positive, metavar="N", help="sampling steps for each (default: 30)")
    recipe.add_argument("--guidance", type=float, help="of these pictures (default: 7.5)")
    recipe.add_argument("--epochs", type=positive, metavar="N", help="passes over the pictures (default: 20)")
    recipe.add_argument("--negative", metavar="PROMPT", help="draw them with this negative prompt: what to avoid")


def method_of(args: argparse.Namespace) -> str:
    """The method, named or implied; leaves through the parser's error when the options do not go together."""
    method: str = args.method or ("pictures" if args.pictures else "score")
    by_pictures = method == "pictures" or (method == "self-discovery" and args.pictures is not None)
    if by_pictures and (args.pictures is None or not args.prompt):
        args.parser.error("learning from pictures needs --pictures FOLDER and --prompt TEXT")
    if by_pictures and (args.pairs or args.neutral is not None or args.positive is not None):
        args.parser.error("--pictures takes the place of --pair, --neutral and --positive: give --prompt instead")
    if not by_pictures and (args.pictures or args.without or args.prompt is not None):
        args.parser.error("--pictures, --without and --prompt belong to --method pictures")
    if method == "self-discovery" and args.without:
        args.parser.error("--without belongs to --method pictures")
    drawing = [name for name in DRAWING if getattr(args, name) is not None]
    if by_pictures and drawing and method == "self-discovery":
        args.parser.error(
            f"--{drawing[0].replace('_', '-')} is for pictures that are drawn, not for those of --pictures"
        )
    for option, methods in BELONGS.items():
        if getattr(args, option) not in (None, False) and method not in methods:
            name = option.replace("_", "-")
            args.parser.error(f"--{name} belongs to --method {' or '.join(methods)}, not to {method}")
    return method


def checkpoint_of(args: argparse.Namespace, vector: Path) -> Path:
    """Where the run that makes this vector keeps its state. Errors: ConceptSteerError when an older one is in the way.

    Without --resume that older one is only thrown away when --overwrite says so.
    """
    path = vector.with_suffix(CHECKPOINT)
    parts = [path, *path.parent.glob(f"{glob.escape(path.name)}.*")]
    found = [part for part in parts if part.exists()]
    if found and not args.resume:
        if not args.overwrite:
            raise ConceptSteerError(
                f"{found[0]} is there from a run that was killed or stopped: add --resume to go on with it, or "
                "--overwrite to begin anew."
            )
        for part in found:
            part.unlink()
    return path
