"""Learn a vector from the frozen model's own predictions (the target of RespoDiff, 2509.15257, eq. for L_R, cached).

c* = argmin_c E ||eps(x_t, neutral; h + c) - eps(x_t, positive)||^2 / E ||eps(x_t, neutral) - eps(x_t, positive)||^2.
The encoder half never changes, so it runs once; each step then costs the decoder half only, forward and backward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..family import check
from ..vector import ConceptVector
from .calibration import amplitude
from .result import LearnResult, Pairs, auc, checked_pairs, finished_vector, projection, rms
from .trajectories import Cache, build_cache

Progress = Callable[[int, int, float, ConceptVector], None]
Start = ConceptVector | Literal["difference", "zero"] | None
SCALES = (0.5, 1.0, 2.0)  # tried on the start, beside not using it


@dataclass
class _Problem:
    """Items, targets and weights; `weight` makes every timestep count the same (1 / mean square effect there)."""

    denoiser: Denoiser
    cache: Cache
    weight: Tensor  # (n,)
    keep: Tensor  # (n, 1, H, W): 1 where the positive prompt changes nothing, 0 where it changes most
    batch: int

    def loss(self, c: Tensor, index: list[int], preservation: float) -> Tensor:
        """Scalar fp32. c: (C,) or (C, H, W) on the model's device."""
        device, dtype = self.denoiser.device, self.denoiser.dtype
        state = self.cache.state(index, self.denoiser)
        h = (state.h.float() + (c.view(-1, 1, 1) if c.ndim == 1 else c)).to(dtype)
        prediction = self.denoiser.from_h(state.with_h(h)).float()
        error = (prediction - self.cache.positive[index].to(device)).square().mean((1, 2, 3))
        if preservation > 0:
            change = self.keep[index].to(device) * (prediction - self.cache.neutral[index].to(device))
            error = error + preservation * change.square().mean((1, 2, 3))
        return (error * self.weight[index].to(device)).mean()

    @torch.no_grad()
    def evaluate(self, c: Tensor, index: list[int]) -> float:
        """The main loss alone over all of `index`: 1 is no vector at all, 0 the positive prompt's own prediction."""
        total = 0.0
        for first in range(0, len(index), self.batch):
            part = index[first : first + self.batch]
            total += float(self.loss(c, part, 0.0)) * len(part)
        return total / len(index)


@dataclass
class _Best:
    """The vector with the lowest held-out loss so far."""

    problem: _Problem
    judge: list[int]
    c: Tensor
    loss: float = math.inf
    waited: int = -1  # checks since the best one
    held_out: list[float] = field(default_factory=list)

    def check(self, c: Tensor) -> bool:
        """Measure c on the held-out items; False when the loss is not finite (then nothing is noted)."""
        loss = self.problem.evaluate(c, self.judge)
        if not math.isfinite(loss):
            return False
        self.held_out.append(loss)
        self.waited += 1
        if loss < self.loss:
            self.c, self.loss, self.waited = c, loss, 0
        return True


def learn_score(
    denoiser: Denoiser,
    pairs: Pairs,
    *,
    steps: int = 100,
    batch: int = 16,
    rate: float = 0.1,
    trajectories: int = 32,
    sample_steps: int = 6,
    guidance: float = 5.0,
    preservation: float = 0.1,
    spatial: bool = False,
    calibrate: bool = True,
    start: Start = "difference",
    holdout: float = 0.25,
    patience: int = 6,
    seed: int = 0,
    title: str = "",
    progress: Progress | None = None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LearnResult:
    """A vector (C,), or (C, H, W) with spatial, from pairs of (neutral, positive) prompts. Weights stay untouched.

    rate: Adam's, in units of the change of h between the two prompts (so that one rate fits every model), falling to
    zero along a cosine. start: a vector, "difference" (of the cached h, the best of a few scales on training items), or
    "zero" (also None). holdout: share of the seeds kept for checks: ten times they are measured, the best vector is
    kept, and learning ends after `patience` checks without a better one. preservation: weight of "where the positive
    prompt changes nothing, nothing changes". calibrate: in the end the vector is lengthened until strength 1 takes the
    prediction as far as the prompt does (`explained` is measured before that).
    caching(done, total) is called while trajectories are drawn,
    progress(step, steps, loss, vector) after each step; stop() True ends learning with the best so far.
    Cost with the defaults: about 1,700 UNet rows forward, 1,600 rows backward through the decoder.
    Works under torch.inference_mode when the model was loaded outside of it.
    Errors: LearnError (no effect to learn, stopped too early, weights made inside inference_mode), FamilyMismatch.
    """
    began, cost = time.perf_counter(), denoiser.cost.snapshot()
    prompts = checked_pairs(pairs)
    if steps < 1 or batch < 1 or sample_steps < 1 or not 0 < holdout < 1 or rate <= 0 or preservation < 0:
        raise LearnError("steps, batch and sample_steps start at 1, holdout lies between 0 and 1, rate above 0.")
    if isinstance(start, ConceptVector):
        check(start.family, start.channels, denoiser.family, denoiser.channels, source=f"The start {start.title!r}")
        if start.per_timestep:
            raise LearnError(f"The start {start.title!r} differs per timestep; learning needs one that does not.")
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        cache = build_cache(
            denoiser,
            prompts,
            trajectories=trajectories,
            sample_steps=sample_steps,
            guidance=guidance,
            holdout=holdout,
            seed=seed,
            batch=batch,
            stop=stop,
            caching=caching,
        )
        neutral_h = cache.neutral_h()
        unit = _unit(cache, neutral_h, spatial)
        problem = _problem(denoiser, cache, batch)
        train = torch.nonzero(~cache.held_out).flatten()
        judge = torch.nonzero(cache.held_out).flatten().tolist()
        generator = torch.Generator().manual_seed(seed)
        first = _start(start, problem, neutral_h, train, spatial, generator)

        def made(tensor: Tensor) -> ConceptVector:
            return ConceptVector(tensor.detach().cpu(), denoiser.family, title=title or prompts[0][1])

        best = _Best(problem, judge, first)
        if not best.check(first):
            raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
        u = (first / unit).requires_grad_(True)
        last_good = first
        adam = torch.optim.Adam([u], lr=rate, betas=(0.9, 0.99))
        every = max(1, steps // 10)
        losses: list[float] = []
        order: list[int] = []
        stopped = f"finished after {steps} steps"
        spoiled = "stopped at step {} of {} because of NaN, last good vector kept"
        for step in range(steps):
            if stop is not None and stop():
                stopped = f"stopped by request after {step} of {steps} steps, best so far kept"
                break
            while len(order) < batch:
                order += train[torch.randperm(len(train), generator=generator)].tolist()
            index, order = order[:batch], order[batch:]
            adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss, grad = _gradient(problem, u, unit, index, preservation)
            if not math.isfinite(loss) or not bool(torch.isfinite(grad).all()):
                stopped = spoiled.format(step + 1, steps)
                break
            last_good = u.detach() * unit
            u.grad = grad
            adam.step()
            losses.append(loss)
            if progress is not None:
                progress(step + 1, steps, loss, made(last_good))
            if (step + 1) % every == 0 and not best.check(u.detach() * unit):
                stopped = spoiled.format(step + 1, steps)
                break
            if best.waited >= patience:
                stopped = f"stopped after {step + 1} of {steps} steps because it no longer got better"
                break
        if losses and len(losses) % every:  # ended between two checks
            best.check(last_good)
        separation = _separation(cache, neutral_h, best.c.cpu()) if bool(best.c.any()) else None
        length = 1.0
        if calibrate and bool(best.c.any()):
            some = train[torch.randperm(len(train), generator=generator)[: 4 * batch]].tolist()
            length = amplitude(denoiser, cache, best.c, problem.weight, some, batch)
        vector = finished_vector(
            denoiser,
            best.c.cpu() * length,
            prompts,
            title,
            calibration_length=length,
            method="score",
            steps=len(losses),
            seed=seed,
            calibration=rms(neutral_h),
        )
    spent = denoiser.cost.since(cost)
    return LearnResult(
        vector=vector,
        method="score",
        losses=losses,
        separation=separation,
        explained=1 - best.loss,
        unet_rows=spent.unet_rows,
        backward_rows=spent.backward_rows,
        seconds=time.perf_counter() - began,
        stopped=stopped,
        held_out=best.held_out,
    )


def _problem(denoiser: Denoiser, cache: Cache, batch: int) -> _Problem:
    effect = (cache.positive - cache.neutral).square().mean((1, 2, 3))
    if not bool(torch.isfinite(effect).all()):
        raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
    weight = torch.ones_like(effect)
    for held in (False, True):  # each part by its own means, so that no vector at all scores exactly 1 in both
        for bucket in cache.bucket.unique():
            members = (cache.bucket == bucket) & (cache.held_out == held)
            weight[members] = 1 / effect[members].mean()
    if not bool(torch.isfinite(weight).all()):
        raise LearnError("The positive prompt changes nothing in this model's predictions: there is nothing to learn.")
    change = (cache.positive - cache.neutral).abs().mean(1, keepdim=True)
    keep = 1 - change / change.amax((2, 3), keepdim=True).clamp_min(1e-20)
    return _Problem(denoiser, cache, weight, keep, batch)


def _unit(cache: Cache, neutral_h: Tensor, spatial: bool) -> float:
    """The size (RMS per value of c) of what the positive prompt itself changes in h; of h where it changes nothing."""
    change = cache.positive_h - neutral_h
    return rms(change if spatial else change.mean((2, 3))) or rms(neutral_h)


def _gradient(problem: _Problem, u: Tensor, unit: float, index: list[int], preservation: float) -> tuple[float, Tensor]:
    """(loss, d loss / d u). The vector is u * unit."""
    boost = 1024.0 if problem.denoiser.dtype == torch.float16 else 1.0  # keeps small gradients out of fp16's underflow
    with torch.enable_grad():
        try:
            loss = problem.loss(u * unit, index, preservation)
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


def _start(
    start: Start, problem: _Problem, neutral_h: Tensor, train: Tensor, spatial: bool, generator: torch.Generator
) -> Tensor:
    """The first c on the model's device, fp32, in the wanted shape."""
    channels, height, width = neutral_h.shape[1:]
    shape = (channels, height, width) if spatial else (channels,)
    device = problem.denoiser.device
    zero = torch.zeros(shape, device=device)
    if isinstance(start, ConceptVector):
        c = start.tensor.to(device)
        if c.ndim == 3 and not spatial:
            return c.mean((1, 2))
        if c.ndim == 3 and c.shape != shape:
            return torch.nn.functional.interpolate(c[None], (height, width), mode="bilinear")[0]
        return zero + (c.view(-1, 1, 1) if spatial and c.ndim == 1 else c)
    if start != "difference":
        return zero
    mean = (problem.cache.positive_h[train] - neutral_h[train]).mean(0).to(device)
    mean = mean if spatial else mean.mean((1, 2))
    some = train[torch.randperm(len(train), generator=generator)[: 2 * problem.batch]].tolist()
    tried = {factor: problem.evaluate(mean * factor, some) for factor in SCALES}
    best = min(tried, key=tried.__getitem__)
    return mean * best if tried[best] < 1 and math.isfinite(tried[best]) else zero


def _separation(cache: Cache, neutral_h: Tensor, direction: Tensor) -> float:
    """Mean over timesteps of the AUC of <h, v>, positive against neutral prompt, on the held-out items."""
    found = []
    for bucket in cache.bucket.unique():
        members = (cache.bucket == bucket) & cache.held_out
        found.append(auc(projection(cache.positive_h[members], direction), projection(neutral_h[members], direction)))
    return sum(found) / len(found)
