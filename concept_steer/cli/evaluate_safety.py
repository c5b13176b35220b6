"""`concept-steer evaluate i2p` and `evaluate safety`: inappropriate pictures, on one process or several.

    accelerate launch --num_processes 2 -m concept_steer evaluate i2p --prompts FILE --checkpoint PATH

Every process draws its part into one folder; then the first one writes the tables. What is drawn stays. On CPUs the
launcher starts several processes only with --multi_gpu, see `learn_many`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from .evaluate import _done, _say, add_out, command_line, names, shard
from .help import Commands, command, positive
from .models import add_model_options, load_checkpoint
from .output import ready_folder

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..evaluate.safety_drawing import Eye

DETECTORS = ("demo", "nudenet", "opennsfw", "q16")  # of safety.settings, which would need torch to look up
LEVELS = ("off", "gentle", "standard", "strict")
SAFETY_METHODS = (
    "none,negative_prompt,sld_weak,sld_medium,sld_strong,sld_max,sld_max_every2,sld_max_every4,vectors,gated,"
    "distilled,distilled_sld_medium,switch_default,switch_strict"
)


def add_i2p(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "i2p",
        _i2p,
        help="share of inappropriate pictures for a prompt set laid out as I2P, any model, with and without safety",
        description="Draw every prompt of an I2P csv (either public layout) with its own seed and guidance, let a\n"
        "detector look, and write shares per category. A run that was killed goes on where it was.",
        epilog="examples:\n"
        "  concept-steer evaluate i2p --prompts i2p.csv --checkpoint sd15 --detector nudenet --safety off,standard\n"
        "  accelerate launch --num_processes 4 -m concept_steer evaluate i2p --prompts i2p.csv --checkpoint sd15 ...\n",
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="csv; 'demo' is the embedded model's own set")
    add_model_options(parser)
    parser.add_argument("--pictures-per-prompt", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--safety", type=names, default=["off"], metavar="LEVELS", help=f"default: off; {_or(LEVELS)}")
    parser.add_argument("--safety-method", choices=("auto", "vectors", "sld", "both"), default="auto")
    parser.add_argument(
        "--detector",
        type=names,
        metavar="NAMES",
        help=f"{_or(DETECTORS)}; of several any one counts (published: q16,nudenet). Default: demo, on its own model",
    )
    parser.add_argument("--threshold", type=float, help="of the detectors, 0 to 1 (default: their own)")
    parser.add_argument("--steps", type=positive, help="DDIM steps (default: 20 on the embedded model, else 50)")
    parser.add_argument("--batch", type=positive, help="pictures at once (default: 16 on the embedded model, else 4)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="draw only this part of the pictures; no tables")
    add_out(parser)


I2P_OPTIONS = (
    "prompts", "checkpoint", "dtype", "pictures_per_prompt", "safety", "safety_method", "detector", "threshold",
    "steps", "batch", "limit",
)  # fmt: skip


def _i2p(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    if unknown := [level for level in args.safety if level not in LEVELS]:
        raise ConceptSteerError(f"{unknown[0]!r} is no safety level; known are {_or(LEVELS)}.")
    from ..evaluate import i2p
    from ..evaluate.i2p_prompts import SUGGESTIVE
    from ..safety import SafetySettings
    from .learn_many import process_place

    own = args.checkpoint == "demo"
    args.steps, args.batch = args.steps or (20 if own else 50), args.batch or (16 if own else 4)
    job = i2p.job_of(
        out,
        SUGGESTIVE if args.prompts == "demo" else Path(args.prompts).expanduser(),
        limit=args.limit,
        pictures=args.pictures_per_prompt,
        steps=args.steps,
        batch=args.batch,
    )
    eye = _eye(args.detector or (["demo"] if own else []), args.threshold)
    levels = {name: SafetySettings(level=name, method=args.safety_method) for name in args.safety}
    with process_place(args.device) as here:
        denoiser = load_checkpoint(args.checkpoint, here.device, args.dtype)
        part = args.shard or (here.rank, here.processes)
        i2p.run(out, job, denoiser, eye, levels, shard=part, say=_say_as(here))
        here.gather([])  # nobody counts before all have drawn
        if args.shard is not None or here.rank > 0:
            return 0
        about = {
            "model": f"{Path(args.checkpoint).name} ({denoiser.checkpoint_hash[:10]}), {args.dtype}",
            "detector": eye.name,
            **{f"safety {name}": level.text() for name, level in levels.items()},
        }
        return _done(i2p.report(out, job, args.safety, command_line(args, "i2p", *I2P_OPTIONS), about))


def add_safety(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "safety",
        _safety,
        help="what each way to safety keeps out, spoils and costs: Safe Latent Diffusion, vectors, the switch",
        description="Draw suggestive, harmless and attacked prompts by every method on the embedded model, and write\n"
        "the table of safety. In two processes: --prepare, then --shard 1/2 and --shard 2/2 side by side, then\n"
        "neither; or all of it by accelerate launch.",
    )
    parser.add_argument("--methods", type=names, default=names(SAFETY_METHODS), help=f"default: {SAFETY_METHODS}")
    parser.add_argument("--set", metavar="FILE", help="safety vectors (default: those found for the model)")
    parser.add_argument("--text", help="the words that guidance and the negative prompt are given")
    parser.add_argument("--pictures", type=positive, default=1, help="per suggestive prompt (default: 1)")
    parser.add_argument("--benign-pictures", type=positive, default=1, help="per harmless prompt (default: 1)")
    parser.add_argument("--attack-pictures", type=positive, default=2, help="per attacked prompt (default: 2)")
    parser.add_argument("--steps", type=positive, default=12, help="DDIM steps (default: 12)")
    parser.add_argument("--batch", type=positive, default=16, help="pictures at once (default: 16)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts of each set")
    parser.add_argument("--targets", type=int, default=0, help="inappropriate things to attack (default: 0, all)")
    parser.add_argument("--restarts", type=positive, default=2, help="searches for each of them (default: 2)")
    parser.add_argument("--search-steps", type=positive, default=20, help="of each search (default: 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--prepare", action="store_true", help="only search the attacks")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="draw only this part of the pictures; no tables")
    add_out(parser)


SAFETY_OPTIONS = (
    "methods", "set", "text", "pictures", "benign_pictures", "attack_pictures", "steps", "batch", "limit", "targets",
    "restarts", "search_steps", "dtype",
)  # fmt: skip


def _safety(args: argparse.Namespace) -> int:
    out = ready_folder(args.out)
    import torch

    from ..demo import model
    from ..evaluate import safety, safety_report
    from ..evaluate.attack import TextEncoder
    from ..evaluate.safety_attacks import Effort
    from ..evaluate.safety_methods import WORLD_TEXT, known
    from .learn_many import process_place

    chosen = known(args.methods)
    with process_place("auto") as here:
        denoiser, text = load_checkpoint("demo", here.device, args.dtype), model.load()
        measure = safety.Measure(
            out,
            denoiser,
            _eye(["demo"], None),
            TextEncoder(text.tokenizer, text.text_encoder),
            _set(args.set, denoiser, chosen),
            chosen,
            args.text or WORLD_TEXT,
            (args.pictures, args.benign_pictures, args.attack_pictures),
            args.steps,
            args.batch,
            args.limit,
            Effort(targets=args.targets, restarts=args.restarts, steps=args.search_steps),
        )
        say = _say_as(here)
        if here.rank == 0 and args.shard is None:
            safety.prepare(measure, say)
        here.gather([])  # the attacks are there
        if args.prepare:
            return 0
        safety.draw(measure, args.shard or (here.rank, here.processes), say)
        here.gather([])  # all pictures are there
        if args.shard is not None or here.rank > 0:
            return 0
        about = {"model": f"demo ({denoiser.checkpoint_hash[:10]}), {args.dtype}", "threads": torch.get_num_threads()}
        return _done(safety_report.report(measure, command_line(args, "safety", *SAFETY_OPTIONS), about))


def _set(file: str | None, denoiser: Denoiser, chosen: tuple[str, ...]) -> Any:
    """The named set, or what is found for the model; None where no method needs one."""
    from ..evaluate.safety_methods import needs_set
    from ..safety import SafetySet, find_safety_set

    if file is not None:
        found: SafetySet | None = SafetySet.load(Path(file).expanduser())
    else:
        found = find_safety_set(denoiser.family) if needs_set(chosen) else None
    if found is not None:
        found.check(denoiser.family, denoiser.channels)
    return found


def _eye(detectors: list[str], threshold: float | None) -> Eye:
    from ..evaluate.safety_drawing import DetectorEye, JudgesEye

    if not detectors:
        raise ConceptSteerError(
            f"Name what shall look at this model's pictures, with --detector: {_or(DETECTORS[1:])}. The judges of the "
            "embedded model ('demo') know its own world only."
        )
    if detectors == ["demo"]:
        return JudgesEye(threshold=threshold)
    from ..safety import load_detector

    return DetectorEye([load_detector(name) for name in detectors], threshold)


def _say_as(here: Any) -> Any:
    mine = f" (process {here.rank + 1} of {here.processes})" if here.processes > 1 else ""
    return lambda text: _say(text + mine)


def _or(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]


MEASUREMENTS = (add_i2p, add_safety)
