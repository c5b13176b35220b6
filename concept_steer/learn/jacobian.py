"""The Jacobian of the predicted picture with respect to h, through the decoder half only, and its singular vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Denoiser, HState
from ..errors import LearnError


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, torch's attention is made of matrix products, which can be differentiated twice; restored afterwards."""
    kernels = torch.backends.cuda  # also heeded on the CPU
    flash, efficient, math = (
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.math_sdp_enabled(),
    )
    kernels.enable_flash_sdp(False)
    kernels.enable_mem_efficient_sdp(False)
    kernels.enable_math_sdp(True)
    try:
        yield
    finally:
        kernels.enable_flash_sdp(flash)
        kernels.enable_mem_efficient_sdp(efficient)
        kernels.enable_math_sdp(math)


class Jacobian:
    """J_s = d (mask * x0_hat) / d c at c = 0 for every row s of `states`, with h + c: c (C,) or (C, H, W).

    states: of text rows at training timestep t, batch by batch. `squared(v)` is the mean over rows of J_s^T J_s v.
    """

    def __init__(
        self, denoiser: Denoiser, states: Sequence[HState], t: float, mask: Tensor | None, spatial: bool
    ) -> None:
        self.denoiser, self.states = denoiser, states
        self.shape = tuple(states[0].h.shape[1:]) if spatial else (states[0].h.shape[1],)
        self.count = sum(len(state) for state in states)
        self.weight = self._scale(t) if mask is None else self._scale(t) * self._mask(mask)
        self._graph: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def squared(self, v: Tensor) -> Tensor:
        """v and the result: (d,), fp32, on the CPU. Errors: LearnError."""
        total = torch.zeros(v.numel())
        with torch.enable_grad(), plain_attention():
            for state in self.states:
                output, c, probe, transposed = self._graph or self._built(state)
                if len(self.states) == 1:
                    self._graph = output, c, probe, transposed
                try:
                    # J^T u is linear in u, and its own derivative with respect to u is J
                    (moved,) = torch.autograd.grad(
                        transposed, probe, v.view(self.shape).to(transposed.device), retain_graph=True
                    )
                    (back,) = torch.autograd.grad(output, c, moved.detach(), retain_graph=self._graph is not None)
                except RuntimeError as error:
                    raise _no_second_derivative(error) from error
                self.denoiser.cost.backward_rows += 3 * len(state)  # the first of the two passes goes both ways
                total += back.detach().float().cpu().flatten()
        if not bool(torch.isfinite(total).all()):
            raise LearnError("The model's derivatives are not finite (NaN). Try dtype float32.")
        return total / self.count

    def _built(self, state: HState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0_hat (B, C, H, W) up to a constant, c, u like x0_hat, and J^T u, all in one graph."""
        c = torch.zeros(self.shape, device=state.h.device, requires_grad=True)
        h = state.h.float() + (c if len(self.shape) == 3 else c.view(-1, 1, 1))
        prediction = self.denoiser.from_h(state.with_h(h.to(state.h.dtype))).float()
        output = prediction * self.weight.to(prediction.device)
        probe = torch.zeros_like(output, requires_grad=True)
        try:
            (transposed,) = torch.autograd.grad(output, c, probe, create_graph=True)
        except RuntimeError as error:
            raise _no_second_derivative(error) from error
        if not transposed.requires_grad:
            raise _no_second_derivative(None)
        return output, c, probe, transposed

    def _scale(self, t: float) -> Tensor:
        """d x0_hat / d prediction, one number (1, 1, 1, 1)."""
        one = torch.ones(1, 1, 1, 1)
        schedule = self.denoiser.schedule
        return schedule.to_x0(torch.zeros_like(one), one, t).cpu()

    def _mask(self, mask: Tensor) -> Tensor:
        size = self.denoiser.latent_shape[-2:]
        if mask.ndim != 2 or not bool(((mask >= 0) & (mask <= 1)).all()) or not bool(mask.any()):
            raise LearnError(
                f"A mask is one picture (H, W) of values from 0 to 1 that are not all 0; found {tuple(mask.shape)}."
            )
        with torch.no_grad():
            small = F.interpolate(mask[None, None].float().cpu(), size, mode="bilinear", antialias=True)
        return small.clamp(0, 1)


def _no_second_derivative(error: RuntimeError | None) -> LearnError:
    reason = "the decoder's gradient has no graph of its own" if error is None else str(error).splitlines()[0]
    if error is not None and "memory" in reason.lower():
        return LearnError(
            f"Not enough memory for the decoder's derivatives ({reason}): take a smaller batch or picture."
        )
    return LearnError(
        f"The Jacobian needs second derivatives of the decoder, which this model's attention does not give ({reason}). "
        "In ComfyUI start with --use-pytorch-cross-attention; in diffusers take AttnProcessor or AttnProcessor2_0."
    )


@dataclass(frozen=True)
class SingularVectors:
    """vectors (k, d) orthonormal, values (k,) descending, converged (k,) bool, iterations: applications of J^T J."""

    vectors: Tensor
    values: Tensor
    converged: Tensor
    iterations: int


def lanczos(
    jacobian: Jacobian,
    count: int,
    iterations: int,
    tolerance: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> SingularVectors:
    """The top singular vectors by power iteration with every iterate kept and orthogonalised (Lanczos 1950).

    The best vectors within all iterates so far (Rayleigh-Ritz) come far sooner than those of the last iterate alone.
    """
    size = torch.Size(jacobian.shape).numel()
    if count > size:
        raise LearnError(f"A vector of {size} values has no {count} directions: ask for fewer.")
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, images = [start / start.norm()], []
    vectors = values = residuals = torch.empty(0)
    most = min(iterations, size)
    while True:
        images.append(jacobian.squared(basis[-1].float()).double())
        v, w = torch.stack(basis), torch.stack(images)  # (m, d)
        projected = v @ w.T
        squares, mix = torch.linalg.eigh((projected + projected.T) / 2)
        squares, mix = squares.flip(0)[:count].clamp_min(0), mix.flip(1)[:, :count]
        vectors, values = mix.T @ v, squares.sqrt()
        residuals = (mix.T @ w - squares[:, None] * vectors).norm(dim=1) / squares.clamp_min(1e-30)
        if progress is not None:
            progress(len(basis), most)
        done = len(vectors) >= count and bool((residuals <= tolerance).all())
        if done or len(basis) >= most or (len(basis) >= count and stop is not None and stop()):
            break
        rest = images[-1]
        for _ in range(2):  # twice: the first time loses digits
            rest = rest - v.T @ (v @ rest)
        if float(rest.norm()) <= 1e-7 * float(images[-1].norm()):  # nothing new: J has no more directions than these
            break
        basis.append(rest / rest.norm())
    return SingularVectors(vectors.float(), values.float(), residuals <= tolerance, len(basis))
