"""Adam on a vector, step by step: what ends it early, and what going on after an interruption needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from .checkpoint import State
from .memory import ADVICE, out_of_memory

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
Project = Callable[[Tensor], Tensor]


class Walk:
    """Adam on u, the vector in units of `unit`: one step at a time, with all that going on later needs.

    losses: one a step. last_good: the vector that had the last of them. Call under torch.no_grad.
    """

    def __init__(self, denoiser: Denoiser, first: Tensor, unit: float, betas: tuple[float, float]) -> None:
        self.denoiser, self.unit = denoiser, unit
        self.u = (first / unit).requires_grad_(True)
        self.adam = torch.optim.Adam([self.u], betas=betas)
        self.losses: list[float] = []
        self.last_good = first

    @property
    def c(self) -> Tensor:
        return self.u.detach() * self.unit

    def step(self, loss: Callable[[Tensor], Tensor], rows: int, rate: float, project: Project | None) -> bool:
        """One step down `loss` of c, a mean over `rows` rows; False, and nothing done, when it is not finite."""
        value, gradient = self._gradient(loss, rows)
        if not math.isfinite(value) or not bool(torch.isfinite(gradient).all()):
            return False
        self.last_good = self.c
        self.u.grad = gradient if project is None else project(gradient)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        if project is not None:  # Adam scales each value on its own, which leads out of the plane again
            self.u.copy_(project(self.u))
        self.losses.append(value)
        return True

    def _gradient(self, loss: Callable[[Tensor], Tensor], rows: int) -> tuple[float, Tensor]:
        """(loss, d loss / d u)."""
        boost = 1024.0 if self.denoiser.dtype == torch.float16 else 1.0  # small gradients out of fp16's underflow
        with torch.enable_grad():
            try:
                value = loss(self.u * self.unit)
                (gradient,) = torch.autograd.grad(value * boost, self.u)
            except RuntimeError as error:
                if "nference" in str(error):
                    raise _inference_error() from error
                raise
        self.denoiser.cost.backward_rows += rows
        return float(value), gradient / boost

    def state(self) -> State:
        """Call after at least one step."""
        adam = self.adam.state[self.u]
        tensors = {"u": self.u, "last_good": self.last_good} | {name: adam[name] for name in MOMENTS}
        return State(tensors, {"adam_step": int(adam["step"]), "losses": self.losses})

    def restore(self, state: State) -> None:
        device = self.u.device
        self.u.copy_(state.tensors["u"].to(device))
        self.last_good = state.tensors["last_good"].to(device)
        self.losses = list(state.numbers["losses"])
        moments = {name: state.tensors[name].to(device) for name in MOMENTS}
        self.adam.state[self.u] = {"step": torch.tensor(float(state.numbers["adam_step"])), **moments}


@dataclass(frozen=True)
class Ending:
    """Why a walk ended, in words; over: going on from its checkpoint would lead nowhere else; spoiled: by NaN."""

    stopped: str
    over: bool = True
    spoiled: bool = False


def walk(
    run: Walk,
    steps: int,
    *,
    step: Callable[[int], bool],
    after: Callable[[int], str | None],
    save: Callable[[], None],
    show: Callable[[int, int, float, Tensor], None],
    stop: Callable[[], bool] | None,
    kept: str,
) -> Ending:
    """Steps from where `run` is to `steps`, until one fails (NaN), memory runs out, or `stop` or `after` end it.

    step(i) does step i and says whether its loss was finite; after(done) may give a reason to end; save() keeps the
    state for later; kept: what stays in the end, in words. Errors: LearnError when stopped before the first step.
    """
    nan = f"stopped at step {{}} of {steps} because of NaN, last good vector kept"
    for i in range(len(run.losses), steps):
        if stop is not None and stop():
            if not run.losses:
                raise too_early()
            save()
            return Ending(f"stopped by request after {i} of {steps} steps, {kept} kept", over=False)
        try:
            if not step(i):
                return Ending(nan.format(i + 1), spoiled=True)
        except (RuntimeError, MemoryError) as error:
            if not run.losses or not out_of_memory(error):
                raise
            reason = f"because memory ran out, {kept} kept. To go on, {ADVICE}"
            return Ending(f"stopped at step {i + 1} of {steps} {reason}", over=False)
        show(i + 1, steps, run.losses[-1], run.last_good)
        reason_to_end = after(i + 1)
        if reason_to_end is not None:
            return Ending(reason_to_end)
    return Ending(f"finished after {steps} steps")


def _inference_error() -> LearnError:
    return LearnError(
        "The model's weights were made inside torch.inference_mode, which forbids learning. "
        "Load the model outside of it (learning itself may be called inside)."
    )


def too_early() -> LearnError:
    return LearnError("Learning was stopped before its first step, so there is no vector yet.")
