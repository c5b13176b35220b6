"""Reward-based noise optimisation (ReNO, Eyring et al. 2406.04312): a better picture from a better starting noise.

The model stays as it is; its starting noise climbs the gradient of rewards of the picture it leads to. Made for models
of one or a few steps. With a reward on latents (Latent-CLIP, Becker et al. 2503.08455 sec. 4) nothing is decoded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..denoiser import Denoiser, Steers, steers_of_rows
from ..errors import ConceptSteerError, SettingError
from ..sampling import encode_rows, noise, timesteps
from .noise_descent import Descent
from .noise_drawing import Sampler
from .noise_result import NoiseResult, Snapshot, join

Progress = Callable[[Snapshot], None]
BOOST = 1024.0  # small gradients out of fp16's underflow


@dataclass(frozen=True, eq=False)
class Reward:
    """One term of what is maximised: `weight` times `of`.

    of: scaled latents (B, C, H, W), fp32 -> (B,); gradients have to pass, and no row may depend on another. pixels: it
    gets the decoded pictures (B, 3, H, W) in [-1, 1] instead. targets: (N, ...), what each of the N pictures is wanted
    to be; `of` then gets its rows as the second argument.
    """

    name: str
    of: Callable[..., Tensor]
    weight: float = 1.0
    pixels: bool = False
    targets: Tensor | None = None


@dataclass
class _Climb:
    """The pictures of one batch: where their noise is, and the best of each so far. rows: their numbers."""

    rows: Tensor
    z: Tensor
    velocity: Tensor
    best: dict[str, Tensor]
    history: list[Tensor] = field(default_factory=list)
    spoiled: dict[int, int] = field(default_factory=dict)  # place -> iteration at which it was no longer finite


def optimise_noise(
    denoiser: Denoiser,
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    *,
    seeds: Sequence[int],
    settings: Descent | None = None,
    steps: int = 1,
    guidance: float = 1.0,
    negative: str = "",
    steers: Steers = (),
    start_noise: Tensor | None = None,
    batch: int = 4,
    through: int | None = None,
    checkpointing: bool | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> NoiseResult:
    """The starting noise of one picture per prompt and seed, each optimised by itself; the best one of each is kept.

    rewards: their weighted sum is maximised. settings: as published by default. steps, guidance, negative, steers,
    start_noise (N, C, H, W): of sampling, as in sampling.sample. batch: pictures at once. through, checkpointing: see
    `Sampler`; by default all steps, and from two steps on. progress sees every iteration with the best latents so far;
    stop is asked after every one: true ends with the best so far, of the pictures that were reached. A picture whose
    numbers stop being finite keeps its last good noise, and the others go on. The same call gives the same bits on the
    CPU. Errors: SettingError for numbers and rewards that do not fit, ConceptSteerError when the very start is NaN.
    """
    began = time.perf_counter()
    settings = settings or Descent()
    _check(denoiser, prompts, rewards, seeds, steps, batch, through, start_noise)
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        rewards = [_own(reward) for reward in rewards]
        cost = denoiser.cost.snapshot()
        sampler = Sampler(
            denoiser,
            encode_rows(denoiser, prompts).plain(),
            denoiser.encode_text([negative]).plain() if guidance != 1 else None,
            guidance,
            timesteps(denoiser.schedule, steps),
            steers_of_rows(steers, len(prompts)),
            through or steps,
            steps > 1 if checkpointing is None else checkpointing,
        )
        if start_noise is None:
            start = torch.stack([noise(seed, denoiser.latent_shape) for seed in seeds])
        else:
            start = start_noise.detach().to("cpu", torch.float32).clone()
        climbs: list[_Climb] = []
        stopped = ""
        for first in range(0, len(prompts), batch):
            numbers = torch.arange(first, min(first + batch, len(prompts)))
            stopped = _climb(sampler, start[numbers], numbers, rewards, settings, climbs, progress, stop, len(prompts))
            if stopped:
                break
    rows = denoiser.cost.since(cost).unet_rows
    parts = [(climb.best, torch.stack(climb.history), climb.spoiled, int(climb.rows[0])) for climb in climbs]
    return join(parts, stopped=stopped, unet_rows=rows, seconds=time.perf_counter() - began)


def _climb(
    sampler: Sampler,
    start: Tensor,
    numbers: Tensor,
    rewards: Sequence[Reward],
    settings: Descent,
    climbs: list[_Climb],
    progress: Progress | None,
    stop: Callable[[], bool] | None,
    count: int,
) -> str:
    """Optimise one batch and append it to `climbs`; why it was stopped, in words, or nothing."""
    device = sampler.denoiser.device
    z = start.to(device)
    climb = _Climb(numbers.to(device), z, torch.zeros_like(z), {})
    active = torch.arange(len(z), device=device)
    for i in range(settings.iterations):
        last = i + 1 == settings.iterations
        active = _iterate(climb, active, i, sampler, rewards, None if last else settings)
        if i == 0:
            climbs.append(climb)
        if progress is not None:
            done = int(numbers[0]) * settings.iterations + (i + 1) * len(z)
            pictures = range(int(numbers[0]), int(numbers[-1]) + 1)
            progress(Snapshot(done, count * settings.iterations, i + 1, pictures, climb.history[-1], dict(climb.best)))
        done_here = last or not len(active)
        if stop is not None and not (done_here and numbers[-1] + 1 == count) and stop():
            return f"stopped by request after {i + 1} of {settings.iterations} iterations"
        if done_here:
            break
    return ""


def _iterate(
    climb: _Climb, active: Tensor, i: int, sampler: Sampler, rewards: Sequence[Reward], settings: Descent | None
) -> Tensor:
    """Draw and judge the active places of a batch, keep what is best, and move their noise; the still active ones.

    settings None: the last iteration, after which nothing moves.
    """
    rows = climb.rows[active]
    with torch.set_grad_enabled(settings is not None):
        leaf = climb.z[active].requires_grad_(settings is not None)
        latents = sampler(leaf, rows)
        fine = torch.isfinite(latents.detach()).flatten(1).all(1)
        places = fine.nonzero()[:, 0]
        whole = latents if bool(fine.all()) else latents[places]
        terms = _judge(sampler.denoiser, rewards, whole, rows[places]) if len(places) else {}
        total = sum(terms.values()) if terms else latents.new_zeros(0)
        assert isinstance(total, Tensor)
        good = torch.isfinite(total.detach())
        gradient = None
        if settings is not None and bool(good.any()):
            gradient = _gradient(total[good].sum(), leaf, sampler.denoiser.dtype)
    judged = torch.full((len(climb.z),), math.nan)
    judged[active[places].cpu()] = total.detach().float().cpu()
    climb.history.append(judged)
    _remember(climb, active[places[good]], places[good], total.detach()[good], terms, good, latents.detach(), leaf, i)
    moving = torch.zeros(len(active), dtype=torch.bool, device=active.device)
    moving[places[good]] = True
    if gradient is not None and settings is not None:
        moving &= torch.isfinite(gradient).flatten(1).all(1)
        on = active[moving]
        climb.z[on], climb.velocity[on] = settings.step(climb.z[on], climb.velocity[on], gradient[moving])
    for place in active[~moving].tolist():
        climb.spoiled[place] = i
    return active[moving]


def _remember(
    climb: _Climb,
    on: Tensor,
    places: Tensor,
    total: Tensor,
    terms: Mapping[str, Tensor],
    good: Tensor,
    latents: Tensor,
    leaf: Tensor,
    i: int,
) -> None:
    """Keep what is better than all before. on: places in the batch; places: the same among the active ones."""
    best = climb.best
    if i == 0:
        if len(on) < len(climb.z):
            raise ConceptSteerError(
                "The picture of the starting noise, or its reward, is not finite (NaN or infinity): there is nothing "
                "to improve. Load the model in float32 or bfloat16, and check the rewards."
            )
        best["start"], best["at"] = total.clone(), torch.zeros(len(on), dtype=torch.int64, device=on.device)
        best["value"], best["noise"], best["latents"] = total.clone(), climb.z.clone(), latents.clone()
        best |= {f"reward {name}": term.detach().clone() for name, term in terms.items()}
        best |= {f"start {name}": term.detach().clone() for name, term in terms.items()}
        return
    better = total > best["value"][on]
    at, of = on[better], places[better]
    best["value"][at], best["at"][at] = total[better], i
    best["noise"][at], best["latents"][at] = leaf.detach()[of], latents[of]
    for name, term in terms.items():
        best[f"reward {name}"][at] = term.detach()[good][better]


def _judge(denoiser: Denoiser, rewards: Sequence[Reward], latents: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Each reward (B,) times its weight, fp32, of the pictures with the numbers `rows`."""
    pixels = None
    if any(reward.pixels for reward in rewards):
        pixels = denoiser.decode_with_gradient(latents)  # type: ignore[attr-defined]
    found: dict[str, Tensor] = {}
    for reward in rewards:
        seen = pixels if reward.pixels else latents
        given = () if reward.targets is None else (reward.targets.to(latents.device)[rows],)
        value = reward.of(seen, *given)
        if not isinstance(value, Tensor) or value.shape != (len(latents),):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SettingError(f"The reward {reward.name!r} gave {shape}; expected one number per picture, (B,).")
        found[reward.name] = reward.weight * value.float().to(latents.device)
    return found


def _gradient(total: Tensor, leaf: Tensor, dtype: torch.dtype) -> Tensor:
    boost = BOOST if dtype == torch.float16 else 1.0
    if not total.requires_grad:
        raise SettingError(
            "No reward passes a gradient: each was computed under torch.no_grad, or does not depend on the picture."
        )
    try:
        (gradient,) = torch.autograd.grad(total * boost, leaf)
    except RuntimeError as error:
        if "nference" in str(error):
            raise ConceptSteerError(
                "The model or a reward was loaded inside torch.inference_mode, so that no gradient can pass: load both "
                "outside of it."
            ) from error
        raise
    return gradient.float() / boost


def _own(reward: Reward) -> Reward:
    """The same with targets that autograd can use, also when they were made inside torch.inference_mode."""
    targets = None if reward.targets is None else reward.targets.detach().clone()
    return Reward(reward.name, reward.of, reward.weight, reward.pixels, targets)


def _check(
    denoiser: Denoiser,
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    seeds: Sequence[int],
    steps: int,
    batch: int,
    through: int | None,
    start: Tensor | None,
) -> None:
    count = len(prompts)
    if isinstance(prompts, str) or not count or len(seeds) != count:
        raise SettingError(f"{count} prompts and {len(seeds)} seeds: give a list of each, one seed per picture.")
    if start is not None and (start.ndim != 4 or start.shape[0] != count):
        raise SettingError(f"The starting noise has the shape {tuple(start.shape)}; expected ({count}, C, H, W).")
    if batch < 1:
        raise SettingError(f"A batch has at least one picture, not {batch}.")
    if through is not None and not 1 <= through <= steps:
        raise SettingError(f"Gradients can pass through 1 to {steps} of {steps} steps, not {through}.")
    if not rewards:
        raise SettingError("There is no reward to optimise the noise for: give at least one.")
    named = [reward.name for reward in rewards]
    if len(set(named)) < len(named):
        raise SettingError(f"Two rewards have the same name: {', '.join(named)}.")
    for reward in rewards:
        if not math.isfinite(reward.weight):
            raise SettingError(f"The weight of the reward {reward.name!r} is {reward.weight}; expected a number.")
        if reward.targets is not None and len(reward.targets) != count:
            raise SettingError(f"The reward {reward.name!r} has {len(reward.targets)} targets for {count} pictures.")
        if reward.pixels and not hasattr(denoiser, "decode_with_gradient"):
            raise SettingError(
                f"The reward {reward.name!r} looks at pixels, but gradients do not pass through the decoder of "
                f"{type(denoiser).__name__}: use a reward on latents."
            )
