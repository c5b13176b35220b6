"""Prompts drawn with and without noise optimisation on the one-step student, judged by others than the reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import latent_clip, student, world
from ..demo.build_data import NO_FACE, article
from ..demo.judges import Judges
from ..demo.model import pipeline
from ..denoiser import Denoiser
from ..hosts.diffusers import DiffusersDenoiser
from ..latent_clip import (
    Descent,
    LatentClip,
    LatentClipModel,
    LatentSpace,
    Reward,
    gaussian,
    optimise_noise,
    rank,
    text_reward,
)
from ..sampling import noise, sample

FIRST_SEED = 70_000
STEPS, GUIDANCE = 20, 4.0  # of the teacher
ROLES = (
    "firefighter", "pilot", "cook", "judge", "astronaut", "farmer", "guard", "wizard", "doctor", "superhero",
    "student", "police officer", "mechanic", "singer", "vampire", "nurse",
)  # fmt: skip
Drawn = tuple[Tensor, Tensor | None, list[float], float]  # latents, noise, rewards, UNet rows of each picture


@dataclass(frozen=True)
class Wanted:
    """What a prompt names, in the judges' words."""

    role: str
    gender: str
    tone: str

    @property
    def prompt(self) -> str:
        return f"{article(self.gender)} {self.role} with {self.tone} skin"


def wanted(count: int) -> list[Wanted]:
    """Roles in turn with the less usual gender of each, and with every skin tone in turn."""
    found = []
    for i in range(count):
        role = world.ROLE[ROLES[i % len(ROLES)]]
        usual = "man" if role.men >= 0.5 else "woman"
        gender = usual if i // len(ROLES) % 2 else ("woman" if usual == "man" else "man")
        found.append(Wanted(role.name, gender, world.TONES[(2 * i + i // 5) % len(world.TONES)]))
    return found


assert not NO_FACE.intersection(ROLES)


class Bench:
    """The student, its teacher, the latent tower and the judges.

    pixel: a tower of the latent one's size that reads pictures, its "latents" being pixels in [-1, 1]. Without one an
    untrained one takes its place, which costs as much; then only its cost is a figure.
    """

    def __init__(self, path: Path = student.STUDENT_FILE, pixel: LatentClip | None = None) -> None:
        self.student, self.teacher = student.denoiser(path), DiffusersDenoiser(pipeline())
        self.clip, self.judges = latent_clip.load(), Judges()
        self.trained, self.pixel = pixel is not None, pixel or untrained_pixel_tower()
        self.rate = Descent.rate_for(self.student.latent_shape)

    def methods(self) -> dict[str, Callable[[str, Sequence[int]], Drawn]]:
        return {
            "none": self.plain,
            "latent": lambda prompt, seeds: self.optimised(prompt, seeds, self.by_latents),
            "best_of_50": self.picked,
            "teacher_20_steps": self.taught,
            "pixel": lambda prompt, seeds: self.optimised(prompt, seeds, self.by_pixels),
        }

    def plain(self, prompt: str, seeds: Sequence[int]) -> Drawn:
        latents = sample(self.student, [prompt] * len(seeds), seeds=seeds, steps=1, guidance=1)
        return latents, self._noise(seeds), self._values(latents, prompt), 1.0

    def taught(self, prompt: str, seeds: Sequence[int]) -> Drawn:
        latents = sample(self.teacher, [prompt] * len(seeds), seeds=seeds, steps=STEPS, guidance=GUIDANCE)
        return latents, self._noise(seeds), self._values(latents, prompt), 2.0 * STEPS

    def picked(self, prompt: str, seeds: Sequence[int]) -> Drawn:
        """As many draws as ReNO makes, and the one with the highest reward kept: no gradient at all."""
        draws = Descent().iterations
        of = [[seed * 1000 + i for i in range(draws)] for seed in seeds]
        best = [rank(self.student, self.clip, prompt, many, steps=1, guidance=1).best(1) for many in of]
        latents, chosen = torch.cat([one.latents for one in best]), [one.seeds[0] for one in best]
        return latents, self._noise(chosen), [one.values[0] for one in best], float(draws)

    def optimised(self, prompt: str, seeds: Sequence[int], reward: Callable[[list[str]], Reward]) -> Drawn:
        prompts = [prompt] * len(seeds)
        settings = Descent(rate=self.rate)
        found = optimise_noise(self.student, prompts, [reward(prompts)], seeds=seeds, settings=settings)
        return found.latents, found.noise, found.values.tolist(), found.unet_rows / len(seeds)

    def by_latents(self, prompts: list[str]) -> Reward:
        return text_reward(self.clip, prompts)

    def by_pixels(self, prompts: list[str]) -> Reward:
        return pixel_reward(self.pixel, prompts)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([noise(seed, self.student.latent_shape) for seed in seeds])

    def _values(self, latents: Tensor, prompt: str) -> list[float]:
        with torch.no_grad():
            return (self.clip.encode_latents(latents) @ self.clip.encode_text([prompt]).T)[:, 0].tolist()


def untrained_pixel_tower() -> LatentClipModel:
    """As many patches, layers and dimensions as the latent tower: patches of 16 pixels for 2 cells."""
    torch.manual_seed(0)
    shipped = latent_clip.load()
    config = replace(shipped.config, channels=3, patch=8 * shipped.config.patch, size=8 * shipped.config.size)
    made = LatentClipModel(config, LatentSpace("pixels", "pictures", 3, 1.0, ()), shipped.tokenizer)
    return made.eval().requires_grad_(False)


def pixel_reward(clip: LatentClip, prompts: Sequence[str]) -> Reward:
    """The same cosine by a tower that reads decoded pictures: its "latents" are pixels in [-1, 1]."""
    return Reward(
        "pixel text",
        lambda pixels, targets: (clip.encode_latents(pixels) * targets).sum(1),
        pixels=True,
        targets=clip.encode_text(prompts),
    )


def decoded(denoiser: Denoiser, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([denoiser.decode(part) for part in latents.split(8)])


def measure(bench: Bench, method: str, one: Wanted, seeds: Sequence[int]) -> dict[str, Any]:
    """One prompt with its seeds: what the judges see, seconds, the noise, and how much the pictures differ."""
    wall, busy = time.perf_counter(), time.process_time()
    latents, start, values, rows = bench.methods()[method](one.prompt, seeds)
    seconds = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - busy}
    pixels = decoded(bench.student, latents)
    verdict = bench.judges(pixels)
    seen = {name: verdict.labels(name) for name in ("role", "gender", "tone")}
    features = bench.judges.features(pixels)
    return {
        **{name: [int(label == getattr(one, name)) for label in labels] for name, labels in seen.items()},
        **{name: value / len(seeds) for name, value in seconds.items()},
        "reward": values,
        "unet_rows": rows,
        "noise": {name: value.tolist() for name, value in gaussian(start).items()} if start is not None else {},
        "latent_distance": [float((latents[a] - latents[b]).square().mean().sqrt()) for a, b in _pairs(len(seeds))],
        "judge_distance": [float((features[a] - features[b]).norm()) for a, b in _pairs(len(seeds))],
    }


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))
