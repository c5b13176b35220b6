"""Adam on a vector through the decoder half alone, with held-out checks: what all learning by gradient shares.

The encoder half never changes, so it runs once; each step costs the decoder half only, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..family import check
from ..vector import ConceptVector
from .trajectories import Items

Progress = Callable[[int, int, float, ConceptVector], None]
Start = ConceptVector | Literal["difference", "zero"] | None
SCALES = (0.5, 1.0, 2.0)  # tried on the start, beside not using it


@dataclass
class Problem:
    """Items, the predictions wanted of them (n, C, H, W), and how much each counts, weight (n,)."""

    denoiser: Denoiser
    items: Items
    target: Tensor
    weight: Tensor
    batch: int

    def shift(self, c: Tensor, index: list[int]) -> Tensor:
        """What is added to h of these items. c: (C,) or (C, H, W) on the model's device."""
        return c.view(-1, 1, 1) if c.ndim == 1 else c

    def predict(self, c: Tensor, index: list[int]) -> Tensor:
        """The steered predictions, fp32."""
        state = self.items.state(index, self.denoiser)
        h = (state.h.float() + self.shift(c, index)).to(self.denoiser.dtype)
        return self.denoiser.from_h(state.with_h(h)).float()

    def errors(self, prediction: Tensor, index: list[int]) -> Tensor:
        """Mean square error of each item, (len(index),)."""
        return (prediction - self.target[index].to(prediction.device)).square().mean((1, 2, 3))

    def mean(self, errors: Tensor, index: list[int]) -> Tensor:
        return (errors * self.weight[index].to(errors.device)).mean()

    def loss(self, c: Tensor, index: list[int]) -> Tensor:
        """What is minimised: a scalar, fp32."""
        return self.mean(self.errors(self.predict(c, index), index), index)

    @torch.no_grad()
    def evaluate(self, c: Tensor, index: list[int]) -> float:
        """The weighted error over all of `index`, without whatever else `loss` asks for."""
        total = 0.0
        for first in range(0, len(index), self.batch):
            part = index[first : first + self.batch]
            total += float(self.mean(self.errors(self.predict(c, part), part), part)) * len(part)
        return total / len(index)


@dataclass
class Best:
    """The vector with the lowest held-out error so far."""

    problem: Problem
    judge: list[int]
    c: Tensor
    loss: float = math.inf
    waited: int = -1  # checks since the best one
    held_out: list[float] = field(default_factory=list)

    def check(self, c: Tensor) -> bool:
        """Measure c on the held-out items; False when the error is not finite (then nothing is noted)."""
        loss = self.problem.evaluate(c, self.judge)
        if not math.isfinite(loss):
            return False
        self.held_out.append(loss)
        self.waited += 1
        if loss < self.loss:
            self.c, self.loss, self.waited = c, loss, 0
        return True


@dataclass(frozen=True)
class Descent:
    """How it went: the best vector with its checks, the loss of each step, and why it ended."""

    best: Best
    losses: list[float]
    stopped: str


def descend(
    problem: Problem,
    first: Tensor,
    unit: float,
    batches: Iterator[list[int]],
    judge: list[int],
    *,
    steps: int,
    rate: float,
    patience: int,
    show: Callable[[int, int, float, Tensor], None],
    stop: Callable[[], bool] | None,
) -> Descent:
    """Adam from `first` in units of `unit`, its rate falling to zero along a cosine; ten checks on the items `judge`.

    show(step, steps, loss, c) is told the vector that had the loss. The best vector is kept when NaN, `stop` or
    `patience` checks without a better one end it early. Call under torch.no_grad. Errors: LearnError.
    """
    best = Best(problem, judge, first)
    if not best.check(first):
        raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
    u = (first / unit).requires_grad_(True)
    last_good = first
    adam = torch.optim.Adam([u], lr=rate, betas=(0.9, 0.99))
    every = max(1, steps // 10)
    losses: list[float] = []
    stopped = f"finished after {steps} steps"
    spoiled = "stopped at step {} of {} because of NaN, last good vector kept"
    for step in range(steps):
        if stop is not None and stop():
            if not losses:
                raise too_early()
            stopped = f"stopped by request after {step} of {steps} steps, best so far kept"
            break
        index = next(batches)
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss, grad = _gradient(problem, u, unit, index)
        if not math.isfinite(loss) or not bool(torch.isfinite(grad).all()):
            stopped = spoiled.format(step + 1, steps)
            break
        last_good = u.detach() * unit
        u.grad = grad
        adam.step()
        losses.append(loss)
        show(step + 1, steps, loss, last_good)
        if (step + 1) % every == 0 and not best.check(u.detach() * unit):
            stopped = spoiled.format(step + 1, steps)
            break
        if best.waited >= patience:
            stopped = f"stopped after {step + 1} of {steps} steps because it no longer got better"
            break
    if losses and len(losses) % every:  # ended between two checks
        best.check(last_good)
    return Descent(best, losses, stopped)


def _gradient(problem: Problem, u: Tensor, unit: float, index: list[int]) -> tuple[float, Tensor]:
    """(loss, d loss / d u). The vector is u * unit."""
    boost = 1024.0 if problem.denoiser.dtype == torch.float16 else 1.0  # keeps small gradients out of fp16's underflow
    with torch.enable_grad():
        try:
            loss = problem.loss(u * unit, index)
            (grad,) = torch.autograd.grad(loss * boost, u)
        except RuntimeError as error:
            if "nference" in str(error):
                raise _inference_error() from error
            raise
    problem.denoiser.cost.backward_rows += len(index)
    return float(loss), grad / boost


def _inference_error() -> LearnError:
    return LearnError(
        "The model's weights were made inside torch.inference_mode, which forbids learning. "
        "Load the model outside of it (learning itself may be called inside)."
    )


def too_early() -> LearnError:
    return LearnError("Learning was stopped before its first step, so there is no vector yet.")


def check_start(start: Start, denoiser: Denoiser) -> None:
    """Errors: FamilyMismatch, LearnError for a vector that differs per timestep."""
    if isinstance(start, ConceptVector):
        check(start.family, start.channels, denoiser.family, denoiser.channels, source=f"The start {start.title!r}")
        if start.per_timestep:
            raise LearnError(f"The start {start.title!r} differs per timestep; learning needs one that does not.")


def first_vector(
    start: Start, mean: Tensor, problem: Problem, train: Tensor, spatial: bool, generator: torch.Generator
) -> Tensor:
    """The first c on the model's device, fp32, in the wanted shape; mean (C, H, W) is what "difference" starts from."""
    shape = tuple(mean.shape) if spatial else (mean.shape[0],)
    device = problem.denoiser.device
    zero = torch.zeros(shape, device=device)
    if isinstance(start, ConceptVector):
        c = start.tensor.to(device)
        if c.ndim == 3 and not spatial:
            return c.mean((1, 2))
        if c.ndim == 3 and c.shape != shape:
            return torch.nn.functional.interpolate(c[None], shape[1:], mode="bilinear")[0]
        return zero + (c.view(-1, 1, 1) if spatial and c.ndim == 1 else c)
    if start != "difference":
        return zero
    mean = mean.to(device) if spatial else mean.to(device).mean((1, 2))
    some = train[torch.randperm(len(train), generator=generator)[: 2 * problem.batch]].tolist()
    tried = {factor: problem.evaluate(mean * factor, some) for factor in SCALES}
    best = min(tried, key=tried.__getitem__)
    return mean * best if tried[best] < 1 and math.isfinite(tried[best]) else zero
