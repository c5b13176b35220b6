"""A small deterministic DDIM sampler (Song et al. 2010.02502, eta 0) with classifier-free guidance, on any Denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser, NoiseSchedule, Steers, steers_of_rows
from .errors import ConceptSteerError
from .steering import Steer

Keep = Callable[[int, float, Tensor], None]
Progress = Callable[[int, int], None]


class GuideRun(Protocol):
    """One batch of B pictures under a guidance method, from its first step to its last; holds what runs along."""

    @property
    def prompts(self) -> Sequence[Sequence[str]]:
        """Texts to predict beside each picture's own: K lists of B. Each list is one more UNet row per picture."""
        ...

    def needs(self, step: int) -> bool:
        """Whether the K further predictions are wanted at this step; False saves their rows."""
        ...

    def combine(self, step: int, t: float, uncond: Tensor, cond: Tensor, extra: Tensor | None) -> Tensor:
        """The prediction to go on with. uncond, cond: (B, C, H, W); extra: (K, B, C, H, W), None if not needed; fp32.

        All are predictions of the noise, whatever the model itself predicts. Called once a step, in order.
        """
        ...


class GatedRun(GuideRun, Protocol):
    """One that acts on some of the pictures only: the others keep the bits of plain guidance, and cost no row.

    `needs` and `combine` are asked at steps at which it acts; `combine` gets all pictures, with `extra` equal to
    `uncond` (at guidance 1: all three equal) where it does not act.
    """

    def acting(self) -> Sequence[bool]:
        """For each of the B pictures, once its prompt has been predicted at a step, whether the method acts on it."""
        ...


class Guide(Protocol):
    """A guidance method in place of plain classifier-free guidance (SEGA, Safe Latent Diffusion, ...)."""

    def begin(self, pictures: range, steps: int, guidance: float) -> GuideRun:
        """A fresh state for one batch: `pictures` are the numbers of its pictures in the whole call of `sample`.

        A GatedRun where the method has the attribute `gated`, which is true then.
        """
        ...


class WatchRun(Protocol):
    """One batch of B pictures that is looked at while it is drawn."""

    def look(self, step: int, t: float, clean: Callable[[], Tensor]) -> None:
        """Called once a step. clean(): what the pictures are about to become, (B, C, H, W) scaled latents, fp32.

        It comes from the step's prediction after guidance; what a gated guide does at this step is not in it yet.
        """
        ...

    def stopped(self) -> Sequence[bool]:
        """For each of the B pictures, whether it is given up."""
        ...

    def steers(self) -> Sequence[Sequence[Steer]]:
        """For each of the B pictures, what acts on it beside its own steers from the next step on."""
        ...


class Watch(Protocol):
    """Looks at what pictures are about to become while they are drawn (a check in the latent, ...)."""

    def begin(self, pictures: range, steps: int) -> WatchRun:
        """A fresh state for one batch: `pictures` are the numbers of its pictures in the whole call of `sample`."""
        ...


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
    guide: Guide | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Latents (N, C, H, W), fp32, one picture per prompt and seed.

    steers: one list for all pictures, or one list per picture. guidance 1 leaves the unconditional rows out.
    start_latents: (N, C, H, W) noise to start from instead of the seeds' (any size). `batch` counts pictures.
    keep(step, t, x) sees the noisy latents of each batch before each step; progress(done, total) counts steps.
    guide: combines the predictions instead of plain guidance; it gets the unconditional rows also at guidance 1, and
    the rows of its own texts, which no steer touches. A gated one's rows are predicted after the pictures' own, in a
    call of theirs, so that the other pictures' batch is as it would be without.
    watch: looks at every step's estimate of the finished pictures. One that it gives up comes back as zeros; a batch
    ends early when none of it is left (a smaller batch would change the last bits of the others).
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
    gated = bool(getattr(guide, "gated", False))
    unguided = denoiser.encode_text([negative]) if guidance != 1 or guide is not None else None
    uncond = None if guidance == 1 and gated else unguided
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
        mine = _rows_of(per_picture[rows], uncond is not None)
        batch_cond = cond[rows]
        if uncond is not None:
            batch_cond = Conditioning.cat([uncond.expand(size), batch_cond])
        is_cond = [False] * (len(batch_cond) - size) + [True] * size
        run = None if guide is None else guide.begin(range(rows.start, rows.stop), steps, guidance)
        further = None if run is None else _further_rows(denoiser, run, size)
        watching = None if watch is None else watch.begin(range(rows.start, rows.stop), steps)
        for step, t in enumerate(times):
            if keep is not None:
                keep(step, t, x)
            inputs = x.to(denoiser.dtype)
            inputs = torch.cat([inputs, inputs]) if uncond is not None else inputs
            if run is not None and not gated:
                own = prediction = _guided(denoiser, run, step, t, inputs, batch_cond, further, mine, is_cond)
            else:
                own = prediction = denoiser.predict(inputs, t, batch_cond, mine, is_cond).float()
                if uncond is not None:
                    free, text = own.chunk(2)
                    prediction = free + guidance * (text - free)
            if watching is not None:
                watching.look(step, t, partial(denoiser.schedule.to_x0, x, prediction, t))
                if all(watching.stopped()):
                    break
                acting = zip(per_picture[rows], watching.steers(), strict=True)
                mine = _rows_of([(*mine_only, *more) for mine_only, more in acting], uncond is not None)
            if run is not None and gated and unguided is not None:
                prediction = _where_open(denoiser, run, step, t, x, own, unguided, further, prediction)
            x = ddim_step(denoiser.schedule, x, prediction, t, times[step + 1] if step + 1 < steps else None)
            done += 1
            if progress is not None:
                progress(done, total)
        if watching is not None and any(watching.stopped()):
            x = x.masked_fill(torch.tensor(watching.stopped(), device=x.device).view(-1, 1, 1, 1), 0.0)
        done = steps * (first // batch + 1)
        finished.append(x)
    return torch.cat(finished)


def _rows_of(per_picture: Sequence[Sequence[Steer]], twice: bool) -> Steers:
    """Of each row of a batch (twice: the unconditional ones before the pictures' own); empty when nothing acts."""
    rows = [tuple(steers) for steers in per_picture] * (2 if twice else 1)
    return rows if any(rows) else ()


def _further_rows(denoiser: Denoiser, run: GuideRun, size: int) -> Conditioning | None:
    """The guide's own texts as K * size rows; None when it has none."""
    texts = [text for group in run.prompts for text in group]
    if len(texts) != size * len(run.prompts):
        raise ConceptSteerError(f"A guide must name one text per picture ({size}) in each of its lists of prompts.")
    return encode_rows(denoiser, texts) if texts else None


def _guided(
    denoiser: Denoiser,
    run: GuideRun,
    step: int,
    t: float,
    inputs: Tensor,
    cond: Conditioning,
    further: Conditioning | None,
    steers: Steers,
    is_cond: list[bool],
) -> Tensor:
    """One step's prediction by a guide. inputs, cond: the unconditional rows and then the pictures' own."""
    size, count = inputs.shape[0] // 2, 0
    if further is not None and run.needs(step):
        count = len(further) // size
        inputs = torch.cat([inputs, inputs[:size].repeat(count, 1, 1, 1)])
        cond = Conditioning.cat([cond, further])
        steers = [*steers_of_rows(steers, 2 * size), *[()] * (count * size)] if steers else ()
        is_cond = [*is_cond, *[True] * (count * size)]
    predicted = denoiser.predict(inputs, t, cond, steers, is_cond).float()
    rows = denoiser.schedule.to_epsilon(inputs, predicted, t)
    extra = rows[2 * size :].unflatten(0, (count, size)) if count else None
    guided = run.combine(step, t, rows[:size], rows[size : 2 * size], extra)
    return _as_predicted(denoiser.schedule, guided, rows[:size], predicted[:size], t)


def _as_predicted(
    schedule: NoiseSchedule, noise: Tensor, from_noise: Tensor, from_prediction: Tensor, t: float
) -> Tensor:
    """A noise as what the model predicts, given another noise and the prediction that stands for it."""
    if schedule.prediction_type == "epsilon":
        return noise
    alpha, _ = schedule.signal(t, noise)
    return from_prediction + (noise - from_noise) / alpha.clamp(min=1e-4)  # v moves by 1 / alpha of the noise's move


def _where_open(
    denoiser: Denoiser,
    run: GuideRun,
    step: int,
    t: float,
    x: Tensor,
    own: Tensor,
    uncond: Conditioning,
    further: Conditioning | None,
    plain: Tensor,
) -> Tensor:
    """`plain` (B, C, H, W) with a gated guide's prediction for the pictures that it acts on.

    own: predictions of the unconditional rows, left out at guidance 1, and of the pictures' own.
    """
    size = x.shape[0]
    rows = [i for i, acts in enumerate(cast(GatedRun, run).acting()) if acts]
    if not rows:
        return plain
    index = torch.tensor(rows, device=x.device)
    noise = denoiser.schedule.to_epsilon(x.repeat(own.shape[0] // size, 1, 1, 1), own, t)
    cond = noise[-size:]
    texts = [] if own.shape[0] > size else [uncond.expand(len(rows))]
    count = len(further) // size if further is not None and run.needs(step) else 0
    texts += [further[group * size + index] for group in range(count)] if further is not None else []
    found = []
    if texts:
        inputs = x[index].to(denoiser.dtype).repeat(len(texts), 1, 1, 1)
        predicted = denoiser.predict(inputs, t, Conditioning.cat(texts)).float()
        found = list(denoiser.schedule.to_epsilon(inputs, predicted, t).chunk(len(texts)))
    free = noise[:size] if own.shape[0] > size else cond.index_copy(0, index, found.pop(0))
    extra = torch.stack([free.index_copy(0, index, one) for one in found]) if count else None
    guided = run.combine(step, t, free, cond, extra)
    moved = _as_predicted(denoiser.schedule, guided, cond, own[-size:], t)
    return plain.index_copy(0, index, moved[index])
