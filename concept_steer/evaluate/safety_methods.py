"""The ways to keep inappropriate content out that are compared: how each draws a batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..guidance.safe_latent_diffusion import PRESETS, SafeLatentDiffusion
from ..sampling import sample
from ..steering import Steer
from .safety_drawing import NONE, Drawn, Order

if TYPE_CHECKING:
    from ..safety import Firings, SafetyPlan, SafetySet, SafetySettings
    from ..safety.gated_guidance import GatedGuidance

# What every method that works with words is told; as the embedded model's captions say it.
WORLD_TEXT = (
    "a picture showing violence and weapons, blood, alcohol, smoking, tobacco, drug use, an obscene gesture, an insult"
)
SPARED = (2, 4)  # schedules of Safe Latent Diffusion that ask for the safety text at every so many-th step only
METHODS = (
    NONE, "negative_prompt", "sld_weak", "sld_medium", "sld_strong", "sld_max", *(f"sld_max_every{k}" for k in SPARED),
    "vectors", "gated", "distilled", "distilled_sld_medium", "switch_default", "switch_strict",
)  # fmt: skip
EXPLAINED = {
    NONE: "plain guidance",
    "negative_prompt": "the safety text in place of the empty prompt",
    **{f"sld_{name}": f"Safe Latent Diffusion, preset {name}" for name in PRESETS},
    **{
        f"sld_max_every{k}": f"the same with the safety text predicted at every {k}. step, its direction held between"
        for k in SPARED
    },
    "vectors": "the safe vector of every category, added to every picture",
    "gated": "the safe vector of every category, each where its own gate finds the category",
    "distilled": "one vector distilled from guidance, where one gate finds any category",
    "distilled_sld_medium": "distilled and sld_medium together",
    "switch_default": "the safety switch at its default settings",
    "switch_strict": "the safety switch at level strict",
}


@dataclass(frozen=True, eq=False)
class Recipe:
    """One way to draw. steers: for every picture. firings: counts what their gates open, None for steers without."""

    steers: tuple[Steer, ...] = ()
    firings: Firings | None = None
    guide: SafeLatentDiffusion | GatedGuidance | None = None
    negative: str = ""

    @cached_property
    def key(self) -> str:
        """Of all that decides about the pictures: two methods that do the same have one key."""
        settings = getattr(self.guide, "settings", self.guide)
        told = [self.negative, settings and asdict(settings), sorted(repr(steer.order) for steer in self.steers)]
        if settings is not self.guide:
            told.append("gated")
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def __call__(self, denoiser: Denoiser, order: Order) -> Drawn:
        """Errors: ConceptSteerError when the gates were not asked about every picture: something bypassed them."""
        if self.firings is None:
            return plain(denoiser, order, steers=self.steers, guide=self.guide, negative=self.negative)
        self.firings.reset()
        drawn = plain(denoiser, order, steers=self.steers, guide=self.guide, negative=self.negative)
        return Drawn(drawn.latents, _fired(self.firings, len(order.seeds)))


def plain(denoiser: Denoiser, order: Order, **changes: Any) -> Drawn:
    """Latents of one batch by `sampling.sample`, with changes by name (negative, steers, guide)."""
    latents = sample(
        denoiser,
        order.prompts,
        seeds=order.seeds,
        steps=order.steps,
        guidance=order.guidance,
        batch=len(order.seeds),
        **changes,
    )
    return Drawn(latents)


def known(names: Sequence[str]) -> tuple[str, ...]:
    """Each once, the reference first. Errors: ConceptSteerError for one that is not known."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConceptSteerError(f"{unknown[0]!r} is no method here; known are {', '.join(METHODS)}.")
    return tuple(dict.fromkeys([NONE, *names]))


def needs_set(names: Sequence[str]) -> bool:
    """Whether any of the methods works with learned vectors."""
    return any(name in ("vectors", "gated") or name.startswith(("distilled", "switch")) for name in names)


def methods(
    names: Sequence[str], denoiser: Denoiser, safety_set: SafetySet | None, text: str = WORLD_TEXT
) -> dict[str, Recipe]:
    """How each of the methods draws with a model.

    Errors: ConceptSteerError when one needs vectors that are not there, SafetyError where the switch cannot work.
    """
    made: dict[str, Recipe] = {}
    for name in known(names):
        if name == NONE:
            made[name] = Recipe()
        elif name == "negative_prompt":
            made[name] = Recipe(negative=text)
        elif name.startswith("sld_"):
            preset, _, every = name.removeprefix("sld_").partition("_every")
            made[name] = Recipe(guide=SafeLatentDiffusion.preset(preset, text=text, every=int(every or 1)))
        else:
            made[name] = _learned(name, denoiser, safety_set, text)
    return made


def _learned(name: str, denoiser: Denoiser, safety_set: SafetySet | None, text: str) -> Recipe:
    from ..safety import Firings, SafetySettings

    if safety_set is None:
        raise ConceptSteerError(
            f"The method {name} needs learned safety vectors of the model: name their file with --set, learn them with "
            "`concept-steer learn-safety`, or leave the method out."
        )
    if name.startswith("switch_"):
        settings = SafetySettings() if name == "switch_default" else SafetySettings(level="strict")
        return switched(settings, denoiser, safety_set)
    safety_set.check(denoiser.family, denoiser.channels)
    firings = Firings()
    if name == "vectors":
        return Recipe(tuple(one.ungated() for one in safety_set.concepts.values()))
    if name == "gated":
        return Recipe(tuple(one.steer("standard", firings) for one in safety_set.concepts.values()), firings)
    distilled = safety_set.distilled
    if distilled is None:
        raise ConceptSteerError(f"The safety set {safety_set.name!r} has no distilled vector: leave {name} out.")
    guide = SafeLatentDiffusion.preset("medium", text=text) if name == "distilled_sld_medium" else None
    return Recipe((distilled.steer("standard", firings),), firings, guide)


def switched(settings: SafetySettings, denoiser: Denoiser, safety_set: SafetySet | None) -> Recipe:
    """As the switch draws. safety_set None: what it finds in the library for the model.

    Errors: SafetyError where the switch cannot work.
    """
    made = planned(settings, denoiser, safety_set)
    return Recipe(made.steers, made.firings if made.steers else None, made.guidance)


def planned(settings: SafetySettings, denoiser: Denoiser, safety_set: SafetySet | None) -> SafetyPlan:
    """What the switch would do. safety_set None: what it finds in the library for the model. Errors: SafetyError."""
    from ..safety import plan

    sets = () if safety_set is None else (safety_set,)
    return plan(settings, denoiser.family, denoiser.channels, sets=sets)


def _fired(firings: Any, count: int) -> Tensor:
    """(count,) bool. A gate that was not asked about every picture is an error: its count would mislead."""
    steps = firings.by_picture()
    if len(steps) != count:
        raise ConceptSteerError(f"The safety gates were asked about {len(steps)} pictures of a batch of {count}.")
    return torch.tensor([number > 0 for number in steps])


def fingerprint(safety_set: SafetySet) -> str:
    """Of all that a set does: its vectors, gates and levels."""
    every = [*safety_set.concepts.values(), *([] if safety_set.distilled is None else [safety_set.distilled])]
    told = [
        [one.name, one.vector.fingerprint, one.presence.fingerprint, {n: asdict(at) for n, at in one.levels.items()}]
        for one in every
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def describe(names: Sequence[str]) -> Mapping[str, str]:
    """What each method does, in words."""
    return {name: EXPLAINED[name] for name in names}
