"""Train the localiser: `python -m concept_steer.demo.train_localiser --packages DIR`.

DIR keeps the npm tarballs (fetched where missing). Art from the emoji sets gets watermarks, QR-like codes and lettering
painted on; the truth is where painting changed the picture. Two sets of emoji (`HELD_OUT_SETS`) and one watermark word
are never seen in training: what the shipped net does there is the report in its file, together with how it agrees with
the judges on pictures that the embedded model drew. A part of the pictures is seen through that model's VAE, as
generated pictures are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geom_erasing.regions import regions
from . import art, build_data, drawing
from .fast_norm import speed_up
from .judges import Judges, view
from .localiser import CONCEPTS, GRID, LOCALISER_FILE, SMALLEST, HeatNet, Localiser
from .train_judges import augment, moves

HELD_OUT_SETS = ("emojione", "fluent-flat")
HELD_OUT_WORD = len(drawing.WATERMARKS) - 1
MARKED = 0.3  # share of the training pictures that carry each concept
WEIGHTS = tuple(  # between what the model learns from and what the judges learn from: more things, fewer people
    (a + b) / 2 for a, b in zip(build_data.KIND_WEIGHTS, build_data.JUDGES_WEIGHTS, strict=True)
)
FINE = 64  # points a side of the stored masks


@dataclass
class Marked:
    """pictures (N, 3, 128, 128) uint8; masks (N, concepts, 64, 64) uint8, the share (of 255) covered.

    words (N,): of the watermark, -1 without one.
    """

    pictures: Tensor
    masks: Tensor
    words: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def present(self) -> Tensor:
        """(N, concepts) bool."""
        return (self.masks > 127).flatten(2).any(2)


def mark(canvas: np.ndarray, rng: np.random.Generator, wanted: np.ndarray, held_out: bool):
    """Paint the wanted (concepts,) bool one after the other; the picture, masks (concepts, 128, 128) bool and the word.

    A mark that a later one hides is no longer in the mask. held_out: whether the held-out word may be drawn.
    """
    masks = np.zeros((len(CONCEPTS), drawing.SIZE, drawing.SIZE), bool)
    word = -1
    for index in np.flatnonzero(wanted):
        before = canvas
        if CONCEPTS[index] == "watermark":
            canvas, word = drawing.watermark(before, rng)
            while word == HELD_OUT_WORD and not held_out:
                canvas, word = drawing.watermark(before, rng)
        else:
            canvas = (drawing.qr_code if CONCEPTS[index] == "qr" else drawing.lettering)(before, rng)
        rows, columns = np.nonzero((canvas != before).any(2))
        masks[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        masks[index, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return canvas, masks, word


def paint(packages: Path, sets: Sequence[str], count: int, seed: int, held_out: bool) -> Marked:
    """`count` pictures of the sets with marks, each concept on `MARKED` of them."""
    rng = np.random.default_rng(seed)
    builder = build_data.Builder(build_data.Gallery(art.load(packages, sets)), rng, sets, WEIGHTS)
    pictures: list[Tensor] = []
    masks: list[Tensor] = []
    words: list[int] = []
    while len(pictures) < count:
        try:
            canvas = builder.draw_unmarked()[0]
        except build_data.MissingArt:
            continue
        canvas, mask, word = mark(canvas, rng, rng.random(len(CONCEPTS)) < MARKED, held_out)
        pictures.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1))
        small = F.avg_pool2d(torch.from_numpy(mask)[None].float(), drawing.SIZE // FINE)[0]
        masks.append((small * 255).round().byte())
        words.append(word)
    return Marked(torch.stack(pictures), torch.stack(masks), torch.tensor(words))


@torch.no_grad()
def through_vae(pictures: Tensor) -> Tensor:
    """The pictures encoded and decoded by the embedded model's VAE, uint8 as they were."""
    from . import model

    vae: Any = model.load().vae
    parts = []
    for chunk in pictures.split(32):
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean).sample
        parts.append(((y.float().clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts)


def small(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, 128, 128) to the (N, 3, 64, 64) uint8 that the net looks at."""
    return torch.cat([((view(chunk / 127.5 - 1) + 1) * 127.5).round().byte() for chunk in pictures.split(256)])


def train(pictures: Tensor, masks: Tensor, steps: int, seed: int, batch: int = 64) -> HeatNet:
    """The net on pictures (N, 3, 64, 64) uint8 and masks (N, concepts, 64, 64) uint8; prints as it goes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net: HeatNet = speed_up(HeatNet()).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picked = torch.randint(len(pictures), (batch,), generator=generator)
        moved = moves(batch, generator, mirror=False)
        x = augment(pictures[picked], generator, False, moved).contiguous(memory_format=torch.channels_last)
        grid = F.affine_grid(moved, [batch, 1, FINE, FINE], align_corners=False)
        mask = F.grid_sample(masks[picked].float() / 255, grid, align_corners=False)
        wanted = F.avg_pool2d(mask, FINE // GRID)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        loss = F.binary_cross_entropy_with_logits(logits.float(), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"localiser {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    return net.eval()


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either else 0.0


def measure(localiser: Localiser, marked: Marked, threshold: float = 0.5) -> dict[str, dict[str, float]]:
    """Per concept: presence (accuracy, recall, false alarms) and IoU of the best box with the truth, 0 without."""
    heat = localiser(marked.pictures.float() / 127.5 - 1).numpy()
    out: dict[str, dict[str, float]] = {}
    for index, concept in enumerate(CONCEPTS):
        found = [regions(one[index], threshold, SMALLEST) for one in heat]
        truth = [regions(mask.numpy() / 255, 0.5) for mask in marked.masks[:, index]]
        said, real = np.array([bool(one) for one in found]), np.array([bool(one) for one in truth])
        best = [
            max((overlap(region.box, wanted.box) for region in mine), default=0.0)
            for mine, all_wanted in zip(found, truth, strict=True)
            for wanted in all_wanted
        ]
        out[concept] = {
            "n": len(real),
            "present": int(real.sum()),
            "accuracy": round(float((said == real).mean()), 4),
            "recall": round(float(said[real].mean()), 4),
            "false_alarms": round(float(said[~real].mean()), 4),
            "iou_mean": round(float(np.mean(best)), 4),
            "iou_at_least_half": round(float(np.mean(np.array(best) >= 0.5)), 4),
        }
        if concept == "watermark":
            hidden = (marked.words == HELD_OUT_WORD).numpy() & real
            out[concept] |= {
                "held_out_word_n": int(hidden.sum()),
                "held_out_word_recall": round(said[hidden].mean(), 4),
            }
    return out


def agreement(localiser: Localiser, count: int, seed: int) -> dict[str, dict[str, float]]:
    """On `count` pictures that the embedded model draws of roles and things: how often localiser and judges agree."""
    from . import world
    from .job import Studio

    studio = Studio()
    names = [*world.ROLE_NAMES, *world.OBJECTS]
    prompts = [build_data.article(names[i % len(names)]) for i in range(count)]
    pixels = studio.draw(prompts, range(seed, seed + count))
    verdict = Judges()(pixels)
    heat = localiser(pixels).numpy()
    out = {}
    for index, concept in enumerate(CONCEPTS):
        mine = np.array([bool(regions(one[index], 0.5, SMALLEST)) for one in heat])
        theirs = np.array([label == "yes" for label in verdict.labels(concept)])
        out[concept] = {
            "n": count,
            "judges_say": int(theirs.sum()),
            "localiser_says": int(mine.sum()),
            "both_say": int((mine & theirs).sum()),
            "agreement": round(float((mine == theirs).mean()), 4),
        }
    return out


def write(net: HeatNet, out: Path, report: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    state = {key: value.to(torch.float16).contiguous() for key, value in net.state_dict().items()}
    metadata = {
        "localiser.concepts": json.dumps(CONCEPTS),
        "localiser.report": json.dumps(report),
        "modelspec.title": "concept-steer localiser",
        "modelspec.license": "Apache-2.0",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    save_file(state, part, metadata)
    os.replace(part, out)
    return out


def _trained(args: argparse.Namespace) -> HeatNet:
    known = [name for name in (*art.PACKAGES, *art.EXTRA) if name not in HELD_OUT_SETS]
    marked = paint(args.packages, known, args.count, args.seed, held_out=False)
    blurred = small(through_vae(marked.pictures[: args.seen]))
    pictures = torch.cat([small(marked.pictures), blurred, blurred])  # as often as the judges' training sees them
    masks = torch.cat([marked.masks, marked.masks[: args.seen], marked.masks[: args.seen]])
    return train(pictures, masks, args.steps, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--packages", type=Path, required=True, help="where the npm tarballs of the emoji sets are kept"
    )
    parser.add_argument("--out", type=Path, default=LOCALISER_FILE)
    parser.add_argument("--count", type=int, default=6000, help="training pictures (default: 6000)")
    parser.add_argument("--seen", type=int, default=2000, help="of those, also seen through the VAE (default: 2000)")
    parser.add_argument("--tests", type=int, default=1000, help="held-out pictures (default: 1000)")
    parser.add_argument("--drawn", type=int, default=200, help="pictures the model draws for the judges (default: 200)")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="measure this one anew instead of training")
    args = parser.parse_args()
    began = time.perf_counter()
    tests = paint(args.packages, HELD_OUT_SETS, args.tests, args.seed + 1, held_out=True)
    blurred = Marked(through_vae(tests.pictures), tests.masks, tests.words)
    print(f"{len(tests)} pictures for the test after {time.perf_counter() - began:.0f} s", flush=True)
    if args.weights is None:
        report: dict[str, Any] = {"held_out_sets": HELD_OUT_SETS, "steps": args.steps, "seed": args.seed}
        net = _trained(args)
        print(f"trained after {time.perf_counter() - began:.0f} s", flush=True)
    else:
        stored = Localiser(args.weights)
        report, net = json.loads(stored.metadata["localiser.report"]), stored.net
    localiser = Localiser(write(net, args.out, report))
    report["held_out_art"] = measure(localiser, tests)
    report["held_out_art_through_vae"] = measure(localiser, blurred)
    print(json.dumps(report, indent=1), flush=True)
    report["against_the_judges"] = agreement(localiser, args.drawn, 50_000 + args.seed)
    print(json.dumps(report["against_the_judges"], indent=1), flush=True)
    write(net, args.out, report)
    print(f"written: {args.out}, {args.out.stat().st_size} bytes, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
