"""`concept-steer erase ...`: what a model paints unasked, found in the pictures it learns from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .erase_learn import add_learn
from .help import Commands, command, positive
from .models import bar
from .output import ready_folder

EPILOG = """examples:
  concept-steer erase scan my-pictures --detector qr --detector text=0.7 --out found
  concept-steer erase scan my-pictures --detector watermark --bins 4 --caption 'a photo' --out found
  concept-steer erase scan my-pictures --detector model:company-logo.onnx --out found
"""
DETECTORS = ("qr", "text", "watermark", "nudenet", "demo-watermark", "demo-qr", "demo-text")  # a test keeps them equal


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "erase",
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="find what a model paints unasked (watermarks, QR codes, text), and keep it out",
        description="Geom-Erasing: what nobody asked for is found by a detector, and learned by where it is.",
        epilog=EPILOG,
    )
    uses = parser.add_subparsers(title="uses", metavar="USE", required=True)
    add_scan(uses, common)
    add_learn(uses, common)


def add_scan(uses: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        uses,
        common,
        "scan",
        _scan,
        help="look through a folder of pictures for unasked things",
        description="Look through a folder of pictures for unasked things. Writes found.jsonl (what is where),\n"
        "report.txt and sheet.jpg; nothing in the folder is changed. Captions are read from NAME.txt beside a\n"
        "picture or from the folder's metadata.jsonl. Ctrl-C keeps what was looked at; the same command goes on.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, also in its subfolders")
    parser.add_argument(
        "--detector",
        dest="detectors",
        action="append",
        required=True,
        metavar="NAME[=THRESHOLD]",
        help=f"repeatable: {', '.join(DETECTORS)}, or model:FILE for your own (.onnx); thresholds go from 0 to 1",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the results go; not FOLDER itself"
    )
    parser.add_argument(
        "--bins", type=positive, help="also write captions with location tokens of a grid of BINS x BINS, for training"
    )
    parser.add_argument("--caption", metavar="TEXT", help="for pictures that have none")


def _scan(args: argparse.Namespace) -> int:
    from ..geom_erasing.dataset import FOUND, REPORT, SHEET, scan
    from ..geom_erasing.detectors import detector_spec
    from .learn import interruptible

    detectors = [detector_spec(text) for text in args.detectors]
    ready_folder(args.out)
    with bar("scan") as progress, interruptible() as asked:
        result = scan(
            args.folder,
            detectors,
            args.out,
            caption=args.caption,
            bins=args.bins,
            progress=progress.at,
            stop=asked.is_set,
        )
    print((result.out / REPORT).read_text(encoding="utf-8"), end="")
    print(f"Written to {result.out}: {FOUND}, {REPORT}, {SHEET}" + (", captions" if args.bins else "") + ".")
    if not result.complete:
        print("The scan was stopped; the same command goes on from there.", file=sys.stderr)
        return 130
    return 0
