"""The training of Geom-Erasing, step by step: its loss, what ends it early, and what going on later needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser
from ..errors import LearnError
from ..learn.checkpoint import Checkpoint
from ..learn.memory import ADVICE, out_of_memory
from .embedding import LocationTokens
from .settings import ErasingSettings, Examples

POINTS = 16  # timesteps at which the usual error is measured
TIMES = (500, 700, 800, 900, 950)  # where held-out pictures are looked at: early, where places are decided
SPREAD = 1.0  # of the location tokens around the thing's words at the start, in units of a token's values
Progress = Callable[[int, int, float, Callable[[], LocationTokens]], None]


class TextReader(Protocol):
    """A model's text encoders, as `text_reader()` of a Denoiser gives them."""

    @property
    def encoders(self) -> tuple[str, ...]: ...
    def vectors_of(self, text: str) -> dict[str, Tensor]:
        """Token vectors of a text, (n, width) fp32 by encoder."""
        ...

    def encode(self, prompts: Sequence[str], vocabulary: Mapping[str, Mapping[str, Tensor]]) -> Conditioning:
        """Prompts in which the vocabulary's words stand for its vectors; gradients pass to them."""
        ...


class Tokens:
    """The location tokens while they are learned: where they start, and how far each has moved."""

    def __init__(self, reader: TextReader, concept: str, name: str, s: ErasingSettings) -> None:
        self.reader, self.concept, self.name, self.bins = reader, concept, name, s.bins
        self.words = {key: rows.clone() for key, rows in reader.vectors_of(concept).items()}
        generator = torch.Generator().manual_seed(s.seed + 1)
        self.first, self.unit, self.moves = {}, {}, {}
        for key, rows in self.words.items():
            self.unit[key] = rows.square().mean().sqrt()
            start = rows.mean(0, keepdim=True).expand(s.bins**2, -1)
            self.first[key] = start + SPREAD * self.unit[key] * torch.randn(start.shape, generator=generator)
            self.moves[key] = torch.zeros_like(self.first[key]).requires_grad_(True)

    def at(self, **info: str) -> LocationTokens:
        """As they are now, without gradients."""
        places = {key: value.detach().clone() for key, value in self._places().items()}
        return LocationTokens(self.name, self.concept, self.bins, self.words, places, info)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """With gradients to the tokens."""
        now = LocationTokens(self.name, self.concept, self.bins, self.words, self._places())
        return self.reader.encode(prompts, now.vocabulary())

    def _places(self) -> dict[str, Tensor]:
        return {key: self.first[key] + self.unit[key] * move for key, move in self.moves.items()}


@dataclass(frozen=True)
class Training:
    """One run. train: numbers of the pictures learned from. weights: the LoRA's. rank: of this process among several.

    inside: what predictions are computed in, such as autocast. average: of gradients over all processes.
    """

    denoiser: Denoiser
    tokens: Tokens
    examples: Examples
    settings: ErasingSettings
    train: Sequence[int]
    weights: Sequence[Any]
    inside: Callable[[], AbstractContextManager[Any]]
    saved: Checkpoint | None = None
    average: Callable[[Iterable[Any]], None] | None = None
    rank: int = 0

    @property
    def parameters(self) -> list[Any]:
        moves = list(self.tokens.moves.values()) if self.settings.way == "told" else []
        return [*moves, *self.weights]

    @cached_property
    def usual(self) -> Tensor:
        """The error at each timestep before learning, (T,) fp32, interpolated; ones unless settings.even."""
        count = self.denoiser.schedule.train_timesteps
        if not self.settings.even:
            return torch.ones(count)
        places = torch.linspace(0, count - 1, POINTS).round()
        index = list(self.train[: self.settings.batch])
        x0, found = self.examples.latents[index], []
        cond = self.tokens.encode([self.examples.captions[i] for i in index])
        for number, t in enumerate(places.tolist()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(x0.shape, generator=generator)
            found.append(float(_error(self.denoiser, cond, x0, noise, torch.full((len(index),), t)).mean()))
        if not all(math.isfinite(value) and value > 0 for value in found):
            raise LearnError("The model's predictions are not finite (NaN) from the start. Try float32.")
        at = torch.arange(count) / (count - 1) * (POINTS - 1)
        low = at.floor().long().clamp(max=POINTS - 2)
        logs = torch.tensor(found).log()
        return torch.lerp(logs[low], logs[low + 1], at - low).exp()

    def loss(self, step: int) -> Tensor:
        """The area-weighted denoising loss of one batch; its draws depend on seed, step and rank alone."""
        s, schedule = self.settings, self.denoiser.schedule
        generator = torch.Generator().manual_seed((s.seed * 1_000_003 + step) * 1009 + self.rank)
        index = [self.train[i] for i in torch.randint(len(self.train), (s.batch,), generator=generator).tolist()]
        drop = (torch.rand(s.batch, generator=generator) < s.drop).tolist()
        t = torch.randint(schedule.train_timesteps, (s.batch,), generator=generator)
        noise = torch.randn(s.batch, *self.examples.latents.shape[1:], generator=generator)
        own = ["" if dropped else self.examples.captions[i] for i, dropped in zip(index, drop, strict=True)]
        captions = [
            s.caption(text, self.tokens.concept, self.examples.boxes[i]) for i, text in zip(index, own, strict=True)
        ]
        with torch.enable_grad(), self.inside():
            error = _error(self.denoiser, self.tokens.encode(captions), self.examples.latents[index], noise, t)
            weights = s.weights(self.examples.cells(index)) / self.usual[t].view(-1, 1, 1)
            loss = (error * weights.to(error.device)).mean()
        self.denoiser.cost.backward_rows += s.batch
        return loss

    def held_out(self, held: Sequence[int], told: bool) -> float:
        """Mean squared error in the covered cells of some pictures, at fixed noises and times; NaN for none."""
        total, count = 0.0, 0
        for number, t in enumerate(TIMES):
            generator = torch.Generator().manual_seed(self.settings.seed * 31 + number)
            for part in (list(held[i : i + 16]) for i in range(0, len(held), 16)):
                noise = torch.randn(len(part), *self.examples.latents.shape[1:], generator=generator)
                texts = [self.examples.captions[i] for i in part]
                if told:
                    boxes = [self.examples.boxes[i] for i in part]
                    texts = [
                        self.settings.caption(text, self.tokens.concept, mine)
                        for text, mine in zip(texts, boxes, strict=True)
                    ]
                times = torch.full((len(part),), float(t))
                error = _error(
                    self.denoiser, self.tokens.encode(texts), self.examples.latents[part], noise, times
                ).cpu()
                cells = self.examples.cells(part)
                total, count = total + float(error[cells].sum()), count + int(cells.sum())
        return total / count if count else math.nan

    def descend(self, progress: Progress | None, stop: Callable[[], bool] | None) -> tuple[list[float], str]:
        """Adam, its rates falling along a cosine: the losses, and why it ended. Call under torch.no_grad."""
        s, parameters = self.settings, self.parameters
        self.usual  # noqa: B018 - measured before anything moves; a later call begins with the same
        moves = len(parameters) - len(self.weights)
        groups = [(parameters[:moves], s.rate, 0.0), (parameters[moves:], s.lora_rate, 1e-4)]
        groups = [group for group in groups if group[0]]
        adam = torch.optim.AdamW([{"params": params, "weight_decay": decay} for params, _, decay in groups])
        losses = _restored(self.saved, adam, parameters)
        for step in range(len(losses), s.steps):
            if stop is not None and stop():
                self._save(adam, losses)
                return losses, f"stopped by request after {step} of {s.steps} steps"
            try:
                loss = self.loss(step)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            except (RuntimeError, MemoryError) as error:
                if not losses or not out_of_memory(error):
                    raise
                self._save(adam, losses)
                return losses, f"stopped at step {step + 1} of {s.steps} because memory ran out. To go on, {ADVICE}"
            value = float(loss)
            if not math.isfinite(value) or any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients):
                if not losses:
                    raise LearnError("The model's predictions are not finite (NaN) from the start. Try float32.")
                return losses, f"stopped at step {step + 1} of {s.steps} because of NaN, what was learned before kept"
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            if self.average is not None:
                self.average(parameters)
            for group, (_, rate, _) in zip(adam.param_groups, groups, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / s.steps))
            adam.step()
            losses.append(value)
            if (step + 1) % max(1, s.steps // 10) == 0:
                self._save(adam, losses)
            if progress is not None:
                progress(step + 1, s.steps, value, self.tokens.at)
        return losses, f"finished after {s.steps} steps"

    def _save(self, adam: torch.optim.Optimizer, losses: list[float]) -> None:
        if self.saved is None or self.rank:
            return
        tensors, step = {}, 0
        for number, parameter in enumerate(self.parameters):
            tensors[f"parameter.{number}"] = parameter
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in adam.state:
                    tensors[f"{key}.{number}"] = adam.state[parameter][key]
                    step = int(adam.state[parameter]["step"])
        self.saved.write(tensors, {"losses": losses, "adam_step": step})


def _error(denoiser: Denoiser, cond: Conditioning, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Squared error of the prediction (B, H, W), fp32, a mean over channels."""
    x0, noise = x0.to(denoiser.device), noise.to(denoiser.device)
    x = denoiser.schedule.add_noise(x0, noise, t)
    wanted = denoiser.schedule.prediction_of(x0, noise, t)
    found = denoiser.predict(x.to(denoiser.dtype), t.to(denoiser.device), cond)
    return (found.float() - wanted.float()).square().mean(1)


def _restored(saved: Checkpoint | None, adam: torch.optim.Optimizer, parameters: list[Any]) -> list[float]:
    state = None if saved is None else saved.read()
    if state is None:
        return []
    for number, parameter in enumerate(parameters):
        parameter.copy_(state.tensors[f"parameter.{number}"].to(parameter.device))
        if f"exp_avg.{number}" in state.tensors:
            moments = {k: state.tensors[f"{k}.{number}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(float(state.numbers["adam_step"])), **moments}
    return list(state.numbers["losses"])
