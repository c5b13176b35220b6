"""The embedded model's check in the latent: the words of its categories, and limits measured on harmless prompts.

Its text tower never read the word "no", and "an image of no X" tells it next to nothing (see
docs/results/latent_clip.md), so what shows a category is held against the harmless things of its world. The limits come
from harmless prompts that are not the evaluation's; the command that measures and writes them:

    python -m concept_steer.demo.latent_guard
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..latent_clip.guard import FINISHED, LatentGuard, Limits, calibrate, make_guard, read_limits, save_limits
from ..latent_clip.guarded import Estimates
from ..latent_clip.model import LatentClip
from ..sampling import sample
from . import latent_clip, safety_words, world
from .build_data import article

LIMITS_FILE = Path(__file__).parent / "weights" / "latent_guard.json"
CATEGORIES = {
    name: (*(part.strip() for part in texts[0].split(",")), *texts[1:]) for name, texts in safety_words.TEXTS.items()
}
HARMLESS = (
    *(article(name) for name in world.OBJECTS),
    *(article(name) for name in world.ROLE_NAMES),
    *(article(f"{name} face") for name in world.FACES),
)
RATE = 0.02  # of harmless pictures that may be flagged
STEPS, SEED, BATCH = 12, 60_000, 16


def load_guard(clip: LatentClip | None = None, limits: Limits | None = None, threshold: float = 0.5) -> LatentGuard:
    """The check as shipped. clip: default the embedded one. Errors: SafetyError when its limits are missing."""
    kept = limits or read_limits(LIMITS_FILE, tuple(CATEGORIES))
    return make_guard(clip or latent_clip.load(), CATEGORIES, limits=kept, threshold=threshold, absent=HARMLESS)


def published(clip: LatentClip) -> LatentGuard:
    """As the paper has it, for comparison: a text with it against the same with "no", and no limits."""
    return make_guard(clip, CATEGORIES)


@torch.no_grad()
def measure(count: int = 256, rate: float = RATE) -> LatentGuard:
    """Draw harmless prompts, leave out what the judges call inappropriate all the same, and calibrate on the rest."""
    from ..hosts.diffusers import DiffusersDenoiser
    from . import judges, model

    denoiser, judged = DiffusersDenoiser(model.pipeline(dtype=torch.bfloat16)), judges.Judges()
    prompts = safety_words.benign()[:count]
    parts: dict[float, list[torch.Tensor]] = {}
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        seen, seeds = Estimates(), range(SEED + first, SEED + first + len(some))
        guidance = (4.0, 5.0, 6.0)[first // BATCH % 3]
        latents = sample(denoiser, some, seeds=seeds, steps=STEPS, guidance=guidance, batch=BATCH, watch=seen)
        verdict = judged(denoiser.decode(latents.to(denoiser.dtype)).float())
        fine = torch.tensor([label == "none" for label in verdict.labels("inappropriate")])
        for t, clean in {FINISHED: latents, **seen.by_time()}.items():
            parts.setdefault(t, []).append(clean[fine])
    plain = make_guard(latent_clip.load(), CATEGORIES, absent=HARMLESS)
    return calibrate(plain, {t: torch.cat(some) for t, some in parts.items()}, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=LIMITS_FILE)
    parser.add_argument("--count", type=int, default=256, help="harmless prompts (default: 256)")
    parser.add_argument("--rate", type=float, default=RATE, help="of them that may be flagged (default: 0.02)")
    args = parser.parse_args()
    found = measure(args.count, args.rate)
    assert found.limits is not None
    print("written:", save_limits(found.limits, found.categories, args.out, overwrite=True))


if __name__ == "__main__":
    main()
