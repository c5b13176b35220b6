"""A small deterministic DDIM sampler (Song et al. 2010.02502, eta 0) with classifier-free guidance, on any Denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser, NoiseSchedule, Steers, steers_of_rows
from .errors import ConceptSteerError

Keep = Callable[[int, float, Tensor], None]
Progress = Callable[[int, int], None]


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """A picture's starting noise, fp32 on the CPU, from its own generator: no batch split or device changes it."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(int(seed)), dtype=torch.float32)


def timesteps(schedule: NoiseSchedule, steps: int) -> list[float]:
    """`steps` training timesteps from T-1 (pure noise) downwards, evenly spaced towards 0, which is left out."""
    if steps < 1:
        raise ValueError(f"Sampling needs at least one step, not {steps}.")
    return torch.linspace(schedule.train_timesteps - 1, 0, steps + 1, dtype=torch.float64)[:-1].round().tolist()


def ddim_step(schedule: NoiseSchedule, x: Tensor, prediction: Tensor, t: float, t_next: float | None) -> Tensor:
    """x at t (fp32) -> x at t_next; None is the finished picture (Song et al. eq. 12 with eta 0)."""
    x0 = schedule.to_x0(x, prediction, t)
    return schedule.add_noise(x0, schedule.to_epsilon(x, prediction, t), t_next)


def encode_rows(denoiser: Denoiser, prompts: Sequence[str]) -> Conditioning:
    """One row per prompt; every different prompt is encoded once."""
    different = list(dict.fromkeys(prompts))
    cond = denoiser.encode_text(different)
    index = torch.tensor([different.index(prompt) for prompt in prompts], device=cond.embeds.device)
    return cond[index]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 5.0,
    negative: str = "",
    steers: Steers = (),
    batch: int = 16,
    start_latents: Tensor | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (N, C, H, W), fp32, one picture per prompt and seed.

    steers: one list for all pictures, or one list per picture. guidance 1 leaves the unconditional rows out.
    start_latents: (N, C, H, W) noise to start from instead of the seeds' (any size). `batch` counts pictures.
    keep(step, t, x) sees the noisy latents of each batch before each step; progress(done, total) counts steps.
    """
    count = len(prompts)
    if len(seeds) != count:
        raise ConceptSteerError(f"{count} prompts but {len(seeds)} seeds: give one seed per picture.")
    if start_latents is not None and start_latents.shape[0] != count:
        raise ConceptSteerError(f"{count} prompts but {start_latents.shape[0]} starting latents.")
    if batch < 1:
        raise ValueError(f"A batch has at least one picture, not {batch}.")
    if count == 0:
        return torch.empty(0, *denoiser.latent_shape)
    per_picture = steers_of_rows(steers, count)
    cond = encode_rows(denoiser, prompts)
    uncond = denoiser.encode_text([negative]) if guidance != 1 else None
    times = timesteps(denoiser.schedule, steps)
    total = steps * ((count + batch - 1) // batch)
    done = 0
    finished = []
    for first in range(0, count, batch):
        rows = slice(first, min(first + batch, count))
        size = rows.stop - first
        if start_latents is None:
            x = torch.stack([noise(seed, denoiser.latent_shape) for seed in seeds[rows]])
        else:
            x = start_latents[rows].float()
        x = x.to(denoiser.device)
        mine: Steers = per_picture[rows]
        batch_cond = cond[rows]
        if uncond is not None:
            batch_cond = Conditioning.cat([uncond.expand(size), batch_cond])
            mine = [*mine, *mine]
        mine = mine if any(mine) else ()
        is_cond = [False] * (len(batch_cond) - size) + [True] * size
        for step, t in enumerate(times):
            if keep is not None:
                keep(step, t, x)
            inputs = x.to(denoiser.dtype)
            inputs = torch.cat([inputs, inputs]) if uncond is not None else inputs
            prediction = denoiser.predict(inputs, t, batch_cond, mine, is_cond).float()
            if uncond is not None:
                free, text = prediction.chunk(2)
                prediction = free + guidance * (text - free)
            x = ddim_step(denoiser.schedule, x, prediction, t, times[step + 1] if step + 1 < steps else None)
            done += 1
            if progress is not None:
                progress(done, total)
        finished.append(x)
    return torch.cat(finished)
