"""Prompts and pictures to h, thousands in one run: the encoder half alone, the same seeds for all, kept on disk.

h[p, s] is the mid block's output for prompt p from the noise of seed s; because the noises are the same for every
prompt, differences between prompts need few seeds (our construction after Zeng, Chen and Wong, 2410.21314).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, steer_rows
from ..errors import ConceptSteerError, SettingError
from ..learn.readings import readings
from ..sampling import noise
from ..steering import Steer
from .reading_files import file_of, load, ready, store

SPACES = ("mean", "map", "prediction")
PATHS = ("shared", "one step")
TEXTS = 32  # prompts that are encoded together: a fifth faster than the few of one batch of rows
LONGEST = 1000  # characters; text encoders read about 75 words and drop the rest without a word
VERSION = 1  # of the files in the cache
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class ReadSettings:
    """How h is read; the defaults are those that measured best (`concept-steer evaluate audit`).

    moments: shares of sampling at which h is read; at 0 x is pure noise, and nothing but the encoder half is used.
    path: where x of later moments comes from. "shared": the neutral prompt's own trajectories, the same x for all;
    "one step": each prompt's own one-step estimate of the picture, noised again (for models made for few steps).
    space: "mean" of h over its positions (C,), the whole "map" (C * H * W,), or the "prediction" that the decoder makes
    of h, at twice the cost. Several moments stand one after the other.
    """

    seeds: int = 16
    moments: tuple[float, ...] = (0.0,)
    path: str = "shared"
    space: str = "mean"
    neutral: str = "a person"
    steps: int = 8
    guidance: float = 5.0
    first_seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "moments", tuple(float(moment) for moment in self.moments))
        ascending = all(b > a for a, b in zip(self.moments, self.moments[1:], strict=False))
        if not self.moments or not ascending or not all(0 <= moment < 1 for moment in self.moments):
            raise SettingError(f"moments are ascending shares of sampling from 0 to below 1; found {self.moments}.")
        if self.seeds < 1 or self.steps < 1 or self.space not in SPACES or self.path not in PATHS:
            raise SettingError(
                f"{self.seeds} seeds, {self.steps} steps, space {self.space!r}, path {self.path!r}: expected at "
                f"least one seed and step, space {' or '.join(SPACES)}, path {' or '.join(PATHS)}."
            )


@dataclass
class Reader:
    """Reads prompts of one model with one `ReadSettings`; what was read before comes from `cache`, if there is one.

    cache: a folder; readings lie there by (checkpoint, settings, steers, prompt), so that a stopped run goes on where
    it was and several processes may fill it together. batch: rows at once. steers: acting while h is read; one list
    for all seeds, or one a seed. stop(): True ends reading with KeyboardInterrupt, after what is done was kept.
    """

    denoiser: Denoiser
    settings: ReadSettings = field(default_factory=ReadSettings)
    cache: Path | None = None
    batch: int = 32
    steers: Sequence[Sequence[Steer]] = ()
    stop: Callable[[], bool] | None = None
    _inputs: list[tuple[float, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.steers and len(self.steers) != self.settings.seeds:
            raise SettingError(f"{len(self.steers)} lists of steers for {self.settings.seeds} seeds: give one a seed.")
        if self.batch < 1:
            raise SettingError(f"A batch has at least one row, not {self.batch}.")

    def read(self, prompts: Sequence[str], progress: Advance | None = None) -> dict[str, Tensor]:
        """Prompt -> h (S, D), fp32 on the CPU, for every different prompt in order. progress(done, total) in prompts.

        Errors: SettingError (no prompt, one that is too long), ConceptSteerError (the model gives NaN).
        """
        return dict(self.stream(prompts, progress))

    def means(self, prompts: Sequence[str], progress: Advance | None = None) -> Tensor:
        """(N, D), the mean over seeds for each prompt in order: what many thousand prompts leave room for."""
        found = {prompt: h.mean(0) for prompt, h in self.stream(prompts, progress)}
        return torch.stack([found[prompt] for prompt in prompts])

    def stream(
        self, prompts: Sequence[str], progress: Advance | None = None, *, rank: int = 0, processes: int = 1
    ) -> Iterator[tuple[str, Tensor]]:
        """(prompt, h) one after the other, holding no more than one batch.

        rank, processes: with several, this one takes every `processes`-th block of prompts that are encoded together.
        Blocks depend on the list alone, so the numbers are the same however many processes share them.
        """
        asked = checked_prompts(prompts)
        size = max(1, self.batch // self.settings.seeds)
        block = size * max(1, TEXTS // size)
        blocks = [asked[first : first + block] for first in range(0, len(asked), block)][rank::processes]
        total, done = sum(map(len, blocks)), 0
        folder = self._folder()
        for texts in blocks:
            cond: Conditioning | None = None
            for first in range(0, len(texts), size):
                if self.stop is not None and self.stop():
                    raise KeyboardInterrupt
                chunk = texts[first : first + size]
                found = [load(file_of(folder, prompt), self.settings.seeds) for prompt in chunk]
                if any(h is None for h in found):
                    cond = cond or self._encoded(texts)
                    fresh = self._forward(cond[first : first + size])
                    for prompt, h in zip(chunk, fresh, strict=True):
                        store(file_of(folder, prompt), h)
                    found = list(fresh)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
                yield from ((prompt, h) for prompt, h in zip(chunk, found, strict=True) if h is not None)

    def pictures(self, pixels: Tensor, progress: Advance | None = None) -> Tensor:
        """h (N, S, D) of pictures (N, 3, H, W) in [-1, 1], in the prompts' own space.

        Each is encoded, noised with every seed's noise to the moments, and read with the neutral prompt: compare it
        with the neutral prompt's h of a shared path. Errors: SettingError at moment 0, where no picture is left.
        """
        if min(self.settings.moments) == 0:
            raise SettingError("At moment 0 there is nothing but noise: read pictures at later moments, such as 0.5.")
        model, s = self.denoiser, self.settings
        found = []
        with torch.inference_mode(False), torch.no_grad(), model.frozen():
            cond = model.encode_text([s.neutral]).plain()
            for number in range(len(pixels)):
                latent = model.encode_pictures(pixels[number : number + 1].to(model.device)).float()
                noises = torch.stack([noise(s.first_seed + i, latent.shape[1:]) for i in range(s.seeds)])
                times = self._times()
                noised = [model.schedule.add_noise(latent, noises.to(latent.device), t) for t in times]
                columns = [self._encode(x, t, cond.expand(s.seeds)) for t, x in zip(times, noised, strict=True)]
                found.append(_finite(torch.cat(columns, 1)))
                if progress is not None:
                    progress(number + 1, len(pixels))
        return torch.stack(found)

    @property
    def period(self) -> int:
        """After how many seeds the steers repeat; 1 when all seeds have the same, or none."""
        rows, seeds = [[_steer_text(steer) for steer in row] for row in self.steers], self.settings.seeds
        fits = (p for p in range(1, seeds + 1) if seeds % p == 0 and all(rows[i] == rows[i % p] for i in range(seeds)))
        return next(fits) if rows else 1

    @property
    def key(self) -> str:
        """sha256 of all that decides about a prompt's h but the prompt."""
        return hashlib.sha256(json.dumps(self._about(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def _checkpoint(self) -> str:
        return self.denoiser.checkpoint_hash

    @cached_property
    def _text(self) -> str:
        """Tells text encoders apart, to few digits, so that the number of threads makes no difference."""
        embeds = self.denoiser.encode_text(["a photo of a person"]).embeds.double()
        return f"{float(embeds.mean()):.3e} {float(embeds.std()):.3e}"

    def _about(self) -> dict[str, Any]:
        model, settings = self.denoiser, asdict(self.settings)
        if self.settings.moments == (0.0,):  # then the trajectories' settings decide nothing
            settings = {key: settings[key] for key in ("seeds", "moments", "space", "path", "first_seed")}
        return {
            "version": VERSION,
            "checkpoint": self._checkpoint,
            "text": self._text,
            "family": model.family,
            "dtype": str(model.dtype),
            "latents": list(model.latent_shape),
            "settings": settings,
            "steers": [[_steer_text(steer) for steer in row] for row in self.steers],
        }

    def _folder(self) -> Path | None:
        return None if self.cache is None else ready(Path(self.cache) / self.key[:20], self._about())

    def _times(self) -> list[float]:
        last = self.denoiser.schedule.train_timesteps - 1
        return [float(round((1 - moment) * last)) for moment in self.settings.moments]

    def _encoded(self, prompts: Sequence[str]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():
            return self.denoiser.encode_text(list(prompts)).plain()

    def _forward(self, cond: Conditioning) -> Tensor:
        """h (P, S, D) of some encoded prompts."""
        model, seeds = self.denoiser, self.settings.seeds
        with torch.inference_mode(False), torch.no_grad(), model.frozen():
            rows = torch.arange(len(cond), device=cond.embeds.device).repeat_interleave(seeds)
            parts = []
            for first in range(0, len(rows), self.batch):
                mine = rows[first : first + self.batch]
                numbers = torch.arange(first, first + len(mine)) % seeds
                parts.append(self._rows(cond[mine], numbers))
        return _finite(torch.cat(parts)).unflatten(0, (len(cond), seeds))

    def _rows(self, cond: Conditioning, numbers: Tensor) -> Tensor:
        """h (R, D) of rows with these seeds' inputs."""
        if self.settings.path == "one step":
            return self._one_step(cond, numbers)
        inputs = self._shared_inputs()
        return torch.cat([self._encode(x[numbers], t, cond, numbers) for t, x in inputs], 1)

    def _shared_inputs(self) -> list[tuple[float, Tensor]]:
        """(t, x (S, C, H, W)) of every moment, made once."""
        s, model = self.settings, self.denoiser
        if not self._inputs and s.moments == (0.0,):
            x = torch.stack([noise(s.first_seed + i, model.latent_shape) for i in range(s.seeds)])
            self._inputs = [(self._times()[0], x.to(model.device))]
        if not self._inputs:
            found: list[list[Tensor]] = [[] for _ in s.moments]
            seeds = [s.first_seed + i for i in range(s.seeds)]
            options = {"steps": s.steps, "guidance": s.guidance, "batch": self.batch}
            for read in readings(model, [s.neutral] * s.seeds, seeds, s.moments, **options):  # type: ignore[arg-type]
                found[read.moment].append(read.x)
            self._inputs = [(t, torch.cat(x)) for t, x in zip(self._times(), found, strict=True)]
        return self._inputs

    def _one_step(self, cond: Conditioning, numbers: Tensor) -> Tensor:
        """The picture that the model foresees at once from pure noise, noised again to each moment, and read."""
        model = self.denoiser
        last = float(model.schedule.train_timesteps - 1)
        start = torch.stack([noise(self.settings.first_seed + int(i), model.latent_shape) for i in numbers])
        start = start.to(model.device)
        state = model.to_h(start.to(model.dtype), last, cond)
        clean = model.schedule.to_x0(start, model.from_h(state), last)
        return torch.cat(
            [self._encode(model.schedule.add_noise(clean, start, t), t, cond, numbers) for t in self._times()], 1
        )

    def _encode(self, x: Tensor, t: float, cond: Conditioning, numbers: Tensor | None = None) -> Tensor:
        """(R, D) of rows at one moment, on the CPU."""
        state = self.denoiser.to_h(x.to(self.denoiser.dtype), t, cond)
        if self.steers and numbers is not None:
            state = state.with_h(steer_rows(state.h, [self.steers[int(i)] for i in numbers], t))
        if self.settings.space == "prediction":
            return self.denoiser.from_h(state).float().flatten(1).cpu()
        h = state.h.float()
        return (h.mean((2, 3)) if self.settings.space == "mean" else h.flatten(1)).cpu()


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """Every different prompt once, in order. Errors: SettingError for none at all or one that is too long."""
    asked = list(dict.fromkeys(prompts))
    if not asked:
        raise SettingError("There are no prompts to read: give at least one, such as 'a doctor'.")
    for prompt in asked:
        if not prompt.strip():
            raise SettingError("One of the prompts is empty: take it out of the list.")
        if len(prompt) > LONGEST:
            raise SettingError(
                f"A prompt has {len(prompt):,} characters ({prompt[:40]!r} ...); a text encoder would drop most of it. "
                f"Shorten it to {LONGEST:,} or fewer."
            )
    return asked


def _finite(h: Tensor) -> Tensor:
    if not bool(torch.isfinite(h).all()):
        raise ConceptSteerError("h holds values that are not finite: the model gives NaN. Try dtype float32.")
    return h


def _steer_text(steer: Steer) -> str:
    fields = {key: str(value) for key, value in vars(steer).items() if key != "vector" and key[0] != "_"}
    return json.dumps({**fields, "vector": steer.vector.fingerprint}, sort_keys=True)
