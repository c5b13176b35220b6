"""Train the embedded model: `python -m concept_steer.demo.train --data DIR --work DIR [--stage STAGE]`.

Stages, each seeded and resumable from `WORK/<stage>.pt`: the VAE on pictures; the text and picture towers
contrastively on its latents (as CLIP, but small, and on latents); the UNet on latents with the text tower frozen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import model, tokenizer
from .distributed import launch
from .train_towers import embed_captions, load_captions, train_towers
from .train_unet import train_unet
from .train_vae import encode_all, join_latents, train_vae
from .trainer import Job, join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["vae", "latents", "towers", "text", "unet", "all"], default="all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--whole", type=int, default=200, help="VAE: last steps on whole pictures, not crops")
    parser.add_argument("--freeze-encoder", action="store_true", help="VAE: train the decoder only")
    parser.add_argument("--count", type=int, help="use only the first COUNT pictures")
    parser.add_argument(
        "--focus", type=float, default=0.0, help="UNet: share of single people with gender or tone named"
    )
    parser.add_argument("--marks", type=float, default=0.0, help="UNet: share of pictures with an unnamed mark")
    parser.add_argument("--layout", choices=["mid", "sd"], default="mid", help="UNet: sd is the SD-like twin")
    parser.add_argument("--skip-dropout", type=float, default=0.0, help="UNet: of the skips into the deepest levels")
    parser.add_argument("--out", type=Path, help="pack the parts in WORK into this file, and train nothing")
    parser.add_argument("--from-shipped", action="store_true", help="start anew from the shipped weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.out:
        model.pack(args.work, args.out, "Concept Steer demo model", {}, args.layout)
        return
    if args.from_shipped:
        model.unpack(args.work)

    def job(steps: int, batch: int, rate: float, **more: Any) -> Job:
        chosen = args.steps or steps, args.batch or batch, args.rate or rate
        return Job(args.data, args.work, *chosen, args.seed, **more)

    if args.stage in ("vae", "all"):
        launch(train_vae, args.processes, job(4000, 4, 1e-3, whole=args.whole, freeze_encoder=args.freeze_encoder))
    if args.stage in ("latents", "all"):
        launch(encode_all, args.processes, job(1, 1, 1.0, count=args.count))
        join_latents(args.data, args.work, args.processes)
    if args.stage in ("towers", "all"):
        captions = [text for texts in load_captions(args.data) for text in texts]
        tokenizer.write(args.work / "tokenizer", *tokenizer.train(captions))
        launch(train_towers, args.processes, job(1200, 128, 1e-3))
    if args.stage in ("text", "all"):
        launch(embed_captions, args.processes, job(1, 1, 1.0))
        join(args.work, "text", args.processes)
    if args.stage in ("unet", "all"):
        unet = {"layout": args.layout, "skip_dropout": args.skip_dropout}
        launch(train_unet, args.processes, job(6000, 32, 1e-3, focus=args.focus, marks=args.marks, **unet))


if __name__ == "__main__":
    main()
