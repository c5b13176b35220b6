"""`concept-steer optimise`: pictures from a starting noise that was optimised for rewards (ReNO), before and after."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from .help import Commands, command, positive
from .learn import interruptible
from .models import add_model_options, bar, load_checkpoint
from .output import ready_folder, write_picture

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..latent_clip import LatentClipModel, NoiseResult, Reward, Snapshot

STUDENT = "demo-student"
OUT = Path("concept-steer-optimised")
SHEET, REPORT = "sheet.png", "report.json"


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "optimise",
        _optimise,
        help="optimise the starting noise of a one-step or few-step model (ReNO)",
        description="Climb the gradient of rewards with a picture's starting noise; the model stays as it is. Rewards\n"
        "look at latents, so nothing is decoded on the way. Ctrl-C keeps the best so far. Writes each picture before\n"
        "and after with its settings, its latents, a sheet and a report.",
        epilog="examples:\n"
        "  concept-steer optimise --prompt 'a woman pilot with dark skin' --count 4 --out better\n"
        "  concept-steer optimise --prompt 'a party' --absent alcohol --absent smoking --out sober\n"
        "  concept-steer optimise --checkpoint sdxl-turbo --model latent-clip-b8.safetensors --prompt 'a cat'\n",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--text", help="what the pictures are rewarded for (default: the prompt)")
    parser.add_argument("--against", action="append", default=[], metavar="TEXT", help="what to avoid; repeatable")
    parser.add_argument(
        "--absent",
        action="append",
        default=[],
        metavar="NAME",
        help="repeatable: reward 'an image of no NAME' against 'an image of NAME'",
    )
    parser.add_argument("--text-weight", type=float, default=1.0, help="of the text's cosine; 0: none (default: 1)")
    parser.add_argument("--absent-weight", type=float, default=1.0, help="default: 1")
    parser.add_argument(
        "--model", default="demo", metavar="FILE", help="a latent CLIP that `latent-clip convert` wrote (default: demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on (default: 0)")
    parser.add_argument("--count", type=positive, default=4, help="pictures (default: 4)")
    parser.add_argument("--steps", type=positive, default=1, help="of the model, which few suffice (default: 1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="default: 1, none")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="with --guidance above 1")
    parser.add_argument("--through", type=positive, help="last steps that gradients pass through (default: all)")
    parser.add_argument("--iterations", type=positive, default=50, help="default: 50, as published")
    parser.add_argument("--rate", type=float, help="default: 5 at 4 x 64 x 64 latents, less on smaller ones")
    parser.add_argument("--clip", type=float, default=0.1, help="the longest gradient (default: 0.1)")
    parser.add_argument("--regularisation", type=float, default=0.01, help="keeps the noise Gaussian (default: 0.01)")
    parser.add_argument("--batch", type=positive, default=4, help="pictures at once (default: 4)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"default: ./{OUT}")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in DIR")
    add_model_options(parser, STUDENT)


def _optimise(args: argparse.Namespace) -> int:
    if args.text_weight == 0 and not args.absent:
        args.parser.error("--text-weight 0 leaves no reward: name something with --absent")
    out = ready_folder(args.out)
    if (out / REPORT).exists() and not args.overwrite:
        raise ConceptSteerError(f"{out / REPORT} exists already: choose another --out, or replace it with --overwrite.")
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    from ..demo.latent_clip import load_any
    from ..latent_clip import check_space, optimise_noise, space_of

    clip = load_any(args.model, device=str(denoiser.device))
    check_space(clip.space, space_of(denoiser.family), f"The model ({denoiser.family})")
    settings = _settings(args, denoiser)
    with bar("optimising") as progress, interruptible() as stop:

        def at(seen: Snapshot) -> None:
            note = f"reward {float(seen.best['value'].mean()):.3f}"
            progress.at(seen.done, seen.total, note)

        found = optimise_noise(
            denoiser,
            [args.prompt] * args.count,
            _rewards(args, clip),
            seeds=[args.seed + i for i in range(args.count)],
            settings=settings,
            steps=args.steps,
            guidance=args.guidance,
            negative=args.negative,
            batch=args.batch,
            through=args.through,
            progress=at,
            stop=stop.is_set,
        )
    print(found.summary())
    _write(args, denoiser, clip, found, settings)
    return 0


def _settings(args: argparse.Namespace, denoiser: Denoiser) -> Any:
    from ..latent_clip import Descent

    rate = args.rate if args.rate is not None else Descent.rate_for(denoiser.latent_shape)
    return Descent(args.iterations, rate, clip=args.clip, regularisation=args.regularisation)


def _rewards(args: argparse.Namespace, clip: LatentClipModel) -> list[Reward]:
    from ..latent_clip import absence_reward, text_reward

    rewards = []
    if args.text_weight:
        texts = [args.text or args.prompt] * args.count
        rewards.append(text_reward(clip, texts, against=args.against, weight=args.text_weight))
    if args.absent:
        rewards.append(absence_reward(clip, args.absent, weight=args.absent_weight))
    return rewards


def _write(
    args: argparse.Namespace, denoiser: Denoiser, clip: LatentClipModel, found: NoiseResult, settings: Any
) -> None:
    """Pictures before and after, the latents, a sheet, and the figures."""
    import torch

    from ..latent_clip import save_latents
    from ..pictures import before_after, to_images
    from ..sampling import sample
    from ..vector_file import write_atomic

    count = len(found)
    seeds = [args.seed + i for i in range(count)]
    with torch.inference_mode():
        drawing = {"steps": args.steps, "guidance": args.guidance, "negative": args.negative, "batch": args.batch}
        first = sample(denoiser, [args.prompt] * count, seeds=seeds, **drawing)
        before, after = (
            [
                image
                for part in latents.to(denoiser.device).split(args.batch)
                for image in to_images(denoiser.decode(part))
            ]
            for latents in (first, found.latents)
        )
    given = ("prompt", "text", "against", "absent", "text_weight", "absent_weight", "model", "checkpoint", "through")
    told = {name: getattr(args, name) for name in given} | drawing | {"descent": vars(settings)}
    captions, rows = [], []
    for i, seed in enumerate(seeds):
        values = {"before": float(found.before[i]), "after": float(found.values[i])}
        rows.append({"seed": seed, **values, "iteration": int(found.at[i])})
        captions.append(f"{values['before']:.3f} to {values['after']:.3f}")
        write_picture(before[i], args.out / f"{seed}-before.png", {**told, "seed": seed, "optimised": False})
        write_picture(after[i], args.out / f"{seed}-after.png", {**told, "optimised": True, **rows[-1]})
        about = {"prompt": args.prompt, "seed": str(seed)}
        save_latents(found.latents[i], args.out / f"{seed}-after.safetensors", clip.space, overwrite=True, **about)
    sheet = before_after(before, after, captions, args.prompt, "optimised noise")
    write_picture(sheet, args.out / SHEET, told)
    spread = {name: [round(v, 4) for v in value.tolist()] for name, value in found.spread().items()}
    report = {**told, "pictures": rows, "noise": spread, "stopped": found.stopped, "seconds": round(found.seconds, 2)}
    data = (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode()
    write_atomic(args.out / REPORT, data, overwrite=True)
    print(f"{count} pictures before and after are in {args.out}; side by side: {args.out / SHEET}")
