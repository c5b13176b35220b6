"""`concept-steer learn`: a concept vector from pairs of prompts or from pictures, with a before/after picture."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LearnError
from .help import Commands, command, positive
from .models import add_model_options, bar, draw, load_checkpoint, picture_size
from .output import ready_files, write_picture

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..learn import LearnResult
    from ..vector import ConceptVector

METHODS = ("score", "difference", "pictures")
PREVIEW = 4  # pictures without and with


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "learn",
        _learn,
        help="learn a concept vector from pairs of prompts or from pictures",
        description="Learn a concept vector from pairs of prompts, neutral and with the concept, or from a folder of 5 "
        "to 20\npictures that show it. Ctrl-C ends learning and saves the best vector so far; a second Ctrl-C quits at "
        "once.",
        epilog="examples:\n"
        "  concept-steer learn --pair 'a doctor' 'a woman doctor' --pair 'a judge' 'a woman judge' --out woman\n"
        "  concept-steer learn --checkpoint ~/models/sd15 --neutral 'a face' --positive 'a smiling face' --out smile\n"
        "  concept-steer learn --pictures my-cat --without other-cats --prompt 'a cat' --out my-cat\n",
    )
    parser.add_argument(
        "--pair",
        dest="pairs",
        nargs=2,
        action="append",
        metavar=("NEUTRAL", "POSITIVE"),
        help="two prompts that differ in the concept; repeatable, several pairs generalise better",
    )
    parser.add_argument("--neutral", metavar="PROMPT", help="with --positive: a single pair")
    parser.add_argument("--positive", metavar="PROMPT")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="png, jpg or webp pictures that show the concept, instead of pairs",
    )
    parser.add_argument(
        "--without", type=Path, metavar="FOLDER", help="with --pictures: pictures like those, but without the concept"
    )
    parser.add_argument("--prompt", help="with --pictures: what all the pictures show, e.g. 'a cat'")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="score: by gradient (default); difference: without training; pictures: implied by --pictures",
    )
    parser.add_argument("--steps", type=positive, help="of learning by gradient, not of difference (default: 100)")
    parser.add_argument(
        "--trajectories", type=positive, help="of the method score: more cost more memory (default: 32)"
    )
    parser.add_argument("--batch", type=positive, default=16, help="rows at once: fewer need less memory (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--spatial", action="store_true", help="a map (C, H, W) instead of one value per channel")
    parser.add_argument("--name", default="", help="the vector's title (default: the prompt)")
    parser.add_argument("--out", metavar="NAME_OR_FILE", help="a name in the library, or a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace a vector of that name")
    parser.add_argument("--no-preview", action="store_true", help="do not draw the before/after picture")
    add_model_options(parser)


def _learn(args: argparse.Namespace) -> int:
    args.method = _method(args)
    pairs = [] if args.method == "pictures" else _pairs(args)
    path = _target(args.out or args.name or (pairs[0][1] if pairs else args.prompt))
    picture = path.with_suffix(".png")
    ready_files([path] if args.no_preview else [path, picture], args.overwrite)
    folders = _folders(args)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    if args.method == "pictures":
        result, interrupted = _pictures(denoiser, folders, args)
    else:
        result, interrupted = (_difference if args.method == "difference" else _score)(denoiser, pairs, args)
    result.vector.save(path, overwrite=args.overwrite)
    print(result.summary())
    print(f"Saved as {path} (hash {result.vector.fingerprint[:10]}).")
    if interrupted:
        print("Learning was interrupted: this is the best vector so far, without a picture.", file=sys.stderr)
        return 130
    if not args.no_preview:
        _preview(denoiser, result.vector, [neutral for neutral, _ in pairs] or [args.prompt], args, picture)
        print(f"Before and after: {picture}")
    return 0


def _method(args: argparse.Namespace) -> str:
    """The method, named or implied; leaves through the parser's error when the options do not go together."""
    method: str = args.method or ("pictures" if args.pictures else "score")
    by_pictures = method == "pictures"
    if by_pictures and (args.pictures is None or not args.prompt):
        args.parser.error("learning from pictures needs --pictures FOLDER and --prompt TEXT")
    if by_pictures and (args.pairs or args.neutral is not None or args.positive is not None):
        args.parser.error("--pictures takes the place of --pair, --neutral and --positive: give --prompt instead")
    if not by_pictures and (args.pictures or args.without or args.prompt is not None):
        args.parser.error("--pictures, --without and --prompt belong to --method pictures")
    if method == "difference" and args.steps:
        args.parser.error("--steps does not belong to --method difference")
    if method != "score" and args.trajectories:
        args.parser.error("--trajectories belongs to --method score")
    return method


def _pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    if (args.neutral is None) != (args.positive is None):
        args.parser.error("--neutral and --positive belong together")
    if bool(args.pairs) == (args.neutral is not None):
        args.parser.error("name the prompts with --pair NEUTRAL POSITIVE, or with --neutral and --positive")
    return [(neutral, positive) for neutral, positive in args.pairs or [(args.neutral, args.positive)]]


def _target(out: str) -> Path:
    """The file of --out: itself when it ends in .safetensors, else of that name in the library's first folder."""
    from ..library import Library, default_folders, safe_name
    from ..vector_file import SUFFIX

    if out.endswith(SUFFIX):
        return Path(out).expanduser()
    return Library(default_folders()).folders[0] / (safe_name(out) + SUFFIX)


def _difference(denoiser: Denoiser, pairs: list[tuple[str, str]], args: argparse.Namespace) -> tuple[LearnResult, bool]:
    from .. import learn

    with bar("learning") as progress:
        result = learn.learn_difference(
            denoiser,
            pairs,
            seed=args.seed,
            spatial=args.spatial,
            batch=args.batch,
            title=args.name,
            progress=progress.at,
        )
    return result, False


def _score(denoiser: Denoiser, pairs: list[tuple[str, str]], args: argparse.Namespace) -> tuple[LearnResult, bool]:
    from .. import learn

    return _by_gradient(learn.learn_score, "trajectories", args, denoiser, pairs, trajectories=args.trajectories)


def _folders(args: argparse.Namespace) -> list[list[Path]]:
    """The picture files of --pictures and --without, so far as given: a mistake shows before the model is loaded."""
    from ..pictures import picture_files

    return [picture_files(folder) for folder in (args.pictures, args.without) if folder is not None]


def _pictures(denoiser: Denoiser, folders: list[list[Path]], args: argparse.Namespace) -> tuple[LearnResult, bool]:
    from .. import learn
    from ..pictures import read_pictures

    size = picture_size(denoiser)
    pixels, without = [*(read_pictures(files, size) for files in folders), None][:2]
    return _by_gradient(learn.learn_pictures, "pictures", args, denoiser, pixels, args.prompt, without=without)


def _by_gradient(
    method: Callable[..., LearnResult], label: str, args: argparse.Namespace, *given: Any, **options: Any
) -> tuple[LearnResult, bool]:
    """The result, and whether Ctrl-C ended learning early. label: of the first bar. Options of None are left out."""
    options = {key: value for key, value in {**options, "steps": args.steps}.items() if value is not None}
    with bar(label) as caching, bar("learning") as progress, _interruptible() as asked:

        def at(step: int, steps: int, loss: float, vector: ConceptVector) -> None:
            progress.at(step, steps, f"loss {loss:.3f}")

        try:
            result = method(
                *given,
                seed=args.seed,
                spatial=args.spatial,
                batch=args.batch,
                title=args.name,
                caching=caching.at,
                progress=at,
                stop=asked.is_set,
                **options,
            )
        except LearnError:
            if asked.is_set():  # before its first step: there is nothing to keep
                raise KeyboardInterrupt from None
            raise
        return result, asked.is_set()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C only sets the event; the second one raises KeyboardInterrupt as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    former = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nStopping after this step; Ctrl-C again quits at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, former)


def _preview(
    denoiser: Denoiser, vector: ConceptVector, different: list[str], args: argparse.Namespace, path: Path
) -> None:
    from ..steering import Steer

    prompts = [different[i % len(different)] for i in range(PREVIEW)]
    seeds = [args.seed + 1000 + i for i in range(PREVIEW)]  # not the ones it was learned on
    before = draw(denoiser, prompts, seeds, label="without")
    after = draw(denoiser, prompts, seeds, [Steer(vector)], label="with")
    captions = [f"{prompt}, seed {seed}" for prompt, seed in zip(prompts, seeds, strict=True)]
    from ..pictures import before_after

    sheet = before_after(before, after, captions, f"{vector.name}, learned by {args.method}", f"{vector.name} 1")
    write_picture(
        sheet, path, {"vector": vector.fingerprint, "title": vector.title, "prompts": prompts, "seeds": seeds}
    )
