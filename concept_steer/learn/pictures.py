"""A personal concept from a handful of pictures: the published loss of Li et al. (2311.17216, sec. 3) on real pictures.

c* = argmin_c E ||eps - eps_theta(x_t, prompt; h + c)||^2 over the pictures x_0, noises eps and timesteps t. A few
pictures make this a noisy loss, so: noises come in pairs eps and -eps, every batch spans the timesteps evenly, every
timestep counts the same (its error without a vector is 1), and Adam starts at the training-free difference: mean h of
the noised pictures - mean h of noised reference pictures, which are `without` or else drawn for the prompt.

Pictures without the concept (`without`) are a contrast, so that what both batches share (style, background, the
distance between photographs and the model's own pictures) is not learned: the pictures get h + s + c/2, those without
h + s - c/2, and both errors are minimised over c and s. s takes what is shared and is thrown away; c leads from the
pictures without to those with the concept. (The two signs as in the picture sliders of Gandikota et al. 2311.12092.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..sampling import noise, sample
from ..vector import ConceptVector
from .checkpoint import Bill, open_checkpoint
from .descent import Problem, Progress, Start, check_start, descend, first_vector
from .items import even_weight
from .memory import with_memory_advice
from .noised import Noised, Views, balanced_batches, batches_of, build_noised, noisy_times
from .picture_sets import about, checked_sets, held_out
from .result import LearnResult, encode, rms, separation_of, vector_of
from .walk import too_early

DRAWN, DRAW_STEPS = 8, 20  # reference pictures at least, where none are given, and DDIM steps for each
ENCODED_AT_ONCE = 4
NOISES = 100_000  # seeds from here on, so that no drawn picture starts from the noise that is added to it later


@dataclass
class _Problem(Problem):
    """side (n, 1, 1, 1): how much of c an item gets. c may also be a stack (2, ...): c and what both batches share."""

    side: Tensor

    def shift(self, c: Tensor, index: list[int]) -> Tensor:
        own = self.side[index].to(c.device) * super().shift(_own(c), index)
        return own if _own(c) is c else own + super().shift(c[1], index)


def _own(c: Tensor) -> Tensor:
    """c itself of what may be a stack."""
    return c if c.ndim in (1, 3) else c[0]


@dataclass
class _Work:
    """Counts batches for `caching`, and ends the work when `stop` says so."""

    caching: Callable[[int, int], None] | None
    stop: Callable[[], bool] | None
    total: int = 0
    done: int = 0

    def __call__(self, *_: object) -> None:
        if self.stop is not None and self.stop():
            raise too_early()
        self.done += 1
        if self.caching is not None:
            self.caching(self.done, self.total)


@with_memory_advice
def learn_pictures(
    denoiser: Denoiser,
    pixels: Tensor,
    prompt: str,
    *,
    without: Tensor | None = None,
    latents: bool = False,
    steps: int = 100,
    batch: int = 16,
    rate: float = 0.2,
    noises: int = 16,
    guidance: float = 1.0,
    spatial: bool = False,
    start: Start = "difference",
    holdout: float = 0.25,
    patience: int = 6,
    seed: int = 0,
    title: str = "",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LearnResult:
    """A vector (C,), or (C, H, W) with spatial, from 5 to 20 pictures (at least 2) and a prompt that fits them all.

    pixels: (N, 3, H, W) in [-1, 1], any size the model takes; without: the same for pictures that lack the concept but
    are like the others in all else. latents: both are scaled latents already. prompt: the class word, e.g. "a cat".
    noises: noisy versions of each picture, kept in memory (SD1 at 512 pixels: 13 MB each on the CPU). guidance: of the
    reference pictures that are drawn when there is no `without`. rate: Adam's, in units of the difference of h between
    pictures and reference pictures. start, holdout (share of the pictures, of both batches), patience,
    checkpoint, progress, caching and stop as in `learn_score`.

    explained: the share by which the vector lowers the held-out pictures' error against the noise; never near 1, since
    no model can name all of the noise. With `without`, beyond what both batches share: there even 0.01 can be a strong
    vector. None when the model gives NaN by then.
    separation: AUC of <h, v> between held-out pictures and held-out reference pictures at the same timesteps.
    Cost with the defaults, 12 pictures: about 1,700 UNet rows forward, 1,600 rows backward through the decoder.
    Works under torch.inference_mode when the model was loaded outside of it.
    Errors: LearnError (pictures that cannot be used, nothing learned, stopped too early), FamilyMismatch.
    """
    bill = Bill(denoiser)
    prompt = prompt.strip()
    if not prompt:
        raise LearnError("The prompt is empty: name what all the pictures show, for example 'a cat' or 'a person'.")
    if steps < 1 or batch < 1 or noises < 2 or not 0 < holdout < 1 or rate <= 0:
        raise LearnError("steps and batch start at 1, noises at 2, holdout lies between 0 and 1, rate above 0.")
    check_start(start, denoiser)
    sets = checked_sets(denoiser, pixels, without, latents)
    saved = open_checkpoint(
        checkpoint,
        denoiser,
        bill,
        "pictures",
        pictures=sets,
        prompt=prompt,
        latents=latents,
        steps=steps,
        batch=batch,
        rate=rate,
        noises=noises,
        guidance=guidance,
        spatial=spatial,
        start=start,
        holdout=holdout,
        patience=patience,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    held = [held_out(len(part), holdout, generator) for part in sets]
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        items, concept, reference = _material(
            denoiser, sets, held, prompt, noises // 2, guidance, latents, seed, batch, _Work(caching, stop)
        )
        problem = _problem(denoiser, items, len(sets[0]), batch)
        train = torch.nonzero(~items.held_out).flatten()
        judge = torch.nonzero(items.held_out).flatten().tolist()
        mean = concept.mean() - reference.mean()
        first = first_vector(start, mean, problem, train, spatial, generator)
        learned = [torch.nonzero(~mask).flatten() for mask in held]
        if without is not None:
            first = torch.stack([first, torch.zeros_like(first)])
            learned[1] += len(sets[0])

        def show(step: int, steps: int, loss: float, c: Tensor) -> None:
            if progress is not None:
                progress(step, steps, loss, ConceptVector(_own(c), denoiser.family, title=title or prompt))

        descent = descend(
            problem,
            first,
            _spread(concept.h if spatial else concept.h.mean((2, 3))),
            balanced_batches(items, learned, batch, generator),
            judge,
            steps=steps,
            rate=rate,
            patience=patience,
            show=show,
            stop=stop,
            checkpoint=saved,
        )
        c = _own(descent.best.c)
        described: dict[str, Any] = {**about(sets)}
        if saved is not None and descent.ending.over:
            saved.remove()
        vector = vector_of(
            denoiser,
            c.cpu(),
            title or prompt,
            "on held-out pictures no vector tried came nearer to the noise than no vector at all. Give more pictures, "
            "or pictures that have more in common, or name better in the prompt what they all show.",
            method="pictures",
            prompt=prompt,
            **described,
            steps=len(descent.losses),
            seed=seed,
            calibration=rms(concept.h),
        )
        explained = 1 - descent.best.loss / _error_without(descent.best.c, problem, judge)
        groups = [(concept.held(bucket), reference.held(bucket)) for bucket in items.bucket.unique()]
        separation = separation_of(groups, c.cpu())
    spent = bill.cost
    return LearnResult(
        vector=vector,
        method="pictures",
        losses=descent.losses,
        separation=separation,
        explained=explained if math.isfinite(explained) else None,
        unet_rows=spent.unet_rows,
        backward_rows=spent.backward_rows,
        seconds=bill.seconds,
        stopped=descent.stopped,
        held_out=descent.best.held_out,
    )


def _error_without(c: Tensor, problem: _Problem, judge: list[int]) -> float:
    """The held-out error without c itself: 1, or what the part of a stack that both batches share leaves of that."""
    if _own(c) is c:
        return 1.0
    shared = c.clone()
    shared[0] = 0
    return problem.evaluate(shared, judge)


def _spread(h: Tensor) -> float:
    """How far h (n, ...) differs from one noised picture to the next (RMS per value of c)."""
    return rms(h - h.mean(0)) or rms(h)


def _material(
    denoiser: Denoiser,
    sets: list[Tensor],
    held: list[Tensor],
    prompt: str,
    count: int,
    guidance: float,
    latents: bool,
    seed: int,
    batch: int,
    work: _Work,
) -> tuple[Noised, Views, Views]:
    """The noised pictures of all sets, and h of the pictures and of the reference pictures. count: of timesteps."""
    times = noisy_times(denoiser.schedule, count)
    pictures, drawn = sum(len(part) for part in sets), max(DRAWN, len(sets[0])) if len(sets) == 1 else 0
    work.total = sum(batches_of(n * count * 2, batch) for n in (pictures, drawn)) + DRAW_STEPS * batches_of(
        drawn, batch
    )
    clean = sets
    if not latents:
        work.total += sum(batches_of(len(part), ENCODED_AT_ONCE) for part in sets)
        clean = [_encoded(denoiser, part, work) for part in sets]
    cond = encode(denoiser, [prompt])[prompt]

    def noised(x0: Tensor, numbers: list[int], held_out: Tensor, only_h: bool = False) -> Noised:
        return build_noised(
            denoiser,
            x0,
            cond,
            numbers=numbers,
            held_out=held_out,
            times=times,
            seed=seed + NOISES,
            batch=batch,
            advance=work,
            only_h=only_h,
        )

    items = noised(torch.cat(clean), [i for part in sets for i in range(len(part))], torch.cat(held))
    mine = items.picture < len(sets[0])
    if not drawn:
        return items, Views.of(items, mine), Views.of(items, ~mine)
    seeds = range(seed, seed + drawn)
    own = sample(
        denoiser,
        [prompt] * drawn,
        seeds=seeds,
        steps=DRAW_STEPS,
        guidance=guidance,
        batch=batch,
        start_latents=torch.stack([noise(s, clean[0].shape[1:]) for s in seeds]),
        progress=work,
    )
    others = torch.arange(drawn) % 4 == 3  # held out: a quarter
    reference = noised(own, list(range(drawn)), others, only_h=True)
    return items, Views.of(items, mine), Views.of(reference, reference.picture >= 0)


def _encoded(denoiser: Denoiser, pixels: Tensor, work: _Work) -> Tensor:
    found = []
    for part in pixels.split(ENCODED_AT_ONCE):
        found.append(denoiser.encode_pictures(part.to(denoiser.device)).float())
        work()
    return torch.cat(found)


def _problem(denoiser: Denoiser, items: Noised, count: int, batch: int) -> _Problem:
    """count: of the pictures with the concept, which come first."""
    mine = items.picture < count
    weight = even_weight(items.error, items.bucket, items.held_out, mine)
    if not bool(torch.isfinite(weight).all()):
        raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
    side = mine.float() - 0.5 if bool((~mine).any()) else torch.ones(len(mine))
    return _Problem(denoiser, items, items.target, weight, batch, side.view(-1, 1, 1, 1))
