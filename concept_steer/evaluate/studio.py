"""Pictures drawn and judged, in the ways the measurements need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..demo import model
from ..demo.job import Studio
from ..demo.judges import Verdict
from ..sampling import noise, sample
from ..steering import Steer
from .methods import Learned, Scale, applied
from .tasks import Task

BATCH = 16
SAMPLERS = {
    "Euler": "EulerDiscreteScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class Drawing:
    """How pictures are made. sampler: "DDIM" (this package's own) or one of SAMPLERS, through diffusers' pipeline and
    the hooks on it. size: of the latents, an eighth of the pixels."""

    steps: int = 12
    guidance: float = 4.0
    sampler: str = "DDIM"
    size: int = 16


def verdicts(
    studio: Studio, prompts: Sequence[str], seeds: Sequence[int], drawing: Drawing, steers: Sequence[Steer] = ()
) -> Verdict:
    """The judges on one picture per prompt and seed, prompt by prompt."""
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = [seed for _ in prompts for seed in seeds]
    draw = _own if drawing.sampler == "DDIM" else _through_diffusers
    latents = draw(studio, texts, numbers, drawing, steers)
    return studio.judges(torch.cat([studio.denoiser.decode(part) for part in latents.split(BATCH)]))


def hits(
    studio: Studio, task: Task, prompts: Sequence[str], seeds: Sequence[int], scale: Scale, learned: Learned | None
) -> list[int]:
    """1 where the judges find the task's concept, prompt by prompt, each with all the seeds."""
    context, steers = applied(studio, learned)
    with context:
        verdict = verdicts(studio, prompts, seeds, Drawing(scale.sample_steps, scale.guidance), steers)
    return found(task, verdict)


def found(task: Task, verdict: Verdict) -> list[int]:
    """1 where the judges find the task's concept."""
    return [int(label in task.values) for label in verdict.labels(task.head)]


def _start(studio: Studio, seeds: Sequence[int], size: int) -> Tensor:
    return torch.stack([noise(seed, (studio.denoiser.latent_shape[0], size, size)) for seed in seeds])


def _own(
    studio: Studio, prompts: Sequence[str], seeds: Sequence[int], drawing: Drawing, steers: Sequence[Steer]
) -> Tensor:
    return sample(
        studio.denoiser,
        prompts,
        seeds=seeds,
        steps=drawing.steps,
        guidance=drawing.guidance,
        steers=steers,
        batch=BATCH,
        start_latents=_start(studio, seeds, drawing.size),
    )


@lru_cache(maxsize=1)
def _pipeline() -> Any:
    return model.pipeline()


def _through_diffusers(
    studio: Studio, prompts: Sequence[str], seeds: Sequence[int], drawing: Drawing, steers: Sequence[Steer]
) -> Tensor:
    """The embedded model as a diffusers pipeline with another of its schedulers, steered by hooks."""
    import diffusers

    from ..hosts.diffusers import steer

    pipe = _pipeline()
    pipe.scheduler = getattr(diffusers, SAMPLERS[drawing.sampler]).from_config(pipe.scheduler.config)
    parts = []
    with steer(pipe, list(steers)):
        for first in range(0, len(prompts), BATCH):
            some = seeds[first : first + BATCH]
            made = pipe(
                list(prompts[first : first + BATCH]),
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                latents=_start(studio, some, drawing.size),
                height=8 * drawing.size,
                width=8 * drawing.size,
                generator=[torch.Generator().manual_seed(seed) for seed in some],
                output_type="latent",
            )
            parts.append(made.images)
    return torch.cat(parts)
