"""The main job, end to end: learn "woman" on a few roles, use it on roles that learning never saw, measure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pictures
from ..hosts.diffusers import DiffusersDenoiser
from ..learn.difference import learn_difference
from ..learn.result import LearnResult
from ..learn.score import learn_score
from ..sampling import sample
from ..steering import Steer
from ..vector import ConceptVector
from . import judges, model
from .build_data import article

LEARN_ROLES = ("doctor", "detective", "scientist", "villain")
TEST_ROLES = (
    "firefighter", "pilot", "police officer", "construction worker", "mechanic", "programmer", "astronaut", "guard",
)  # fmt: skip
STRIP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
KEPT = {"skin_tone": "tone", "role": "role", "expression": "expression"}
GUIDANCE, STEPS = 4.0, 20
Say = Callable[[str], None]
Advance = Callable[[int, int], None]  # (done, total)
Watch = Callable[[str], AbstractContextManager[Advance]]  # label -> what is told of progress


def unwatched(label: str) -> AbstractContextManager[Advance]:
    return nullcontext(lambda done, total: None)


def pairs(roles: Sequence[str] = LEARN_ROLES, attribute: str = "woman") -> list[tuple[str, str]]:
    return [(article(role), f"{article(attribute)} {role}") for role in roles]


class Studio:
    """The embedded model with its judges: prompts and seeds in, pictures and verdicts out.

    checkpoint: "demo", or the file of another model of the same world.
    """

    def __init__(self, checkpoint: str = "demo") -> None:
        self.name = Path(checkpoint).name
        self.denoiser = DiffusersDenoiser(model.pipeline(path=model.file_of(checkpoint)))
        self.judges = judges.Judges()

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steers: Sequence[Any] = (),
        guidance: float = GUIDANCE,
        steps: int = STEPS,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Pixels (N, 3, 128, 128) in [-1, 1]."""
        latents = sample(
            self.denoiser, prompts, seeds=seeds, steps=steps, guidance=guidance, steers=steers, progress=progress
        )
        return torch.cat([self.denoiser.decode(part) for part in latents.split(16)])


def _distance(before: Tensor, after: Tensor) -> float:
    """Mean absolute difference of the pixels, 0..1."""
    return float((before.clamp(-1, 1) - after.clamp(-1, 1)).abs().mean() / 2)


def run(out: Path, *, count: int = 64, seed: int = 0, say: Say = print, watch: Watch = unwatched) -> dict[str, Any]:
    """Do the whole job and write strip.png, sheet.png, vectors, report.json and report.txt into `out`; the report.

    say: told each step in words. watch: gives each long step something to report its progress to.
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    say("Loading the embedded model and its judges ...")
    studio = Studio()
    say(f"Learning 'woman' on {len(LEARN_ROLES)} roles: {', '.join(LEARN_ROLES)}")
    results: dict[str, LearnResult] = {}
    results["difference"] = learn_difference(studio.denoiser, pairs(), seed=seed, title="woman")
    say("  " + results["difference"].summary().replace("\n", "\n  "))
    with watch("trajectories") as drawn, watch("learning") as learned:
        results["score"] = learn_score(
            studio.denoiser,
            pairs(),
            seed=seed,
            title="woman",
            caching=drawn,
            progress=lambda step, steps, loss, vector: learned(step, steps),
        )
    say("  " + results["score"].summary().replace("\n", "\n  "))

    prompts = [article(TEST_ROLES[i % len(TEST_ROLES)]) for i in range(count)]
    seeds = [1000 + seed * count + i for i in range(count)]
    say(f"Drawing {count} pictures of {len(TEST_ROLES)} roles it was not learned on, before and after ...")
    with watch("before") as at:
        before = studio.draw(prompts, seeds, progress=at)
    after = {}
    for name, result in results.items():
        with watch(f"after, {name}") as at:
            after[name] = studio.draw(prompts, seeds, [Steer(result.vector)], progress=at)
    verdict = studio.judges(before)
    verdicts = {name: studio.judges(pixels) for name, pixels in after.items()}
    measured = {
        name: {
            "share_after": judged.share("gender", "woman"),
            "kept": {label: verdict.agreement(judged, head) for label, head in KEPT.items()},
            "skin_tone_within_one": _tones_near(verdict, judged),
            "pixel_distance": _distance(before, after[name]),
        }
        for name, judged in verdicts.items()
    }
    best = measured["score"]
    report: dict[str, Any] = {
        "concept": "woman",
        "learned_on": list(LEARN_ROLES),
        "tested_on": list(TEST_ROLES),
        "pictures": count,
        "share_before": verdict.share("gender", "woman"),
        "share_after": best["share_after"],
        "kept": best["kept"],
        "skin_tone_within_one": best["skin_tone_within_one"],
        "pixel_distance": best["pixel_distance"],
        "role_as_prompted": {
            "before": _as_prompted(verdict, prompts),
            "after": _as_prompted(verdicts["score"], prompts),
        },
        "methods": measured,
        "learn": {
            name: {
                "unet_rows": result.unet_rows,
                "backward_rows": result.backward_rows,
                "seconds": round(result.seconds, 2),
                "explained": result.explained,
                "separation": result.separation,
            }
            for name, result in results.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        vector = result.vector.with_info(effect=json.dumps(measured[name]))
        vector.save(out / f"woman-{name}.safetensors", overwrite=True)
    say("Drawing the strip: strength -1 to 1.5 ...")
    pictures.save(strip(studio, results["score"].vector, seed), out / "strip.png")
    pictures.save(_sheet(prompts, before, after["score"], verdict, verdicts["score"]), out / "sheet.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = describe(report)
    (out / "report.txt").write_text(text, encoding="utf-8")
    say(text)
    return report


def _tones_near(before: judges.Verdict, after: judges.Verdict) -> float:
    """Share of pictures whose judged skin tone is the same or the next one: neighbours look alike through the VAE."""
    moved = before.probabilities["tone"].argmax(1) - after.probabilities["tone"].argmax(1)
    return float((moved.abs() <= 1).float().mean())


def _as_prompted(verdict: judges.Verdict, prompts: Sequence[str]) -> float:
    labels = verdict.labels("role")
    return sum(article(label) == prompt for label, prompt in zip(labels, prompts, strict=True)) / len(prompts)


def strip(studio: Studio, vector: ConceptVector, seed: int = 0, roles: Sequence[str] = TEST_ROLES[:4]):
    """Rows: a role and a seed each; columns: strength from -1 to 1.5."""
    prompts = [article(role) for role in roles for _ in STRIP]
    seeds = [2000 + seed + row for row in range(len(roles)) for _ in STRIP]
    steers = [[Steer(vector, strength)] for _ in roles for strength in STRIP]
    images = pictures.to_images(studio.draw(prompts, seeds, steers))
    wide = len(STRIP)
    return pictures.grid(
        [images[i : i + wide] for i in range(0, len(images), wide)],
        columns=[f"strength {strength:g}" for strength in STRIP],
        rows=[article(role) for role in roles],
        title="One vector, learned on other roles; same prompt and seed along each row",
    )


def _sheet(prompts, before, after, verdict, judged, columns: int = 8):
    """Before and after in turn, with prompt and judged gender under each picture."""
    olds, news = pictures.to_images(before), pictures.to_images(after)
    rows, captions = [], []
    for first in range(0, min(len(prompts), 4 * columns), columns):
        part = slice(first, first + columns)
        for images, said in ((olds, verdict), (news, judged)):
            rows.append(images[part])
            captions.append([f"{p}: {g}" for p, g in zip(prompts[part], said.labels("gender")[part], strict=True)])
    names = ["before", "woman, 1.0"] * (len(rows) // 2)
    return pictures.grid(rows, captions=captions, rows=names, title="Before and after (judged gender under each)")


def describe(report: dict[str, Any]) -> str:
    """The report in plain words."""
    kept = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in report["kept"].items())
    lines = [
        f"'woman' on roles it was not learned on, N = {report['pictures']}: "
        f"{report['share_before']:.0%} women before, {report['share_after']:.0%} after (judged).",
        f"Kept as before (judged): {kept}; skin tone within one step {report['skin_tone_within_one']:.0%}. "
        f"Mean pixel distance {report['pixel_distance']:.3f} of 1.",
    ]
    for name, cost in report["learn"].items():
        share = report["methods"][name]["share_after"]
        lines.append(
            f"{name}: {share:.0%} women; learned with {cost['unet_rows']:.0f} UNet rows forward and "
            f"{cost['backward_rows']} backward in {cost['seconds']:.1f} s."
        )
    lines.append(f"All in {report['seconds']:.0f} s." if "seconds" in report else "")
    return "\n".join(lines)
