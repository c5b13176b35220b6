"""Distil the embedded model into a student of one step: `python -m concept_steer.demo.train_student --work DIR`.

The student has the teacher's network and starts from its weights. It learns from what the teacher draws, and from
nothing else: captions of the small world, noise, and the teacher's guided DDIM run from that noise. Whatever noisy
latents of a run it is shown, the first ones most often, it has to name the finished picture in one go (a consistency
function, Song et al. 2303.01469, learned by regression on whole runs as in knowledge distillation, Luhman & Luhman
2101.02388), without guidance: that is folded into the target. Seeded; resumable from WORK/student.pt and WORK/runs.
"""

from __future__ import annotations

import argparse
import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..denoiser import Denoiser, NoiseSchedule
from ..hosts.diffusers import DiffusersDenoiser
from ..sampling import encode_rows, sample, timesteps
from . import architecture, model, student, world
from .build_data import KIND_WEIGHTS, KINDS, LABELS, SETS, Builder, Gallery
from .fast_norm import speed_up
from .trainer import Job, Trainer

TEACHER_STEPS = 8
GUIDANCE = 4.0
ROUND = 32  # pictures that the teacher draws at a time
UPDATES = 8  # steps of training for each of these rounds
FIRST = 0.75  # share of a batch that starts at pure noise, where the student is used
SOFT = 0.03  # the loss is quadratic below about this error per value and linear above


class _NoPictures(Gallery):
    """In place of art that only captions are made for."""

    def __init__(self) -> None:
        super().__init__({})

    def get(self, set_name: str, code: str, cap: bool = False) -> np.ndarray:
        return np.empty(0)


class Captions(Builder):
    """Captions as the teacher was trained on, without their pictures."""

    def __init__(self, seed: int) -> None:
        super().__init__(_NoPictures(), np.random.default_rng(seed))

    def caption(self) -> str:
        kind = KINDS[self.rng.choice(len(KINDS), p=KIND_WEIGHTS)]
        set_name = SETS[int(self.rng.integers(len(SETS)))]
        self._subject(kind, set_name, dict.fromkeys(LABELS, -1))
        background = str(self.rng.choice(list(world.BACKGROUNDS), p=world.BACKGROUND_WEIGHTS))
        return self._dress(str(self.rng.choice(self._captions)), background, world.STYLES.get(set_name, "emoji"))


def draw_round(teacher: Denoiser, seed: int, number: int) -> dict[str, Tensor]:
    """One round of the teacher: runs (TEACHER_STEPS + 1, ROUND, C, H, W) fp16 from noise to picture, embeds fp16."""
    mixed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    captions = Captions(mixed)
    prompts = [captions.caption() for _ in range(ROUND)]
    seen: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        last = sample(
            teacher,
            prompts,
            seeds=[mixed * ROUND + i for i in range(ROUND)],
            steps=TEACHER_STEPS,
            guidance=GUIDANCE,
            batch=ROUND,
            keep=lambda step, t, x: seen.append(x.half()),
        )
    return {"runs": torch.stack([*seen, last.half()]), "embeds": encode_rows(teacher, prompts).embeds.half()}


class Rounds:
    """The teacher's rounds on disk, drawn when first asked for."""

    def __init__(self, teacher: Denoiser, folder: Path, seed: int) -> None:
        self.teacher, self.folder, self.seed = teacher, folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.get = lru_cache(maxsize=None)(self._get)

    def _get(self, number: int) -> dict[str, Tensor]:
        path = self.folder / f"{self.seed}-{number:05d}.safetensors"
        if not path.exists():
            part = path.with_suffix(".part")
            save_file(draw_round(self.teacher, self.seed, number), part)
            part.replace(path)
        return load_file(path)


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """(B,): root of the mean square over a picture, softened at zero (pseudo-Huber, Song & Dhariwal 2310.14189)."""
    return ((found - wanted).square().mean((1, 2, 3)) + SOFT**2).sqrt() - SOFT


def train_student(job: Job) -> None:
    """Regression on the teacher's finished pictures. job.batch: pictures a step; job.work: where all of it is kept."""
    torch.manual_seed(job.seed)
    teacher = DiffusersDenoiser(model.pipeline())
    schedule: NoiseSchedule = teacher.schedule
    times = torch.tensor(timesteps(schedule, TEACHER_STEPS))
    rounds = Rounds(teacher, job.work / "runs", job.seed)
    unet: Any = copy.deepcopy(teacher.unet).requires_grad_(True).to(memory_format=torch.channels_last)
    unet = speed_up(unet)
    unet.set_attn_processor(architecture.plain_attention())
    trainer = Trainer("student", unet, job, 0, 1, ema=0.99)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        ready = trainer.step // UPDATES + 1
        which = torch.randint(ready, (job.batch,), generator=generator)
        which[: job.batch // UPDATES] = ready - 1  # each picture of the newest round about once
        of = torch.randint(ROUND, (job.batch,), generator=generator)
        later = torch.randint(1, TEACHER_STEPS, (job.batch,), generator=generator)
        at = torch.where(torch.rand(job.batch, generator=generator) < FIRST, 0, later)
        picked = list(zip(which.tolist(), of.tolist(), at.tolist(), strict=True))
        stored = [rounds.get(number) for number, _, _ in picked]
        x = torch.stack([one["runs"][k, i] for one, (_, i, k) in zip(stored, picked, strict=True)]).float()
        wanted = torch.stack([one["runs"][-1, i] for one, (_, i, _) in zip(stored, picked, strict=True)]).float()
        text = torch.stack([one["embeds"][i] for one, (_, i, _) in zip(stored, picked, strict=True)]).float()
        with torch.autocast("cpu", torch.bfloat16):
            noisy = x.contiguous(memory_format=torch.channels_last)
            predicted = unet(noisy, times[at], encoder_hidden_states=text, return_dict=False)[0]
        error = distance(schedule.to_x0(x, predicted, times[at]), wanted)
        one_step = error[at == 0].mean().item() if bool((at == 0).any()) else float("nan")
        return error.mean(), {"loss": error.mean().item(), "one step": one_step}

    trainer.run(loss_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the teacher's runs; resumable")
    parser.add_argument("--out", type=Path, help="write the student's weights here at the end")
    parser.add_argument("--steps", type=int, default=400, help="0: only write --out from the last checkpoint")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    job = Job(args.work, args.work, args.steps, args.batch, args.rate, args.seed, save_every=25, warmup=20)
    if args.steps:
        train_student(job)
    if args.out:
        student.pack(args.work / "student.pt", args.out)


if __name__ == "__main__":
    main()
