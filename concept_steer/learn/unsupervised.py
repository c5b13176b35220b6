"""Directions of h-space that nobody named: principal components of h, and what moves the predicted picture most.

PCA over seeds and timesteps and the Jacobian's right-singular vectors: Haas et al. 2303.11073 (sec. 3 and 3.2; the
Jacobian also Park et al. 2307.12868). Which way a direction points is a convention: its largest value is positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Denoiser, HState
from ..errors import LearnError
from .found import FoundDirection, signs, vector_of_rank
from .jacobian import Jacobian, lanczos
from .readings import readings
from .result import rms

MOMENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
DEVIATIONS = 4.0  # strength 1 of a principal direction, in standard deviations of h along it
SHARE_OF_H = 0.2  # strength 1 of a Jacobian direction: the RMS of what it adds, as a share of the RMS of h
Progress = Callable[[int, int], None]
Stop = Callable[[], bool]


def principal_directions(
    denoiser: Denoiser,
    prompts: Sequence[str],
    *,
    count: int = 8,
    seeds: int = 64,
    timesteps: Sequence[float] = MOMENTS,
    steps: int = 8,
    guidance: float = 5.0,
    within_prompts: bool = True,
    per_timestep: bool = False,
    spatial: bool = False,
    deviations: float = DEVIATIONS,
    seed: int = 0,
    batch: int = 16,
    title: str = "",
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> list[FoundDirection]:
    """The `count` directions (C,), or (C, H, W) with spatial, along which h varies most from seed to seed.

    prompts take turns over `seeds` seeds; h (averaged over positions unless spatial) is read at `timesteps`, shares of
    sampling. Each timestep's mean is taken away, and with within_prompts each prompt's, so that what remains is what
    the prompts leave open. per_timestep: a basis a timestep and vectors (T, ...); a later basis's components are
    paired with the former's by the seeds they move alike. Strength 1 is `deviations` standard deviations of h.
    stop() True ends reading; the seeds read so far are used. Errors: LearnError (too few seeds, NaN).
    """
    asked = list(prompts)
    if not asked or count < 1:
        raise LearnError("Give at least one prompt and ask for at least one direction.")
    of_item = [i % len(asked) for i in range(seeds)]
    rows: dict[int, list[Tensor]] = {}
    times: dict[int, float] = {}
    squares: list[float] = []
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        for read in readings(
            denoiser,
            [asked[i] for i in of_item],
            [seed + i for i in range(seeds)],
            timesteps,
            steps=steps,
            guidance=guidance,
            batch=batch,
            stop=stop,
            progress=progress,
        ):
            h = read.state.h.float()
            squares.append(rms(h) ** 2)
            rows.setdefault(read.moment, []).append((h if spatial else h.mean((2, 3))).cpu())
            times[read.moment] = read.t
    if not rows:
        raise LearnError("Reading h was stopped before its first batch of seeds: there is nothing to compare yet.")
    h = torch.stack([torch.cat(rows[moment]) for moment in sorted(rows)])  # (T, n, ...)
    if not bool(torch.isfinite(h).all()):
        raise LearnError("h holds values that are not finite: the model gives NaN. Try dtype float32.")
    centred = _centred(h, torch.tensor(of_item[: h.shape[1]]) if within_prompts else None)
    free = h.shape[1] - (min(len(asked), h.shape[1]) if within_prompts else 1)
    if free < count:
        raise LearnError(
            f"{h.shape[1]} seeds over {len(asked)} prompts leave {free} directions, fewer than the {count} asked for: "
            "give more seeds or fewer prompts."
        )
    moments = [times[moment] for moment in sorted(times)] if per_timestep else []
    tensors, shares = (_bases if per_timestep else _basis)(centred, count, free)
    common = {
        "prompts": " | ".join(asked),
        "seeds": h.shape[1],
        "seed": seed,
        "guidance": guidance,
        "calibration": (sum(squares) / len(squares)) ** 0.5,
        "deviations": deviations,
        "checkpoint_hash": denoiser.checkpoint_hash,
    }
    return [
        FoundDirection(
            vector_of_rank(denoiser, tensor * deviations, "pca", i, title, moments, share_of_variance=share, **common),
            "pca",
            i,
            share,
        )
        for i, (tensor, share) in enumerate(zip(tensors, shares, strict=True), 1)
    ]


def _centred(h: Tensor, prompt: Tensor | None) -> Tensor:
    """h (T, n, ...) without the mean over the seeds of each timestep, or of each timestep and prompt (n,)."""
    if prompt is None:
        return h - h.mean(1, keepdim=True)
    result = h.clone()
    for one in prompt.unique():
        result[:, prompt == one] -= h[:, prompt == one].mean(1, keepdim=True)
    return result


def _components(rows: Tensor, count: int, free: int) -> tuple[Tensor, Tensor, Tensor]:
    """(k, d) orthonormal directions of rows (n, d), their standard deviations and shares of the variance."""
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    variances = values.square()
    return directions[:count], (variances[:count] / free).sqrt(), variances[:count] / variances.sum().clamp_min(1e-30)


def _basis(centred: Tensor, count: int, free: int) -> tuple[list[Tensor], list[float]]:
    rows = centred.flatten(0, 1).flatten(1)
    found, deviation, shares = _components(rows, count, free * centred.shape[0])
    found = found * signs(found) * deviation[:, None]
    return list(found.view(-1, *centred.shape[2:])), shares.tolist()


def _bases(centred: Tensor, count: int, free: int) -> tuple[list[Tensor], list[float]]:
    """As `_basis` for every timestep apart: (T, ...) each, shares averaged over the timesteps."""
    tensors, shares = [], []
    before: Tensor | None = None  # what each seed has of each component, (n, k), at the former timestep
    for rows in centred.flatten(2):
        found, deviation, share = _components(rows, count, free)
        if before is None:
            found = found * signs(found)
        else:
            alike = F.normalize(before, dim=0).T @ F.normalize(rows @ found.T, dim=0)  # (k before, k now)
            order = _pairing(alike.abs())
            sign = torch.where(alike[torch.arange(count), order] < 0, -1.0, 1.0)
            found, deviation, share = found[order] * sign[:, None], deviation[order], share[order]
        before = rows @ found.T
        tensors.append((found * deviation[:, None]).view(count, *centred.shape[2:]))
        shares.append(share)
    return list(torch.stack(tensors, 1)), torch.stack(shares).mean(0).tolist()


def _pairing(alike: Tensor) -> Tensor:
    """For each row its own column, the most alike pair first, then the next of what is left, and so on."""
    left = alike.clone()
    order = torch.zeros(len(left), dtype=torch.long)
    for _ in range(len(left)):
        row, column = divmod(int(left.argmax()), left.shape[1])
        order[row] = column
        left[row], left[:, column] = -1, -1
    return order


def jacobian_directions(
    denoiser: Denoiser,
    prompts: Sequence[str],
    *,
    count: int = 3,
    seeds: int = 4,
    timestep: float = 0.5,
    iterations: int = 50,
    tolerance: float = 1e-5,
    mask: Tensor | None = None,
    spatial: bool = False,
    steps: int = 8,
    guidance: float = 5.0,
    share_of_h: float = SHARE_OF_H,
    seed: int = 0,
    batch: int = 4,
    title: str = "",
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> list[FoundDirection]:
    """The `count` directions (C,), or (C, H, W) with spatial, that change the predicted picture most per unit length.

    Top right-singular vectors of J = d x0_hat / d h of the text rows at `timestep` (share of sampling), of all seeds'
    Jacobians stacked: they maximise the mean over seeds of |J_s v|^2, so they are global directions, and the singular
    value is the root of that mean. One seed gives that picture's own. mask (H, W), 0..1, any size: only what changes
    in x0_hat there counts. Power iteration on the mean of J_s^T J_s whose iterates are orthogonalised and kept
    (Lanczos), at most `iterations` applications; converged: |J^T J v - s^2 v| <= tolerance * s^2. Only the decoder half
    is evaluated: a forward pass and two backward passes per application and row (the graph is kept where one batch
    holds all seeds), with plain attention, because fused kernels have no second derivative.
    Strength 1 adds share_of_h times the RMS of h. stop() True ends the iteration; what is found so far is returned.
    Errors: LearnError (no second derivative, NaN, mask without a one, more directions than values in a vector).
    """
    asked = list(prompts)
    if not asked or count < 1 or seeds < 1 or iterations < count:
        raise LearnError("Give at least one prompt, seed and direction, and as many iterations as directions.")
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        states: list[HState] = []
        t, squares = 0.0, []
        for read in readings(
            denoiser,
            [asked[i % len(asked)] for i in range(seeds)],
            [seed + i for i in range(seeds)],
            [timestep],
            steps=steps,
            guidance=guidance,
            batch=batch,
            stop=stop,
        ):
            states.append(read.state.detach())
            squares.append(rms(read.state.h) ** 2)
            t = read.t
        if not states:
            raise LearnError("Reading h was stopped before its first batch of seeds: there is nothing to derive yet.")
        length = share_of_h * (sum(squares) / len(squares)) ** 0.5
        jacobian = Jacobian(denoiser, states, t, mask, spatial)
        found = lanczos(jacobian, count, iterations, tolerance, seed, progress, stop)
    directions = found.vectors * signs(found.vectors)
    common = {
        "prompts": " | ".join(asked),
        "seeds": sum(len(state) for state in states),
        "seed": seed,
        "guidance": guidance,
        "timestep": t,
        "masked": mask is not None,
        "calibration": length / share_of_h,
        "share_of_h": share_of_h,
        "checkpoint_hash": denoiser.checkpoint_hash,
    }
    result = []
    for i, (row, value) in enumerate(zip(directions, found.values.tolist(), strict=True), 1):
        tensor = row.view(jacobian.shape) * (length * row.numel() ** 0.5)
        vector = vector_of_rank(denoiser, tensor, "jacobian", i, title, (), singular_value=value, **common)
        result.append(FoundDirection(vector, "jacobian", i, value, found.iterations, bool(found.converged[i - 1])))
    return result
