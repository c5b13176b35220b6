"""`concept-steer erase learn`: location tokens and a LoRA against what a scan found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .help import Commands, command, positive
from .models import add_model_options, bar, draw, load_checkpoint, picture_size
from .output import ready_files, write_picture

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..geom_erasing import ErasingResult

WAYS = ("tokens", "lora", "masked")
RANK = 16
PREVIEW = 4
EPILOG = """examples:
  concept-steer erase scan my-pictures --detector watermark --out found
  concept-steer erase learn found/found.jsonl --way lora --out erased
  accelerate launch --num_processes 2 -m concept_steer erase learn found/found.jsonl --way lora --out erased
"""


def add_learn(uses: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        uses,
        common,
        "learn",
        _learn,
        help="learn an embedding for negative prompts, and a LoRA, against what a scan found",
        description="Learn against what a scan found. tokens: an embedding for negative prompts, the model stays as\n"
        "it is; lora: fine-tuning on these pictures, which are told where the thing is (use both files); masked:\n"
        "fine-tuning that does not look where the thing is (the LoRA alone). Ctrl-C keeps what was learned so far.",
        epilog=EPILOG,
    )
    parser.add_argument("found", type=Path, metavar="FOUND", help="the found.jsonl of concept-steer erase scan")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where the scanned pictures are now, if moved")
    parser.add_argument("--concept", default="", help="what to erase, if several things were found")
    parser.add_argument("--way", choices=WAYS, default="tokens", help="default: tokens")
    parser.add_argument("--bins", type=positive, default=4, help="places a side, each a token (default: 4)")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of what is not covered (default: 0.5)")
    parser.add_argument("--rank", type=positive, default=RANK, help=f"of the LoRA (default: {RANK})")
    parser.add_argument("--steps", type=positive, default=400, help="default: 400")
    parser.add_argument("--batch", type=positive, default=16, help="pictures a step (default: 16)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of the LoRA (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--plain-loss", action="store_true", help="do not weigh the timesteps evenly, as published")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16: faster, the rest as it is")
    parser.add_argument("--save-memory", action="store_true", help="gradient checkpointing: slower, in less memory")
    parser.add_argument("--name", default="", help="the embedding's word (default: no-CONCEPT)")
    parser.add_argument("--out", type=Path, default=Path("concept-steer-out"), metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace files of that name")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped or killed")
    parser.add_argument("--no-preview", action="store_true", help="do not draw the before/after picture")
    add_model_options(parser)


def _learn(args: argparse.Namespace) -> int:
    import torch

    from ..errors import LearnError
    from ..geom_erasing import ErasingSettings, learn_erasing
    from ..geom_erasing.dataset import read_found
    from ..geom_erasing.reading import concept_of, read_examples
    from .learn import interruptible
    from .learn_many import process_place

    found = read_found(args.found, args.pictures)
    masked = args.way == "masked"
    concept = "" if masked and not args.concept else concept_of(found, args.concept)
    name = args.name or "no-" + ("marks" if not concept else "-".join(concept.lower().split()))
    files = {kind: args.out / f"{name}{ending}" for kind, ending in _endings(args).items()}
    state = args.out / f"{name}.checkpoint"
    _check_state(state, args)
    ready_files(list(files.values()), args.overwrite or (args.resume and state.exists()))
    settings = ErasingSettings(
        bins=args.bins, alpha=args.alpha, steps=args.steps, batch=args.batch, lora_rate=args.rate, seed=args.seed,
        rank=0 if args.way == "tokens" else args.rank, even=not args.plain_loss, way="masked" if masked else "told",
    )  # fmt: skip
    with process_place(args.device) as place, interruptible() as asked:
        denoiser = load_checkpoint(args.checkpoint, place.device, args.dtype)
        if args.save_memory:
            denoiser.unet.enable_gradient_checkpointing()  # type: ignore[attr-defined]
        with bar("pictures") as reading:
            examples = read_examples(denoiser, found, concept, picture_size(denoiser), reading.at)
        with bar("learning") as progress:
            try:
                result = learn_erasing(
                    denoiser,
                    examples,
                    concept or "marks",
                    name=name,
                    settings=settings,
                    autocast=torch.bfloat16 if args.bf16 else None,
                    progress=lambda step, steps, loss, tokens: progress.at(step, steps, f"loss {loss:.3f}"),
                    stop=asked.is_set,
                    checkpoint=state,
                    average=_average(place.processes),
                    rank=place.rank,
                )
            except LearnError:
                if asked.is_set():
                    raise KeyboardInterrupt from None
                raise
        if place.rank:
            return 0
    _write(result, files, args)
    print(result.summary())
    if asked.is_set():
        print("Learning was interrupted: this is what was learned so far. Go on with --resume.", file=sys.stderr)
        return 130
    if not args.no_preview:
        _preview(denoiser, result, [caption for caption in examples.captions if caption], files, args)
    print("Written: " + ", ".join(str(path) for path in files.values() if path.exists()))
    return 0


def _average(processes: int) -> Callable[[Iterable[Any]], None] | None:
    """Of gradients, over the processes of `accelerate launch`."""
    if processes < 2:
        return None
    from ..demo.distributed import average_gradients

    return lambda parameters: average_gradients(parameters, processes)


def _endings(args: argparse.Namespace) -> dict[str, str]:
    ends = {"report": ".json"}
    if args.way != "masked":
        ends["embedding"] = ".safetensors"
    if args.way != "tokens":
        ends["lora"] = "-lora.safetensors"
    return ends if args.no_preview else {**ends, "preview": ".png"}


def _check_state(state: Path, args: argparse.Namespace) -> None:
    from ..errors import LearnError

    if state.exists() and not (args.resume or args.overwrite):
        raise LearnError(
            f"{state} is there from a run that was killed or stopped: add --resume to go on with it, or --overwrite to "
            "begin anew."
        )
    if state.exists() and not args.resume:
        state.unlink(missing_ok=True)  # of several processes one comes first


def _write(result: ErasingResult, files: dict[str, Path], args: argparse.Namespace) -> None:
    from ..geom_erasing import lora
    from ..vector_file import write_atomic

    if result.tokens is not None:
        result.tokens.save(files["embedding"], overwrite=True)
    if result.lora is not None:
        lora.save(result.lora, files["lora"], {"concept": result.concept, "way": args.way}, overwrite=True)
    told = {key: value for key, value in vars(result).items() if key not in ("tokens", "lora")}
    numbers = {key: None if isinstance(value, float) and value != value else value for key, value in told.items()}
    write_atomic(files["report"], json.dumps(numbers, indent=1).encode(), overwrite=True)


def _preview(
    denoiser: Denoiser, result: ErasingResult, captions: list[str], files: dict[str, Path], args: argparse.Namespace
) -> None:
    """The same captions and seeds without and with what was learned."""
    from contextlib import nullcontext

    from ..geom_erasing import knowing, lora
    from ..pictures import before_after

    prompts = (captions or [""])[:PREVIEW]
    prompts += [prompts[0]] * (PREVIEW - len(prompts))
    seeds = [args.seed + 1000 + i for i in range(PREVIEW)]
    before = draw(denoiser, prompts, seeds, label="without")
    own: Any = knowing(denoiser, [result.tokens] if result.tokens else [])
    with lora.adapted(denoiser, args.rank, 0, result.lora) if result.lora else nullcontext():
        after = draw(own, prompts, seeds, label="with", negative=result.tokens.name if result.tokens else "")
    under = [f"{prompt}, seed {seed}" for prompt, seed in zip(prompts, seeds, strict=True)]
    sheet = before_after(before, after, under, f"without {result.concept}", args.way)
    write_picture(sheet, files["preview"], {"prompts": prompts, "seeds": seeds, "concept": result.concept})
