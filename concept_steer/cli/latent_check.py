"""The options by which pictures are looked at in the latent while they are drawn, and the drawing under them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .models import bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..denoiser import Denoiser
    from ..latent_clip import Guarded, LatentGuard
    from ..safety import SafetyPlan

ANSWERS = ("stop", "steer", "retry")  # of latent_clip.guarded, which would need torch to look up


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--latent-check", choices=ANSWERS, help="look at pictures while they are drawn; the answer to flagged ones"
    )
    group.add_argument(
        "--latent-check-at", type=float, default=0.5, metavar="SHARE", help="of the steps, before it (default: 0.5)"
    )
    group.add_argument(
        "--latent-clip", default="demo", metavar="FILE", help="what it looks with (default: the embedded model's own)"
    )


class LatentLook:
    """The check of one command. told: of its last drawing."""

    def __init__(self, args: argparse.Namespace, denoiser: Denoiser, plan: SafetyPlan) -> None:
        """Errors: FamilyMismatch for a model of another latent space, SettingError, SafetyError."""
        from ..latent_clip import LatentCheck
        from ..safety import SafetySettings
        from ..safety import plan as plan_of

        self.denoiser, self.check = denoiser, LatentCheck(args.latent_check, args.latent_check_at)
        self.guard = _guard(args.latent_clip)
        self.guard.check_model(denoiser.family)
        needs_own = self.check.answer == "steer" and not plan.acts
        self.harder = plan_of(SafetySettings(), denoiser.family, denoiser.channels) if needs_own else None
        self.told: Guarded | None = None

    def draw(
        self,
        plan: SafetyPlan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steers: Sequence[Sequence[Any]],
        label: str,
        sampling: Mapping[str, Any],
    ) -> list[Image]:
        """One picture per prompt and seed; placeholders for what is withheld. steers: of each picture, its own."""
        import torch

        from ..latent_clip import draw_guarded
        from ..pictures import to_images
        from ..safety.check import withheld

        model, batch = self.denoiser, sampling.get("batch", 4)
        with bar(label) as progress, torch.inference_mode():
            settings = {**sampling, "batch": batch, "progress": progress.at, "plan": plan, "harder": self.harder}
            done = draw_guarded(model, self.guard, prompts, seeds, check=self.check, steers=steers, **settings)
            parts = done.latents.to(model.dtype).split(batch)
            images = [image for part in parts for image in to_images(model.decode(part))]
        self.told = done
        return [withheld(image) if gone else image for image, gone in zip(images, done.withheld, strict=True)]


def _guard(name: str) -> LatentGuard:
    if name == "demo":
        from ..demo.latent_guard import load_guard

        return load_guard()
    from ..latent_clip import load_latent_clip, make_guard
    from ..safety.known import TEXTS
    from ..safety.words import phrases_of

    return make_guard(load_latent_clip(name), {category: phrases_of(text) for category, text in TEXTS.items()})
