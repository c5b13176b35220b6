"""`concept-steer evaluate audit`: whether the audit's readings foretell what is drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConceptSteerError
from .evaluate import add_out, command_line
from .help import Commands, command
from .output import ready_folder


def add_audit(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "audit",
        _audit,
        help="whether the audit's readings foretell what is drawn",
        description="Read every role of the embedded model's world, and hold it against the data card and against "
        "judged pictures.",
    )
    parser.add_argument(
        "--pictures", type=int, default=100, help="of each role and scene; 0: take what is there (default: 100)"
    )
    parser.add_argument("--drawn", type=Path, metavar="DIR", help="an --out of `evaluate fairness`: its pictures count")
    parser.add_argument("--vector", dest="vectors", action="append", default=[], type=Path, help="repeatable: to name")
    parser.add_argument(
        "--attribute",
        dest="attributes",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="repeatable: 'gender' or 'skin tone' with its learned file, to read everything with it on",
    )
    parser.add_argument("--prompts", type=int, default=5000, help="of the run that speed is measured on; 0: none")
    parser.add_argument("--draw-only", action="store_true", help="draw and judge what is missing; no tables")
    add_out(parser)


def _audit(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    from ..evaluate import audit

    attributes = {}
    for text in args.attributes:
        name, sign, file = text.partition("=")
        if not sign or name not in audit.ATTRIBUTES:
            raise ConceptSteerError(f"--attribute {text!r}: expected NAME=FILE with {' or '.join(audit.ATTRIBUTES)}.")
        attributes[name] = Path(file)
    written = audit.run(
        out,
        pictures=args.pictures,
        drawn=args.drawn,
        vectors=args.vectors,
        attributes=attributes,
        prompts=args.prompts,
        draw_only=args.draw_only,
        command=command_line(args, "audit", "pictures", "prompts"),
        say=lambda text: print(text, flush=True),
    )
    if written:
        print("Written: " + ", ".join(str(path) for path in written))
    return 0


MEASUREMENTS = (add_audit,)
