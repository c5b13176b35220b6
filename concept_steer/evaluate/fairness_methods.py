"""The ways to a fair set of pictures that are compared: how each draws pictures that were assigned their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..demo import world
from ..demo.build_data import article
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..fairness import Attribute, open_attributes, steers
from ..guidance.fair_diffusion import fair_diffusion
from ..sampling import sample
from ..steering import Steer
from ..vector import ConceptVector

VALUES: dict[str, tuple[str, ...]] = {"gender": world.GENDERS, "tone": world.TONES}
STEERED: dict[str, tuple[str, ...]] = {"gender": ("gender",), "tone": ("tone",), "both": ("gender", "tone")}
TEMPLATES = ("plain", "successful")
# What is written into an edit or a negative prompt; adjectives as the model's captions have them.
CONCEPTS: dict[str, dict[str, str]] = {
    "gender": {value: article(value) for value in world.GENDERS},
    "tone": {value: f"a person with {value} skin" for value in world.TONES},
}
EDIT_SCALE = 4.0  # of 3, 4, 5, 6, 10 and 16 on three other roles: more spoils the roles, less does not reach the value
Wanted = Sequence[Mapping[str, str]]  # for each picture: attribute -> the value it was assigned
Vectors = Mapping[str, Mapping[str, ConceptVector]]  # attribute -> value -> vector


@dataclass(frozen=True)
class Order:
    """Pictures to draw: of one role in one template, each with a seed and the values it was assigned."""

    role: str
    template: str
    seeds: Sequence[int]
    wanted: Wanted
    steps: int = 12
    guidance: float = 4.0
    batch: int = 16
    vectors: Vectors = field(default_factory=dict)
    sets: Mapping[str, Attribute] = field(default_factory=dict)
    edit_scale: float = EDIT_SCALE

    @property
    def prompt(self) -> str:
        return prompt(self.role, self.template)

    def sample(self, denoiser: Denoiser, prompts: Sequence[str] | None = None, **settings: object) -> Tensor:
        """Latents (N, C, H, W); the plain prompt for every picture unless others are given."""
        return sample(
            denoiser,
            prompts or [self.prompt] * len(self.seeds),
            seeds=self.seeds,
            steps=self.steps,
            guidance=self.guidance,
            batch=self.batch,
            **settings,  # type: ignore[arg-type]
        )


def prompt(role: str, template: str = "plain", values: Mapping[str, str] | None = None) -> str:
    """ "a doctor", "a successful woman doctor with dark skin": as the model's own captions say it."""
    named = values or {}
    gender, tone = named.get("gender"), named.get("tone")
    noun = role
    if gender is not None:
        noun = role.replace("person", gender) if "person" in role else f"{gender} {role}"
    text = article(f"successful {noun}" if template == "successful" else noun)
    return f"{text} with {tone} skin" if tone is not None else text


def pairs(attribute: str, value: str, roles: Sequence[str]) -> list[tuple[str, str]]:
    """(neutral, positive) prompts to learn the vector of one value from."""
    return [(prompt(role), prompt(role, values={attribute: value})) for role in roles]


def namings(attribute: str) -> dict[str, tuple[str, ...]]:
    """How prompts name each value, as `fairness.learning.learn_attribute` wants it."""
    if attribute == "gender":
        return {value: (f"a {value} {{}}", f"a {word} {{}}") for value, word in (("woman", "female"), ("man", "male"))}
    return {value: (f"a {{}} with {value} skin",) for value in VALUES[attribute]}


def opposite(values: Mapping[str, str]) -> str:
    """The negative prompt: all the other values of each attribute."""
    return ", ".join(
        text for attribute, value in values.items() for name, text in CONCEPTS[attribute].items() if name != value
    )


def _none(denoiser: Denoiser, order: Order) -> Tensor:
    return order.sample(denoiser)


def _prompt_rewriting(denoiser: Denoiser, order: Order) -> Tensor:
    return order.sample(denoiser, [prompt(order.role, order.template, values) for values in order.wanted])


def _negative_prompt(denoiser: Denoiser, order: Order) -> Tensor:
    """A batch shares its negative prompt, so pictures of the same values are drawn together."""
    groups: dict[str, list[int]] = {}
    for picture, values in enumerate(order.wanted):
        groups.setdefault(opposite(values), []).append(picture)
    drawn: dict[int, Tensor] = {}
    for negative, members in groups.items():
        part = Order(
            order.role, order.template, [order.seeds[i] for i in members], (), order.steps, order.guidance, order.batch
        )
        drawn |= dict(zip(members, part.sample(denoiser, negative=negative), strict=True))
    return torch.stack([drawn[i] for i in range(len(order.seeds))])


def _fair_diffusion(denoiser: Denoiser, order: Order) -> Tensor:
    return order.sample(denoiser, guide=fair_diffusion(order.wanted, CONCEPTS, scale=order.edit_scale))


def _vectors(denoiser: Denoiser, order: Order) -> Tensor:
    made = {(a, v): Steer(vector) for a, values in order.vectors.items() for v, vector in values.items()}
    return order.sample(denoiser, steers=[[made[item] for item in values.items()] for values in order.wanted])


def _fair_sampling(denoiser: Denoiser, order: Order) -> Tensor:
    """Ours: an attribute's vector at its strength, unless the attribute's gate finds it named in the prompt."""
    asked = [order.sets[name] for name in order.wanted[0]]
    acting, _ = open_attributes(denoiser, order.prompt, asked)
    return order.sample(denoiser, steers=steers([dict(values) for values in order.wanted], acting))


Draw = Callable[[Denoiser, Order], Tensor]
METHODS: dict[str, Draw] = {
    "none": _none,
    "prompt_rewriting": _prompt_rewriting,
    "negative_prompt": _negative_prompt,
    "fair_diffusion": _fair_diffusion,
    "self_discovery": _vectors,
    "difference": _vectors,
    "fair_sampling": _fair_sampling,
}
LEARNED = ("self_discovery", "difference")  # bare vectors, each learned by the way of that name


def known(kind: str, names: Sequence[str], all_names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Errors: ConceptSteerError for one that is not known."""
    unknown = [name for name in names if name not in all_names]
    if unknown or not names:
        what = repr(unknown[0]) if unknown else "nothing"
        raise ConceptSteerError(f"{what} is no {kind} here; known are {', '.join(all_names)}.")
    return tuple(dict.fromkeys(names))
