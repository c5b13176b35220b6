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
from .checkpoint import Checkpoint, State
from .items import Items
from .memory import out_of_memory
from .timestep_groups import shift_of
from .walk import Ending, Project, Walk, walk

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
        return shift_of(c, index)

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

    def state(self) -> State:
        return State({"best": self.c}, {"best_loss": self.loss, "waited": self.waited, "held_out": self.held_out})

    def restore(self, state: State) -> None:
        self.c = state.tensors["best"].to(self.c.device)
        self.loss, self.waited = float(state.numbers["best_loss"]), int(state.numbers["waited"])
        self.held_out = list(state.numbers["held_out"])


@dataclass(frozen=True)
class Descent:
    """How it went: the best vector with its checks, the loss of each step, and why it ended."""

    best: Best
    losses: list[float]
    ending: Ending

    @property
    def stopped(self) -> str:
        return self.ending.stopped


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
    project: Project | None = None,
    checkpoint: Checkpoint | None = None,
) -> Descent:
    """Adam from `first` in units of `unit`, its rate falling to zero along a cosine; ten checks on the items `judge`.

    show(step, steps, loss, c) is told the vector that had the loss. The best vector is kept when NaN, lack of memory,
    `stop` or `patience` checks without a better one end it early. project: applied to gradient and vector, for a vector
    that has to stay in a plane. checkpoint: written at every check and at `stop`; where it holds a state, the descent
    goes on there, to the same numbers (what `batches` gave before is drawn again, and thrown away). It is the caller's
    to remove. Call under torch.no_grad. Errors: LearnError.
    """
    run = Walk(problem.denoiser, first, unit, betas=(0.9, 0.99))
    best = Best(problem, judge, first)
    every = max(1, steps // 10)
    if not _resumed(run, best, checkpoint) and not best.check(first):
        raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
    for _ in run.losses:
        next(batches)

    def step(i: int) -> bool:
        index = next(batches)
        falling = rate * 0.5 * (1 + math.cos(math.pi * i / steps))
        return run.step(lambda c: problem.loss(c, index), len(index), falling, project)

    def save() -> None:
        if checkpoint is not None:
            state, found = run.state(), best.state()
            checkpoint.write({**state.tensors, **found.tensors}, {**state.numbers, **found.numbers})

    def after(done: int) -> str | None:
        if done % every == 0:
            if not best.check(run.c):
                return f"stopped at step {done} of {steps} because of NaN, last good vector kept"
            save()
        return no_better(done) if best.waited >= patience else None

    def no_better(done: int) -> str:
        return f"stopped after {done} of {steps} steps because it no longer got better"

    if run.losses and best.waited >= patience:  # of a run that had ended so, and was killed after it
        ending = Ending(no_better(len(run.losses)))
    else:
        ending = walk(run, steps, step=step, after=after, save=save, show=show, stop=stop, kept="best so far")
    if run.losses and len(run.losses) % every:  # ended between two checks
        try:
            best.check(run.last_good)
        except (RuntimeError, MemoryError) as error:  # then the best of the checks has to do
            if not out_of_memory(error) or ending.over:
                raise
    return Descent(best, run.losses, ending)


def _resumed(run: Walk, best: Best, checkpoint: Checkpoint | None) -> bool:
    state = None if checkpoint is None else checkpoint.read()
    if state is None:
        return False
    run.restore(state)
    best.restore(state)
    return True


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
