"""Learn a vector from the frozen model's own predictions (the target of RespoDiff, 2509.15257, eq. for L_R, cached).

c* = argmin_c E ||eps(x_t, neutral; h + c) - eps(x_t, positive)||^2 / E ||eps(x_t, neutral) - eps(x_t, positive)||^2.
The encoder half never changes, so it runs once; each step then costs the decoder half only, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..vector import ConceptVector
from .calibration import amplitude
from .checkpoint import Bill, open_checkpoint
from .descent import Descent, Problem, Progress, Start, check_start, descend, first_vector
from .disentangle import about_others, others_of
from .items import Cache, even_weight
from .memory import out_of_memory, with_memory_advice
from .result import FULL, LearnResult, Pairs, checked_pairs, finished_vector, rms, separation_of
from .timestep_groups import Groups, groups_of, shift_of
from .trajectories import SharedNeutral, build_cache

MAP = "map"  # the part of a checkpoint that keeps the learning of a map after a vector without places


@dataclass
class _Problem(Problem):
    """The target is the positive prompt's own prediction: 1 is no vector at all, 0 that very prediction.

    The loss asks also that nothing changes where keep (n, 1, H, W) is 1: there the positive prompt changes nothing.
    """

    neutral: Tensor  # (n, C, H, W)
    keep: Tensor
    preservation: float
    group: Tensor | None  # (n,): which of a stack of vectors an item gets

    def shift(self, c: Tensor, index: list[int]) -> Tensor:
        return shift_of(c, index, self.group)

    def loss(self, c: Tensor, index: list[int]) -> Tensor:
        prediction = self.predict(c, index)
        error = self.errors(prediction, index)
        if self.preservation > 0:
            change = self.keep[index].to(error.device) * (prediction - self.neutral[index].to(error.device))
            error = error + self.preservation * change.square().mean((1, 2, 3))
        return self.mean(error, index)


@with_memory_advice
def learn_score(
    denoiser: Denoiser,
    pairs: Pairs,
    *,
    steps: int = 50,
    batch: int = 16,
    rate: float = 0.1,
    trajectories: int = 32,
    sample_steps: int = 6,
    guidance: float = 5.0,
    preservation: float = 0.1,
    spatial: bool = False,
    map_below: float = FULL,
    calibrate: bool = True,
    timestep_groups: int = 1,
    against: Sequence[ConceptVector] = (),
    start: Start = "difference",
    holdout: float = 0.25,
    patience: int = 6,
    seed: int = 0,
    title: str = "",
    shared: SharedNeutral | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LearnResult:
    """A vector (C,) or (C, H, W) from pairs of (neutral, positive) prompts. Weights stay untouched.

    spatial: a map (C, H, W) at once. Else one value per channel is learned, and where that explains less than
    `map_below`, a map too, from the same cache (so no more forward rows but the checks'); what explains more is kept.
    0: never. What a person is needs no places; what sits somewhere, as a smile or a tool does, needs a map.
    rate: Adam's, in units of the change of h between the two prompts (so that one rate fits every model), falling to
    zero along a cosine. start: a vector, "difference" (of the cached h, the best of a few scales on training items), or
    "zero" (also None). holdout: share of the seeds kept for checks: ten times they are measured, the best vector is
    kept, and learning ends after `patience` checks without a better one. preservation: weight of "where the positive
    prompt changes nothing, nothing changes". calibrate: in the end the vector is lengthened until strength 1 takes the
    prediction as far as the prompt does (`explained` is measured before that).
    timestep_groups: above 1 a vector for each of so many groups of neighbouring sampling steps, together one that
    differs per timestep. against: other concepts' vectors that this one is to be orthogonal to (projected gradient).
    checkpoint: a file for the state of learning, written at every check; a run that was killed goes on there, to the
    same vector, and the file is gone when learning has ended. What the run cost before that is counted.
    shared: what concepts with the same neutral prompts and settings have in common, computed only once (`learn_many`).
    caching(done, total) is called while trajectories are drawn,
    progress(step, steps, loss, vector) after each step; stop() True ends learning with the best so far.
    Cost with the defaults: about 1,300 UNet rows forward, 800 rows backward through the decoder.
    Works under torch.inference_mode when the model was loaded outside of it.
    Errors: LearnError (no effect to learn, stopped too early, weights made inside inference_mode), FamilyMismatch.
    """
    bill = Bill(denoiser)
    prompts = checked_pairs(pairs)
    if steps < 1 or batch < 1 or sample_steps < 1 or not 0 < holdout < 1 or rate <= 0 or preservation < 0:
        raise LearnError("steps, batch and sample_steps start at 1, holdout lies between 0 and 1, rate above 0.")
    check_start(start, denoiser)
    groups = groups_of(denoiser.schedule, sample_steps, timestep_groups)
    saved = open_checkpoint(
        checkpoint,
        denoiser,
        bill,
        "score",
        pairs=prompts,
        steps=steps,
        batch=batch,
        rate=rate,
        trajectories=trajectories,
        sample_steps=sample_steps,
        guidance=guidance,
        preservation=preservation,
        spatial=spatial,
        map_below=map_below,
        timestep_groups=timestep_groups,
        against=against,
        start=start,
        holdout=holdout,
        patience=patience,
        seed=seed,
    )
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
            shared=shared,
        )
        neutral_h = cache.neutral_h()
        problem = _problem(denoiser, cache, batch, preservation, groups)
        train = torch.nonzero(~cache.held_out).flatten()
        judge = torch.nonzero(cache.held_out).flatten().tolist()
        mean = (cache.positive_h[train] - neutral_h[train]).mean(0)
        middles = () if groups is None else groups.middles

        def fit(spatial: bool, before: int = 0) -> Descent:
            """before: steps done for a vector without places."""
            generator = torch.Generator().manual_seed(seed)
            others = others_of(against, denoiser, mean.shape if spatial else mean.shape[:1])
            first = first_vector(start, mean, replace(problem, group=None), train, spatial, generator)
            first = first if others is None else others.without(first)
            if groups is not None:
                first = first.expand(len(middles), *first.shape).clone()

            def show(step: int, steps: int, loss: float, c: Tensor) -> None:
                if progress is not None:
                    vector = ConceptVector(c, denoiser.family, title=title or prompts[0][1], timesteps=middles)
                    progress(before + step, before + steps, loss, vector)

            return descend(
                problem,
                first,
                _unit(cache, neutral_h, spatial),
                _batches(train, batch, generator),
                judge,
                steps=steps,
                rate=rate,
                patience=patience,
                show=show,
                stop=stop,
                project=None if others is None else others.without,
                checkpoint=saved.part(MAP) if saved is not None and before else saved,
            )

        descent, without_map, stopped = _with_map_if_needed(fit, spatial, map_below, stop)
        best = descent.best
        length = 1.0
        if calibrate and bool(best.c.any()):
            some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: 4 * batch]]
            length = amplitude(denoiser, cache, best.c, problem.weight, some.tolist(), batch, problem.group)
        if saved is not None and descent.ending.over:
            saved.remove(MAP)
        vector = finished_vector(
            denoiser,
            best.c.cpu() * length,
            prompts,
            title,
            timesteps=middles,
            **about_others(against),
            calibration_length=length,
            method="score",
            steps=len(descent.losses),
            seed=seed,
            calibration=rms(neutral_h),
        )
    spent = bill.cost
    return LearnResult(
        vector=vector,
        method="score",
        losses=descent.losses,
        separation=_separation(cache, neutral_h, best.c.cpu(), groups),
        explained=1 - best.loss,
        unet_rows=spent.unet_rows,
        backward_rows=spent.backward_rows,
        seconds=bill.seconds,
        stopped=stopped,
        held_out=best.held_out,
        without_map=without_map,
    )


def _with_map_if_needed(
    fit: Callable[..., Descent], spatial: bool, map_below: float, stop: Callable[[], bool] | None
) -> tuple[Descent, float | None, str]:
    """What is kept, what one value per channel explained if a map took its place, and how it ended."""
    descent = fit(spatial)
    explained, ending = 1 - descent.best.loss, descent.ending
    if spatial or explained >= map_below or not ending.over or ending.spoiled:
        return descent, None, ending.stopped
    if stop is not None and stop():
        kept = replace(descent, ending=replace(ending, over=False))  # the map is tried when it goes on
        return kept, None, f"{ending.stopped}; stopped by request before a map was tried"
    try:
        other = fit(True, before=len(descent.losses))
    except (LearnError, RuntimeError, MemoryError) as error:  # what is learned already must not be lost
        if not isinstance(error, LearnError) and not out_of_memory(error):
            raise
        return descent, None, f"{ending.stopped}; a map was tried too, and given up ({error})"
    if other.best.loss >= descent.best.loss:
        kept = replace(descent, ending=replace(ending, over=other.ending.over))
        return kept, None, f"{ending.stopped}; a map was tried too ({other.stopped}) and explains no more"
    return other, explained, f"{other.stopped}, as a map"


def _problem(denoiser: Denoiser, cache: Cache, batch: int, preservation: float, groups: Groups | None) -> _Problem:
    effect = (cache.positive - cache.neutral).square().mean((1, 2, 3))
    if not bool(torch.isfinite(effect).all()):
        raise LearnError("The model's predictions are not finite (NaN) before anything was learned. Try float32.")
    weight = even_weight(effect, cache.bucket, cache.held_out)
    if not bool(torch.isfinite(weight).all()):
        raise LearnError("The positive prompt changes nothing in this model's predictions: there is nothing to learn.")
    change = (cache.positive - cache.neutral).abs().mean(1, keepdim=True)
    keep = 1 - change / change.amax((2, 3), keepdim=True).clamp_min(1e-20)
    group = None if groups is None else groups.of_step[cache.bucket]
    return _Problem(denoiser, cache, cache.positive, weight, batch, cache.neutral, keep, preservation, group)


def _separation(cache: Cache, neutral_h: Tensor, c: Tensor, groups: Groups | None) -> float | None:
    """On the held-out seeds, one timestep at a time, each with the vector that acts there."""
    found = []
    for bucket in cache.bucket.unique().tolist():
        members = cache.held_out & (cache.bucket == bucket)
        mine = c if groups is None else c[groups.of_step[bucket]]
        found.append(separation_of([(cache.positive_h[members], neutral_h[members])], mine))
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _unit(cache: Cache, neutral_h: Tensor, spatial: bool) -> float:
    """The size (RMS per value of c) of what the positive prompt itself changes in h; of h where it changes nothing."""
    change = cache.positive_h - neutral_h
    return rms(change if spatial else change.mean((2, 3))) or rms(neutral_h)


def _batches(train: Tensor, batch: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Every item once before any comes again, in an order drawn anew each time."""
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += train[torch.randperm(len(train), generator=generator)].tolist()
        yield order[:batch]
        order = order[batch:]
