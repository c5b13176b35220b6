"""Geom-Erasing, measured: how often a mark that no prompt names is painted, by every way to keep it out.

One set of captions and seeds for all ways. ICR (implicit concept ratio, the paper's): the share of the pictures in
which a mark is found, by the judges; the embedded localiser, which training uses, is counted beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import pictures
from ..demo.judges import Judges
from ..denoiser import Denoiser
from ..geom_erasing import ErasingSettings, LocationTokens, knowing, learn_erasing, lora
from ..geom_erasing.detectors import detector_of
from ..geom_erasing.settings import Examples
from ..guidance.safe_latent_diffusion import SafeLatentDiffusion
from ..learn import learn_pictures
from ..sampling import sample
from ..steering import Steer
from ..vector import ConceptVector
from . import erasing_data
from .erasing_data import CONCEPTS, SPOKEN, Build, examples, found_boxes, spoiled
from .fairness_drawing import Block
from .i2p_prompts import PromptRow, digest
from .parts import Parts
from .safety_drawing import NONE, Draw, Drawn, Job, Order, Say, draw_all

TEXT = ", ".join(SPOKEN[concept] for concept in CONCEPTS)
LEARNED = "erasing-learned"  # folder of what was trained
MARK = "mark"  # what all of them are called where they are erased together
SHARE = 0.3  # of the pictures that are learned from carry a mark
WAYS = {
    NONE: "plain guidance, empty negative prompt",
    "named": f"the words in the prompt: '..., {TEXT}'",
    "negative_prompt": f"the words as negative prompt: '{TEXT}'",
    "sld_strong": f"Safe Latent Diffusion, strong, told '{TEXT}'",
    "geom_tokens": "Geom-Erasing, model removal: location tokens alone, in the negative prompt",
    "geom_lora": "Geom-Erasing, data removal: tokens and a LoRA, the tokens in the negative prompt",
    "plain_lora": "fine-tuning on the same pictures without any of this; no words",
    "masked_lora": "ours: a LoRA that learns from everything but the covered cells; no words",
    "h_space": "a vector in h-space for each mark, learned from pictures with and without it, at -1",
    "gated": "the same vectors, only where h leans towards them",
}


@dataclass(frozen=True)
class Effort:
    """steps: of training, of tokens alone and with a LoRA. learned: pictures that are learned from."""

    tokens: int = 300
    lora: int = 1000
    learned: int = 1000
    rank: int = 16
    vector_pictures: int = 48
    vector_steps: int = 40


@dataclass(frozen=True)
class Measure:
    """build: of training pictures. count: pictures a way. guidance: low, since strong guidance paints fewer marks."""

    out: Path
    denoiser: Denoiser  # what pictures are drawn with
    teacher: Denoiser  # the same model in float32, for training
    build: Build
    ways: tuple[str, ...] = tuple(WAYS)
    count: int = 1024
    steps: int = 12
    guidance: float = 2.0
    batch: int = 32
    effort: Effort = field(default_factory=Effort)
    marks: tuple[str, ...] = CONCEPTS  # that are painted on what is learned from, and erased together

    @property
    def concept(self) -> str:
        """What they are called."""
        return SPOKEN[self.marks[0]] if len(self.marks) == 1 else MARK

    @property
    def only(self) -> dict[str, list[str]]:
        """For the record of what was kept, where it is not all of them."""
        return {} if self.marks == CONCEPTS else {"marks": list(self.marks)}

    @cached_property
    def rows(self) -> tuple[PromptRow, ...]:
        """Captions of clean pictures that no training here sees, and a seed each."""
        _, captions = self.build.take(0, self.count)
        return tuple(PromptRow(i, text, (), 40_000 + i, self.guidance) for i, text in enumerate(captions))

    @property
    def job(self) -> Job:
        return Job(self.out / "erasing", self.rows, 1, self.steps, self.batch)

    @cached_property
    def learned(self) -> Examples:
        """A share of them spoiled, as the localiser sees them."""
        given, captions, _ = spoiled(self.build, self.count, self.effort.learned, self.marks, SHARE)
        return examples(self.teacher, given, captions, found_boxes(given, self.marks))


class MarksEye:
    """The judges' and the localiser's yes or no for each mark, and the judges' features."""

    name = "demo marks"

    def __init__(self) -> None:
        self.judges = Judges()
        self.detectors = {concept: detector_of(f"demo-{concept}") for concept in CONCEPTS}

    def __call__(self, pixels: Tensor) -> Block:
        verdict, images = self.judges(pixels), pictures.to_images(pixels)
        own = {concept: verdict.probabilities[concept][:, 1].numpy() for concept in CONCEPTS}
        score = np.max(np.stack(list(own.values())), 0)
        found: Block = {"flagged": score >= 0.5, "score": score.astype(np.float32)}
        for concept in CONCEPTS:
            found[concept] = own[concept] >= 0.5
            found[f"located_{concept}"] = np.array([v.flagged for v in self.detectors[concept].scores(images)])
        role = verdict.probabilities["role"].argmax(1).numpy().astype(np.int16)
        return {**found, "role": role, "features": self.judges.features(pixels).numpy().astype(np.float16)}


@dataclass(frozen=True)
class Way:
    """How a batch is drawn. inside: entered around it, such as a LoRA."""

    negative: str = ""
    suffix: str = ""
    embeddings: tuple[LocationTokens, ...] = ()
    steers: tuple[Steer, ...] = ()
    guide: SafeLatentDiffusion | None = None
    inside: Callable[[Denoiser], AbstractContextManager[Any]] = lambda denoiser: nullcontext()

    def __call__(self, denoiser: Denoiser, order: Order) -> Drawn:
        prompts = [prompt + self.suffix for prompt in order.prompts]
        with self.inside(denoiser):
            latents = sample(
                knowing(denoiser, self.embeddings), prompts, seeds=order.seeds, steps=order.steps,
                guidance=order.guidance, negative=self.negative, steers=self.steers, guide=self.guide,
                batch=len(prompts),
            )  # fmt: skip
        return Drawn(latents)


def trained(
    measure: Measure, name: str, settings: ErasingSettings, say: Say, learned: Examples | None = None
) -> tuple[LocationTokens | None, dict[str, Tensor] | None]:
    """Tokens and LoRA, learned once and kept in the output folder. Errors: ConceptSteerError for other settings."""
    folder = measure.out / LEARNED
    tokens, weights = folder / f"{name}.safetensors", folder / f"{name}-lora.safetensors"

    def make() -> dict[str, str]:
        result = learn_erasing(
            measure.teacher, learned or measure.learned, measure.concept, name=f"no-{name}", settings=settings,
            autocast=torch.bfloat16, checkpoint=folder / f"{name}.checkpoint",
            progress=lambda step, steps, loss, now: say(f"{name}: {step} of {steps}") if step % 100 == 0 else None,
        )  # fmt: skip
        if result.tokens is not None:
            result.tokens.save(tokens, overwrite=True)
        if result.lora is not None:
            save_file(result.lora, weights)
        return {"words": result.summary()}

    folder.mkdir(parents=True, exist_ok=True)
    told = {"checkpoint": measure.teacher.checkpoint_hash, **vars(settings), **measure.only}
    Parts(folder, told).get(name, make)
    return (
        LocationTokens.load(tokens) if tokens.is_file() else None,
        load_file(weights) if weights.is_file() else None,
    )


def with_lora(state: Mapping[str, Tensor], rank: int) -> Callable[[Denoiser], AbstractContextManager[Any]]:
    return lambda denoiser: lora.adapted(denoiser, rank, 0, state)


def vectors(measure: Measure, say: Say) -> list[ConceptVector]:
    """One for each mark, learned by contrast from pictures with and without it."""
    found, e = [], measure.effort
    for place, concept in enumerate(measure.marks):
        path = measure.out / LEARNED / f"h-{concept}.safetensors"
        if not path.is_file():
            say(f"vector of {concept}")
            first = measure.count + e.learned + place * 2 * e.vector_pictures
            bad, _, _ = spoiled(measure.build, first, e.vector_pictures, (concept,), 1.0)
            good, _ = measure.build.take(first + e.vector_pictures, e.vector_pictures)
            result = learn_pictures(
                measure.teacher,
                erasing_data.pixels(bad),
                "a picture",
                without=erasing_data.pixels(good),
                steps=e.vector_steps,
                title=concept,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            result.vector.save(path, overwrite=True)
        found.append(ConceptVector.load(path))
    return found


def draws(measure: Measure, say: Say) -> dict[str, Draw]:
    """The ways, ready to draw; what they need is learned first."""
    e, made = measure.effort, dict[str, Draw]()
    for name in measure.ways:
        if name in ("geom_tokens", "geom_lora"):
            rank = e.rank if name == "geom_lora" else 0
            steps = e.lora if rank else e.tokens
            tokens, state = trained(measure, name, ErasingSettings(steps=steps, rank=rank), say)
            assert tokens is not None
            inside = {"inside": with_lora(state, rank)} if state else {}
            made[name] = Way(negative=tokens.name, embeddings=(tokens,), **inside)  # type: ignore[arg-type]
        elif name in ("plain_lora", "masked_lora"):
            kind: Any = name.removesuffix("_lora")
            _, state = trained(measure, name, ErasingSettings(steps=e.lora, rank=e.rank, way=kind), say)
            made[name] = Way(inside=with_lora(state or {}, e.rank))
        elif name in ("h_space", "gated"):
            operator: Any = "add" if name == "h_space" else "gated"
            made[name] = Way(steers=tuple(Steer(v, -1.0, operator=operator) for v in vectors(measure, say)))
        else:
            made[name] = {
                NONE: Way(),
                "named": Way(suffix=f", {TEXT}"),
                "negative_prompt": Way(negative=TEXT),
                "sld_strong": Way(guide=SafeLatentDiffusion.preset("strong", text=TEXT)),
            }[name]
    return made


def prepare(measure: Measure, say: Say = print) -> None:
    """Learn everything that drawing needs."""
    draws(measure, say)


def draw(measure: Measure, shard: tuple[int, int] = (0, 1), say: Say = print) -> int:
    told = {
        "checkpoint": measure.denoiser.checkpoint_hash,
        "prompts": digest(measure.rows),
        "steps": measure.steps,
        "batch": measure.batch,
        **vars(measure.effort),
        **measure.only,
    }
    Parts(measure.out / "erasing", told).get("settings", dict)
    return draw_all(measure.job, measure.denoiser, MarksEye(), draws(measure, say), shard=shard, say=say)


@torch.no_grad()
def reference(measure: Measure) -> Tensor:
    """The judges' features (n, 480) of the clean pictures whose captions are drawn, seen through the model's VAE."""
    path = measure.out / LEARNED / "reference.safetensors"
    if not path.is_file():
        given, _ = measure.build.take(0, measure.count)
        judges, parts = Judges(), []
        for first in range(0, len(given), 32):
            some = erasing_data.pixels(given[first : first + 32]).to(measure.denoiser.dtype)
            back = measure.denoiser.decode(measure.denoiser.encode_pictures(some)).float()
            parts.append(judges.features(back))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": torch.cat(parts).contiguous()}, path)
    return load_file(path)["features"]


def chosen_ways(names: Sequence[str]) -> tuple[str, ...]:
    from ..errors import ConceptSteerError

    if unknown := [name for name in names if name not in WAYS]:
        raise ConceptSteerError(f"There is no way {unknown[0]!r}; there are {', '.join(WAYS)}.")
    return tuple(dict.fromkeys([NONE, *names]))
