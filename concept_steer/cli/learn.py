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
from . import learn_many
from .help import Commands, command, positive
from .learn_options import METHODS, add_method_options, checkpoint_of, method_of
from .models import add_model_options, bar, draw, load_checkpoint, load_vector, picture_size
from .output import ready_files, write_picture

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..learn import LearnResult
    from ..vector import ConceptVector

Pairs = list[tuple[str, str]]
Folders = list[list[Path]]
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
        "  concept-steer learn --pictures my-cat --without other-cats --prompt 'a cat' --out my-cat\n"
        "  concept-steer learn --concepts people.yaml --out people\n",
    )
    parser.add_argument(
        "--pair",
        dest="pairs",
        nargs=2,
        action="append",
        metavar=("NEUTRAL", "POSITIVE"),
        help="two prompts that differ in the concept; repeatable, several pairs generalise better",
    )
    parser.add_argument(
        "--concepts",
        type=Path,
        metavar="FILE",
        help="many at once: a .yaml or .json file of names with their pairs; --out is then their folder",
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
        help="score: by gradient (default); difference: without training; pictures: implied by --pictures; "
        "self-discovery: the published recipe, slow",
    )
    parser.add_argument("--steps", type=positive, help="of the methods score and pictures (default: 50 and 100)")
    parser.add_argument(
        "--trajectories", type=positive, help="of the method score: more cost more memory (default: 32)"
    )
    parser.add_argument(
        "--batch", type=positive, help="rows at once: fewer need less memory (default: 16 or the paper's 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--spatial",
        action=argparse.BooleanOptionalAction,
        help="a map (C, H, W) instead of one value per channel; without it self-discovery makes one, and score only "
        "where one value per channel explains under 80 %% of the prompt's effect; --no-spatial: never",
    )
    parser.add_argument("--name", default="", help="the vector's title (default: the prompt)")
    parser.add_argument("--out", metavar="NAME_OR_FILE", help="a name in the library, or a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace a vector of that name")
    parser.add_argument("--no-preview", action="store_true", help="do not draw the before/after picture")
    add_method_options(parser)
    add_model_options(parser)


def _learn(args: argparse.Namespace) -> int:
    if args.concepts:
        return learn_many.run(args, interruptible)
    args.method = method_of(args)
    pairs = [] if args.pictures else _pairs(args)
    path = _target(args.out or args.name or (pairs[0][1] if pairs else args.prompt))
    picture = path.with_suffix(".png")
    state = checkpoint_of(args, path)
    args.overwrite = args.overwrite or (args.resume and state.exists())  # what the run saved when it was stopped
    ready_files([path] if args.no_preview else [path, picture], args.overwrite)
    folders = _folders(args)
    args.against = [load_vector(name)[0] for name in args.orthogonal_to or ()]
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    if args.method == "difference":
        result, interrupted = _difference(denoiser, pairs, args), False
    elif args.method == "pictures":
        result, interrupted = _pictures(denoiser, folders, args, state)
    else:
        result, interrupted = (_score if args.method == "score" else _recipe)(denoiser, pairs, folders, args, state)
    result.vector.save(path, overwrite=args.overwrite)
    print(result.summary())
    print(f"Saved as {path} (hash {result.vector.fingerprint[:10]}).")
    if interrupted:
        print("Learning was interrupted: this is the best vector so far, without a picture.", file=sys.stderr)
        if state.exists():
            print("The same command with --resume goes on from here.", file=sys.stderr)
        return 130
    if not args.no_preview:
        _preview(denoiser, result.vector, [neutral for neutral, _ in pairs] or [args.prompt], args, picture)
        print(f"Before and after: {picture}")
    return 0


def _pairs(args: argparse.Namespace) -> Pairs:
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


def _given(args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Options that every method has and `options`, without those left to the method (None)."""
    common = {"seed": args.seed, "spatial": args.spatial, "batch": args.batch, "title": args.name}
    return {key: value for key, value in {**common, **options}.items() if value is not None}


def _difference(denoiser: Denoiser, pairs: Pairs, args: argparse.Namespace) -> LearnResult:
    from .. import learn

    with bar("learning") as progress:
        return learn.learn_difference(denoiser, pairs, progress=progress.at, **_given(args, against=args.against))


def _score(
    denoiser: Denoiser, pairs: Pairs, folders: Folders, args: argparse.Namespace, state: Path
) -> tuple[LearnResult, bool]:
    from .. import learn

    options = _given(
        args,
        steps=args.steps,
        trajectories=args.trajectories,
        timestep_groups=args.timestep_groups,
        against=args.against,
        checkpoint=state,
        map_below=0.0 if args.spatial is False else None,
    )
    return _by_gradient(learn.learn_score, "trajectories", options, denoiser, pairs)


def _recipe(
    denoiser: Denoiser, pairs: Pairs, folders: Folders, args: argparse.Namespace, state: Path
) -> tuple[LearnResult, bool]:
    """Self-discovery, from pairs of prompts or from the pictures of a folder."""
    import torch

    from .. import learn
    from ..pictures import read_pictures

    latents = None
    if folders:
        pixels = read_pictures(folders[0], picture_size(denoiser))
        latents = torch.cat([denoiser.encode_pictures(one[None].to(denoiser.device)).float().cpu() for one in pixels])
        pairs = [(args.prompt, args.name or args.prompt)]
    options = _given(
        args,
        latents=latents,
        pictures=args.pictures_count,
        picture_steps=args.picture_steps,
        guidance=args.guidance,
        epochs=args.epochs,
        negative=args.negative,
        checkpoint=state,
    )
    return _by_gradient(learn.learn_self_discovery, "pictures", options, denoiser, pairs)


def _folders(args: argparse.Namespace) -> Folders:
    """The picture files of --pictures and --without, so far as given: a mistake shows before the model is loaded."""
    from ..pictures import picture_files

    return [picture_files(folder) for folder in (args.pictures, args.without) if folder is not None]


def _pictures(denoiser: Denoiser, folders: Folders, args: argparse.Namespace, state: Path) -> tuple[LearnResult, bool]:
    from .. import learn
    from ..pictures import read_pictures

    size = picture_size(denoiser)
    pixels, without = [*(read_pictures(files, size) for files in folders), None][:2]
    options = _given(args, without=without, steps=args.steps, checkpoint=state)
    return _by_gradient(learn.learn_pictures, "pictures", options, denoiser, pixels, args.prompt)


def _by_gradient(
    method: Callable[..., LearnResult], label: str, options: dict[str, Any], *given: Any
) -> tuple[LearnResult, bool]:
    """The result, and whether Ctrl-C ended learning early. label: of the first bar."""
    with bar(label) as caching, bar("learning") as progress, interruptible() as asked:

        def at(step: int, steps: int, loss: float, vector: ConceptVector) -> None:
            progress.at(step, steps, f"loss {loss:.3f}")

        try:
            result = method(
                *given,
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
def interruptible() -> Iterator[threading.Event]:
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
