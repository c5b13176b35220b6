"""The published recipe: self-discovered concept vectors (Li et al. 2311.17216, sec. 3.2), with the paper's numbers.

Pictures x_0 of the positive prompt are drawn, and then
c* = argmin_c E ||eps - eps_theta(x_t, t, neutral; h + c)||^2 over these pictures, fresh noises eps and timesteps t
drawn evenly from 0..T-1: what the neutral prompt does not say about the pictures, c has to. Adam with a constant rate,
one c (C, H, W) for all timesteps. The slow baseline that everyone knows; `learn_score` is the quick way.

Since noises are fresh, nothing of the encoder half can be kept; but c enters behind it, so the gradient is exact with
the encoder half run without one and only the decoder half differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, HState
from ..errors import LearnError
from ..sampling import sample
from ..vector import ConceptVector
from .checkpoint import Bill, Checkpoint, open_checkpoint
from .descent import Progress
from .memory import with_memory_advice
from .result import LearnResult, Pairs, checked_pairs, encode, finished_vector, rms, rows
from .timestep_groups import shift_of
from .walk import Ending, Walk, too_early, walk

BETAS = (0.9, 0.999)  # Adam's own
SAVE_EVERY = 25  # steps
LATENTS = "latents"  # the part of a checkpoint that keeps the pictures
SEEDS = 2**48  # drawn from 0 to here, so that two runs share none of their pictures and noises


@dataclass(frozen=True)
class _Recipe:
    """Pictures x0 (N, C, H, W), fp32 on the CPU, the number of each one's pair, pair (N,), and the pairs' neutral
    prompts."""

    denoiser: Denoiser
    x0: Tensor
    pair: Tensor
    neutral: Conditioning

    @torch.no_grad()
    def noised(self, pictures: Tensor, seed: int) -> tuple[HState, Tensor]:
        """The encoder half of some pictures at random times with random noise, and the prediction that names it."""
        schedule, device = self.denoiser.schedule, self.denoiser.device
        generator = torch.Generator().manual_seed(seed)
        clean = self.x0[pictures]
        t = torch.randint(schedule.train_timesteps, (len(pictures),), generator=generator)
        added = torch.randn(clean.shape, generator=generator)
        x = schedule.add_noise(clean, added, t).to(device, self.denoiser.dtype)
        cond = self.neutral[self.pair[pictures].to(self.neutral.embeds.device)]
        return self.denoiser.to_h(x, t, cond), schedule.prediction_of(clean, added, t).to(device)

    def loss(self, c: Tensor, pictures: Tensor, seed: int) -> Tensor:
        """||eps - eps_theta(x_t, t, neutral; h + c)||^2, the mean over values and pictures, fp32."""
        state, target = self.noised(pictures, seed)
        h = (state.h.float() + shift_of(c)).to(self.denoiser.dtype)
        return (self.denoiser.from_h(state.with_h(h)).float() - target).square().mean()


@with_memory_advice
def learn_self_discovery(
    denoiser: Denoiser,
    pairs: Pairs,
    *,
    pictures: int = 1000,
    picture_steps: int = 30,
    guidance: float = 7.5,
    epochs: int = 20,
    batch: int = 8,
    rate: float = 0.1,
    spatial: bool = True,
    latents: Tensor | None = None,
    seed: int = 0,
    title: str = "",
    negative: str = "",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LearnResult:
    """A vector (C, H, W), or (C,) without spatial, from pairs of (neutral, positive) prompts, as in the paper.

    pictures: drawn of the positive prompts, in turn, with picture_steps DDIM steps and `guidance`; each is learned from
    under its own neutral prompt. negative: a negative prompt for those pictures; with it the two prompts may be equal
    (the paper's safety concepts). latents: (N, C, H, W) scaled latents of real pictures instead, shared among the pairs
    in turn; the positive prompt is then no more than the title. rate: Adam's, in units of h, constant.
    checkpoint: written after every batch of pictures (a second file beside it holds them) and every 25 steps.
    caching(done, total) is called while pictures are drawn, progress(step, steps, loss, vector) after each step;
    stop() True ends learning with what was learned so far. There are no held-out checks: separation and explained of
    the result are None. Cost with the defaults: 60,000 UNet rows for the pictures, 20,000 forward and backward.
    Errors: LearnError (settings or latents out of range, NaN, stopped too early, out of memory).
    """
    bill = Bill(denoiser)
    prompts = checked_pairs(pairs, equal=bool(negative) or latents is not None)
    _check(denoiser, pictures, picture_steps, guidance, epochs, batch, rate, negative, latents)
    saved = open_checkpoint(
        checkpoint,
        denoiser,
        bill,
        "self_discovery",
        pairs=prompts,
        pictures=pictures,
        picture_steps=picture_steps,
        guidance=guidance,
        epochs=epochs,
        batch=batch,
        rate=rate,
        spatial=spatial,
        latents=latents,
        seed=seed,
        negative=negative,
    )
    generator = torch.Generator().manual_seed(seed)
    count = pictures if latents is None else len(latents)
    seeds = torch.randint(SEEDS, (count,), generator=generator).tolist()
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        if latents is None:
            wanted = [prompts[i % len(prompts)][1] for i in range(count)]
            settings = {"steps": picture_steps, "guidance": guidance, "negative": negative}
            x0 = _pictures(denoiser, wanted, seeds, batch, saved, caching, stop, settings)
        else:
            x0 = latents.detach().to("cpu", torch.float32).clone()
        if not bool(torch.isfinite(x0).all()):
            raise LearnError("The pictures to learn from hold values that are not finite (NaN). Try dtype float32.")
        encoded = encode(denoiser, [neutral for neutral, _ in prompts])
        recipe = _Recipe(
            denoiser, x0, torch.arange(count) % len(prompts), rows(encoded, [neutral for neutral, _ in prompts])
        )
        order = [part for _ in range(epochs) for part in torch.randperm(count, generator=generator).split(batch)]
        noises = torch.randint(SEEDS, (len(order) + 1,), generator=generator).tolist()
        h = recipe.noised(order[0], noises[-1])[0].h
        first = torch.zeros(h.shape[1:] if spatial else h.shape[1:2], device=denoiser.device)
        run, ending = _descend(recipe, first, order, noises, rate, saved, progress, stop, title or prompts[0][1])
        if saved is not None and ending.over:
            saved.remove(LATENTS)
        vector = finished_vector(
            denoiser,
            (run.last_good if ending.spoiled else run.c).cpu(),
            prompts,
            title,
            method="self_discovery",
            pictures=count,
            negative=negative,
            steps=len(run.losses),
            seed=seed,
            calibration=rms(h),
        )
    spent = bill.cost
    return LearnResult(
        vector=vector,
        method="self_discovery",
        losses=run.losses,
        separation=None,
        explained=None,
        unet_rows=spent.unet_rows,
        backward_rows=spent.backward_rows,
        seconds=bill.seconds,
        stopped=ending.stopped,
    )


def _descend(
    recipe: _Recipe,
    first: Tensor,
    order: list[Tensor],
    noises: list[int],
    rate: float,
    saved: Checkpoint | None,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
    title: str,
) -> tuple[Walk, Ending]:
    """Adam from `first` over the batches of `order`, each with the noise of its own seed."""
    denoiser = recipe.denoiser
    run = Walk(denoiser, first, 1.0, BETAS)
    state = None if saved is None else saved.read()
    if state is not None:
        run.restore(state)

    def step(i: int) -> bool:
        found = run.step(lambda c: recipe.loss(c, order[i], noises[i]), len(order[i]), rate, None)
        if not found and not run.losses:
            raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
        return found

    def save() -> None:
        if saved is not None:
            state = run.state()
            saved.write(state.tensors, state.numbers)

    def after(done: int) -> None:
        if done % SAVE_EVERY == 0:
            save()

    def show(done: int, steps: int, loss: float, c: Tensor) -> None:
        if progress is not None:
            progress(done, steps, loss, ConceptVector(c, denoiser.family, title=title))

    kept = "what was learned so far"
    return run, walk(run, len(order), step=step, after=after, save=save, show=show, stop=stop, kept=kept)


def _pictures(
    denoiser: Denoiser,
    prompts: list[str],
    seeds: list[int],
    batch: int,
    saved: Checkpoint | None,
    caching: Callable[[int, int], None] | None,
    stop: Callable[[], bool] | None,
    settings: dict[str, Any],
) -> Tensor:
    """(N, C, H, W), fp32 on the CPU: one picture per prompt and seed; those of the checkpoint are not drawn again."""
    steps = int(settings["steps"])
    total = steps * ((len(prompts) + batch - 1) // batch)
    state = None if saved is None else saved.read(LATENTS)
    done = [] if state is None else list(state.tensors["latents"].split(batch))
    while len(done) * batch < len(prompts):
        part = slice(len(done) * batch, (len(done) + 1) * batch)

        def advance(step: int, _: int) -> None:
            if stop is not None and stop():
                raise too_early()
            if caching is not None:
                caching(len(done) * steps + step, total)

        found = sample(denoiser, prompts[part], seeds=seeds[part], batch=batch, progress=advance, **settings)
        done.append(found.cpu())
        if saved is not None:
            saved.write({"latents": torch.cat(done)}, {}, LATENTS)
    return torch.cat(done)


def _check(
    denoiser: Denoiser,
    pictures: int,
    picture_steps: int,
    guidance: float,
    epochs: int,
    batch: int,
    rate: float,
    negative: str,
    latents: Tensor | None,
) -> None:
    if min(pictures, picture_steps, epochs, batch) < 1 or not rate > 0:
        raise LearnError("pictures, picture_steps, epochs and batch start at 1, rate above 0.")
    if negative and (latents is not None or guidance == 1):
        why = "ready latents are not drawn" if latents is not None else "at guidance 1 it changes nothing"
        raise LearnError(f"The negative prompt {negative!r} is for the pictures that are drawn, but {why}.")
    if latents is None:
        return
    channels = denoiser.latent_shape[0]
    if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape or not latents.is_floating_point():
        raise LearnError(
            f"The latents are {tuple(latents.shape)} of {latents.dtype}; expected scaled latents (N, {channels}, H, W) "
            "as floats, at least one."
        )
