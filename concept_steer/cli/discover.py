"""`concept-steer discover`: directions of h-space that nobody named, with names, strips and vector files."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError, LearnError
from .help import Commands, command, positive
from .learn import interruptible
from .models import add_model_options, bar, load_checkpoint
from .output import ready_folder, write_picture

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..learn.found import FoundDirection

METHODS = ("pca", "jacobian")  # as analysis.discovery.METHODS, which would need torch to look up
COUNTS = {"pca": 8, "jacobian": 3}
SEEDS = {"pca": 64, "jacobian": 4}


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "discover",
        _discover,
        help="find directions that nobody named, name them and show them",
        description="Find directions of h-space without any concept given: along which h varies from seed to seed "
        "(pca), or\nwhich change the predicted picture most (jacobian). Writes a vector file and a strip each, a sheet "
        "and a\nreport. Ctrl-C keeps what is done; a second Ctrl-C quits at once.",
        epilog="examples:\n"
        "  concept-steer discover --prompt 'a person' --out found\n"
        "  concept-steer discover --prompt 'a doctor' --prompt 'a pilot' --method jacobian --out found\n",
    )
    parser.add_argument(
        "--prompt", dest="prompts", action="append", required=True, metavar="PROMPT", help="repeatable; they take turns"
    )
    parser.add_argument("--method", choices=METHODS, default="pca", help="default: pca")
    parser.add_argument("--count", type=positive, help="directions (default: 8, with jacobian 3)")
    parser.add_argument("--seeds", type=positive, help="for all prompts together (default: 64, with jacobian 4)")
    parser.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="prompts to name directions by, one a line; {} stands for the neutral prompt",
    )
    parser.add_argument("--neutral", default="", help="what the words are compared with (default: the first prompt)")
    parser.add_argument("--spatial", action="store_true", help="maps (C, H, W) instead of one value per channel")
    parser.add_argument("--per-timestep", action="store_true", help="with pca: a direction for each timestep")
    parser.add_argument("--mask", type=Path, help="with jacobian: a picture, white where a change counts")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance (default: 5)")
    parser.add_argument("--strip-seeds", type=positive, default=3, help="rows of a strip (default: 3)")
    parser.add_argument("--no-strips", action="store_true", help="write the vectors and the report only")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--batch", type=positive, help="rows at once (default: 16, with jacobian 4)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder; may not hold a report yet")
    add_model_options(parser)


def _discover(args: argparse.Namespace) -> int:
    if args.mask is not None and args.method != "jacobian":
        args.parser.error("--mask belongs to --method jacobian")
    if args.per_timestep and args.method != "pca":
        args.parser.error("--per-timestep belongs to --method pca")
    words = _words(args.words) if args.words else []
    out = ready_folder(args.out)
    if (out / "report.json").exists():
        raise ConceptSteerError(f"{out} holds a report already: choose another folder with --out.")
    options = _options(args)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    neutral = args.neutral
    if denoiser.family == "demo" and not words:
        from ..demo.words import NEUTRAL, naming_words

        words, neutral = naming_words(), neutral or NEUTRAL
    with interruptible() as asked:
        found = _found(denoiser, args, words, neutral, options, asked.is_set)
        files = _save(found, out)
        _write_report(found, files, args, out)
        shown = 0
        if not args.no_strips:
            shown = _strips(denoiser, found, files, args, out, asked.is_set)
        print((out / "report.txt").read_text(encoding="utf-8"), end="")
        print(f"{len(found)} vectors and {shown} strips are in {out}.")
        if asked.is_set():
            print("It was interrupted: this is what was done by then.", file=sys.stderr)
            return 130
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {
        "count": args.count or COUNTS[args.method],
        "seeds": args.seeds or SEEDS[args.method],
        "spatial": args.spatial,
        "guidance": args.guidance,
        "seed": args.seed,
        "batch": args.batch or (16 if args.method == "pca" else 4),
    }
    if args.method == "pca":
        options["per_timestep"] = args.per_timestep
    elif args.mask is not None:
        options["mask"] = _mask(args.mask)
    return options


def _found(
    denoiser: Denoiser,
    args: argparse.Namespace,
    words: Sequence[str],
    neutral: str,
    options: dict[str, Any],
    stop: Callable[[], bool],
) -> list[FoundDirection]:
    from ..analysis.discovery import discover

    with bar("reading" if args.method == "pca" else "iterating") as reading, bar("naming") as naming:
        try:
            return discover(
                denoiser,
                args.prompts,
                method=args.method,
                words=words,
                neutral=neutral,
                reading=reading.at,
                naming=naming.at,
                stop=stop,
                **options,
            )
        except LearnError:
            if stop():  # too early: there is nothing to keep
                raise KeyboardInterrupt from None
            raise


def file_name(direction: FoundDirection) -> str:
    """Safe on every system: pca-1-smiling, or pca-1 without a name."""
    name = direction.names[0][0] if direction.names else ""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (direction.method, str(direction.number), words) if part)


def _save(found: Sequence[FoundDirection], out: Path) -> list[str]:
    names = [file_name(direction) for direction in found]
    for name, direction in zip(names, found, strict=True):
        direction.vector.save(out / f"{name}.safetensors")
    return names


def _strips(
    denoiser: Denoiser,
    found: Sequence[FoundDirection],
    files: Sequence[str],
    args: argparse.Namespace,
    out: Path,
    stop: Any,
) -> int:
    """How many strips were drawn: a strip for each direction and the sheet of their first rows."""
    from ..analysis.strips import Strips, contact_sheet

    prompts = [args.prompts[i % len(args.prompts)] for i in range(args.strip_seeds)]
    seeds = [args.seed + 1000 + i for i in range(args.strip_seeds)]  # not those the directions were found on
    strips = Strips(denoiser, prompts, seeds, guidance=args.guidance, batch=min(8, args.batch or 8))
    first_rows, labels = [], []
    for name, direction in zip(files, found, strict=True):
        if stop():
            break
        with bar(f"strip {direction.number} of {len(found)}") as progress:
            rows = strips.drawn(direction.vector, progress.at)
        settings = {"vector": direction.vector.fingerprint, "prompts": prompts, "seeds": seeds}
        write_picture(strips.picture(rows, direction.summary()), out / f"{name}.png", settings)
        first_rows.append(rows[0])
        labels.append(direction.vector.name)
        title = f"{prompts[0]}, seed {seeds[0]}: {args.method} directions"
        sheet = contact_sheet(first_rows, labels, strips.strengths, title)
        write_picture(sheet, out / "sheet.png", {"method": args.method, "prompts": prompts, "seeds": seeds})
    return len(first_rows)


def _write_report(found: Sequence[FoundDirection], files: Sequence[str], args: argparse.Namespace, out: Path) -> None:
    from ..vector_file import write_atomic

    report = {
        "method": args.method,
        "prompts": args.prompts,
        "seed": args.seed,
        "guidance": args.guidance,
        "checkpoint": args.checkpoint,
        "directions": [{**one.report(), "file": f"{name}.safetensors"} for one, name in zip(found, files, strict=True)],
    }
    text = "".join(one.summary() + "\n" for one in found)
    write_atomic(out / "report.json", json.dumps(report, indent=1).encode(), overwrite=True)
    write_atomic(out / "report.txt", text.encode(), overwrite=True)


def _words(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptSteerError(f"{path} cannot be read as a text file of words ({error}).") from None
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise ConceptSteerError(f"{path} holds no words: write one prompt a line, such as '{{}} at night'.")
    return words


def _mask(path: Path) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.asarray(picture.convert("L")).copy()).float() / 255
    except (OSError, SyntaxError, ValueError) as error:
        raise ConceptSteerError(f"{path} cannot be read as a picture ({error}).") from None
