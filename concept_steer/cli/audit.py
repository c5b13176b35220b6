"""`concept-steer audit CHECKPOINT`: what a model takes for granted, as one page to read before using it.

Several processes share the reading where a launcher starts them (see learn_many):

    accelerate launch --num_processes 2 --multi_gpu -m concept_steer audit model.safetensors --out audit
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConceptSteerError
from .help import Commands, command, positive
from .learn import interruptible
from .learn_many import process_place
from .models import DTYPES, bar, load_checkpoint
from .output import ready_folder

if TYPE_CHECKING:
    from ..analysis.audit import Audit, AuditSettings, Judge
    from ..analysis.word_list import WordList
    from ..denoiser import Denoiser

MAPS = ("pca", "umap")


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "audit",
        _audit,
        help="what a checkpoint takes for granted: biases by role, associations, a map; one HTML page",
        description="Read from the model what it takes for granted when a prompt names a role and nothing else. Writes "
        "index.html\n(one page, works offline), audit.json and every chart as PNG. A stopped run goes on where it was.",
        epilog="examples:\n"
        "  concept-steer audit demo --out audit\n"
        "  concept-steer audit model.safetensors --words words.yaml --fix --out audit\n"
        "  concept-steer audit demo --print-words > words.json      the list to edit\n",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="as --checkpoint of other commands; or 'demo'")
    parser.add_argument("--words", type=Path, metavar="FILE", help=".yaml or .json: roles, attributes, further words")
    parser.add_argument("--print-words", action="store_true", help="print the list that would be used, and stop")
    parser.add_argument("--fix", action="store_true", help="learn vectors that counter the leans, and read again")
    parser.add_argument(
        "--judge", metavar="DIR", help="a folder of CLIP (transformers) that judges the sample pictures"
    )
    parser.add_argument("--seeds", type=positive, default=8, help="noises that each prompt is read from (default: 8)")
    parser.add_argument("--strongest", type=int, default=4, help="findings shown with pictures (default: 4)")
    parser.add_argument("--samples", type=int, default=16, help="pictures of each; 0 draws none (default: 16)")
    parser.add_argument("--steps", type=positive, default=20, help="DDIM steps of the pictures (default: 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="of the pictures (default: 5)")
    parser.add_argument("--map", choices=MAPS, default="pca", help="umap needs the extra 'umap' (default: pca)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where readings are kept (default: OUT/readings)")
    parser.add_argument("--batch", type=positive, default=32, help="rows at once (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--out", type=Path, default=Path("concept-steer-audit"), metavar="DIR", help="default: ./concept-steer-audit"
    )


def _audit(args: argparse.Namespace) -> int:
    from ..analysis.audit import fill_cache, readers
    from ..analysis.audit_files import write_audit
    from ..analysis.maps import check_method

    if args.print_words:
        family = "demo" if args.checkpoint == "demo" else ""
        print(json.dumps(words_for(args.words, family).as_dict(), indent=1, ensure_ascii=False))
        return 0
    words, settings = read_given(args.words), _settings(args)
    check_method(settings.map_method)
    out = ready_folder(args.out)
    cache = ready_folder(args.cache or out / "readings")
    with process_place(args.device) as place, interruptible() as asked:
        denoiser = load_checkpoint(args.checkpoint, place.device, args.dtype)
        words = words or words_for(None, denoiser.family)
        judge = judge_for(args.judge, denoiser.family, words)
        began = time.perf_counter()
        with bar("reading") as progress:
            both = readers(denoiser, words, settings, cache, args.batch, asked.is_set)
            fill_cache(
                both,
                words,
                rank=place.rank,
                processes=place.processes,
                progress=lambda what, done, total: progress.at(done, total),
            )
        rows = sum(place.gather([denoiser.cost.unet_rows]))  # all have read their share
        if place.rank > 0:
            return 0
        already = rows, time.perf_counter() - began
        found = _run(denoiser, words, settings, judge, cache, already, args, asked.is_set)
        files = write_audit(found, out)
    print(found.summary())
    print(f"The page: {files[-1]} (with audit.json and {len(files) - 2} further files beside it).")
    return 0


def _run(
    denoiser: Denoiser,
    words: WordList,
    settings: AuditSettings,
    judge: Judge | None,
    cache: Path,
    already: tuple[float, float],
    args: argparse.Namespace,
    stop: Callable[[], bool],
) -> Audit:
    from ..analysis.audit import audit

    with bar("audit") as progress:
        return audit(
            denoiser,
            words,
            settings=settings,
            name=args.checkpoint,
            cache=cache,
            batch=args.batch,
            judge=judge,
            fix=args.fix,
            already=already,
            progress=lambda what, done, total: progress.at(done, total, what),
            stop=stop,
        )


def _settings(args: argparse.Namespace) -> AuditSettings:
    from ..analysis.audit import AuditSettings

    if args.strongest < 0 or args.samples < 0:
        raise ConceptSteerError("--strongest and --samples are whole numbers from 0 upwards.")
    usual = AuditSettings()
    return AuditSettings(
        replace(usual.defaults, seeds=args.seeds),
        replace(usual.space, seeds=args.seeds),
        args.strongest,
        args.samples,
        args.steps,
        args.guidance,
        args.map,
    )


def read_given(path: Path | None) -> WordList | None:
    """The list of --words, read before anything is loaded."""
    from ..analysis.word_list import read_words

    return None if path is None else read_words(path)


def words_for(path: Path | None, family: str) -> WordList:
    """A file's list, or the shipped one; the embedded model has its own."""
    from ..demo.auditing import usual_words

    return read_given(path) or usual_words(family)


def judge_for(folder: str | None, family: str, words: WordList) -> Judge | None:
    """CLIP from a folder, the embedded model's own judges, or nobody."""
    if folder:
        from ..hosts.clip_judge import ClipJudge

        return ClipJudge(folder, words)
    from ..demo.auditing import DemoJudge

    return DemoJudge() if family == "demo" else None
