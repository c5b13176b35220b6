"""What learning from predictions needs of the encoder, computed once.

Noisy latents of short trajectories and, for each, the HState under the neutral prompt and the frozen predictions under
both prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, HState
from ..errors import LearnError
from ..sampling import ddim_step, noise, timesteps
from .items import Cache, packed
from .result import encode, rows


@dataclass(frozen=True)
class _Plan:
    """Which trajectories there are: number i is of couple i // 2 and follows the neutral (even) or positive prompt.

    Its noise has the seed `seed` + i. Pairs take turns over the couples.
    """

    denoiser: Denoiser
    pairs: list[tuple[str, str]]
    encoded: dict[str, Conditioning]
    times: list[float]
    couples: int
    guidance: float
    seed: int
    batch: int

    def chunks(self, numbers: Sequence[int], rows_each: int) -> list[list[int]]:
        """So many trajectories at once that a step has up to `batch` rows."""
        size = max(1, self.batch // rows_each)
        return [list(numbers[first : first + size]) for first in range(0, len(numbers), size)]

    def start(self, members: list[int]) -> Tensor:
        x = torch.stack([noise(self.seed + i, self.denoiser.latent_shape) for i in members])
        return x.to(self.denoiser.device)

    def text(self, members: list[int], side: int) -> Conditioning:
        """The neutral (0) or positive (1) prompt of each."""
        return rows(self.encoded, [self.pairs[i // 2 % len(self.pairs)][side] for i in members])

    def empty(self, members: list[int], step: int) -> list[Conditioning]:
        """The empty prompt where the step to the next time asks for it."""
        last = step + 1 == len(self.times)
        return [] if last or self.guidance == 1 else [self.encoded[""].expand(len(members))]

    def evaluate(self, x: Tensor, step: int, conds: list[Conditioning]) -> tuple[HState, list[Tensor]]:
        """The same x under each of the prompts: all their states in one, and the prediction of each, fp32."""
        inputs = x.to(self.denoiser.dtype).repeat(len(conds), 1, 1, 1)
        state = self.denoiser.to_h(inputs, self.times[step], Conditioning.cat(conds))
        return state, list(self.denoiser.from_h(state).float().split(len(x)))

    def onwards(self, x: Tensor, step: int, prediction: Tensor, empty: Tensor | None) -> Tensor:
        """x at the next time; x itself at the last."""
        if step + 1 == len(self.times):
            return x
        if empty is not None:
            prediction = empty + self.guidance * (prediction - empty)
        return ddim_step(self.denoiser.schedule, x, prediction, self.times[step], self.times[step + 1])


@dataclass(frozen=True)
class _Point:
    """Some trajectories at one step: x, and what the frozen model makes of it under the neutral and empty prompts."""

    members: list[int]
    step: int
    x: Tensor
    state: HState
    neutral: Tensor
    empty: Tensor | None


@dataclass(frozen=True)
class _Part:
    """A point with what the positive prompt adds; all but the state on the CPU."""

    members: list[int]
    step: int
    state: HState
    neutral: Tensor
    positive: Tensor
    positive_h: Tensor


@dataclass
class _Watch:
    """Asks before each batch whether to stop, and tells of it afterwards."""

    stop: Callable[[], bool] | None
    told: Callable[[int, int], None] | None
    total: int = 0
    done: int = 0

    def before(self) -> None:
        if self.stop is not None and self.stop():
            raise LearnError("Learning was stopped before its first step, so there is no vector yet.")

    def after(self) -> None:
        self.done += 1
        if self.told is not None:
            self.told(self.done, self.total)


@dataclass
class SharedNeutral:
    """What concepts with the same neutral prompts and settings have in common, computed for the first, kept for all.

    Those are the trajectories of the neutral prompts with their states and predictions, and the first step of the
    others, which is pure noise. Only the last kind is kept (no more memory than a single concept needs): learn concepts
    that share in a row. saved_rows: UNet rows that were not computed again. The neutral and the positive prompts are
    batched apart, so a concept gets the same numbers whoever shares with it, and the same as without sharing up to the
    rounding of the model's number type.
    """

    denoiser: Denoiser
    saved_rows: float = 0.0
    _key: tuple[object, ...] = ()
    _rows: float = 0.0
    _along: list[_Point] = field(default_factory=list)
    _first: list[_Point] = field(default_factory=list)

    def _points(self, plan: _Plan, watch: _Watch) -> tuple[list[_Point], list[_Point]]:
        """All steps of the neutral trajectories, and the first step of the positive ones."""
        if plan.denoiser is not self.denoiser:
            raise LearnError("A SharedNeutral belongs to the model it was made for: make another one for this model.")
        neutral = tuple(pair[0] for pair in plan.pairs)
        key = (neutral, plan.couples, tuple(plan.times), plan.guidance, plan.seed, plan.batch)
        along = plan.chunks(range(0, 2 * plan.couples, 2), 2)
        first = plan.chunks(range(1, 2 * plan.couples, 2), 3)
        steps = len(plan.times)
        watch.total = len(along) * steps + len(first) * steps
        if key == self._key:
            self.saved_rows += self._rows
            return self._along, self._first
        watch.total += len(along) * steps + len(first)
        self._key, self._along, self._first = (), [], []  # given back before as much is made again
        before = self.denoiser.cost.snapshot()
        found = [point for members in along for point in _neutral_points(plan, members, steps, watch)]
        starts = [point for members in first for point in _neutral_points(plan, members, 1, watch)]
        self._rows = self.denoiser.cost.since(before).unet_rows
        self._key, self._along, self._first = key, found, starts
        return found, starts

    def _parts(self, plan: _Plan, watch: _Watch) -> list[_Part]:
        along, first = self._points(plan, watch)
        parts = []
        for point in along:
            watch.before()
            parts.append(_with_positive(plan, point)[0])
            watch.after()
        for point in first:
            parts += _walk(plan, point.members, watch, point)
        return parts


def build_cache(
    denoiser: Denoiser,
    pairs: list[tuple[str, str]],
    *,
    trajectories: int,
    sample_steps: int,
    guidance: float,
    holdout: float,
    seed: int,
    batch: int,
    stop: Callable[[], bool] | None,
    caching: Callable[[int, int], None] | None,
    shared: SharedNeutral | None = None,
) -> Cache:
    """DDIM trajectories with guidance, half of them drawn under the neutral prompt and half under the positive one.

    Each step costs 3 UNet rows a trajectory (empty, neutral, positive prompt; 2 without guidance and at the last step)
    and yields one item: the same rows drive the trajectory and are kept. Pairs take turns, every trajectory has its own
    seed, and whole seeds are held out. With `shared` the neutral trajectories cost 1 row a step from the second concept
    on; the items and their order are the same. Call under torch.no_grad.
    """
    couples = max(2, len(pairs), (trajectories + 1) // 2)  # a neutral and a positive trajectory of one pair each
    order = torch.randperm(couples, generator=torch.Generator().manual_seed(seed)).tolist()
    kept_out = set(order[: min(couples - 1, max(1, round(holdout * couples)))])
    encoded = encode(denoiser, ["", *(prompt for pair in pairs for prompt in pair)])
    times = timesteps(denoiser.schedule, sample_steps)
    plan = _Plan(denoiser, pairs, encoded, times, couples, guidance, seed, batch)
    chunks = plan.chunks(range(2 * couples), 3)
    watch = _Watch(stop, caching, len(times) * len(chunks))
    if shared is None:
        parts = [part for members in chunks for part in _walk(plan, members, watch)]
    else:
        parts = shared._parts(plan, watch)
    return _cache(parts, len(chunks[0]), kept_out)


def _walk(plan: _Plan, members: list[int], watch: _Watch, first: _Point | None = None) -> list[_Part]:
    """These trajectories from noise to their last time; `first`: what is known already of their first step."""
    x = plan.start(members)
    follow = torch.tensor([bool(i % 2) for i in members], device=x.device).view(-1, 1, 1, 1)
    text = [plan.text(members, 0), plan.text(members, 1)]
    parts = []
    for step in range(len(plan.times)):
        watch.before()
        if step == 0 and first is not None:
            part, positive = _with_positive(plan, first)
            neutral, empty = first.neutral, first.empty
        else:
            state, (neutral, positive, *rest) = plan.evaluate(x, step, [*text, *plan.empty(members, step)])
            empty = rest[0] if rest else None
            high = state.h[len(x) : 2 * len(x)].float().cpu()
            part = _Part(members, step, _kept(state, len(x)), neutral.cpu(), positive.cpu(), high)
        parts.append(part)
        x = plan.onwards(x, step, torch.where(follow, positive, neutral), empty)
        watch.after()
    return parts


def _neutral_points(plan: _Plan, members: list[int], steps: int, watch: _Watch) -> list[_Point]:
    """The first `steps` steps of these trajectories when all follow the neutral prompt."""
    x = plan.start(members)
    points = []
    for step in range(steps):
        watch.before()
        conds = [plan.text(members, 0), *plan.empty(members, step)]
        state, (neutral, *rest) = plan.evaluate(x, step, conds)
        empty = rest[0] if rest else None
        points.append(_Point(members, step, x, _kept(state, len(x)), neutral, empty))
        x = plan.onwards(x, step, neutral, empty)
        watch.after()
    return points


def _with_positive(plan: _Plan, point: _Point) -> tuple[_Part, Tensor]:
    """The part, and the positive prediction where the model computes."""
    state, (positive,) = plan.evaluate(point.x, point.step, [plan.text(point.members, 1)])
    part = _Part(
        point.members, point.step, point.state, point.neutral.cpu(), positive.cpu(), state.h.detach().float().cpu()
    )
    return part, positive


def _cache(parts: list[_Part], chunk: int, kept_out: set[int]) -> Cache:
    """All items in one order, however they were batched: by `chunk` trajectories, step and trajectory."""
    labels = [(i, part.step) for part in parts for i in part.members]
    order = sorted(range(len(labels)), key=lambda n: (labels[n][0] // chunk, labels[n][1], labels[n][0]))
    states = [part.state[i : i + 1] for part in parts for i in range(len(part.members))]
    return Cache(
        states=[states[n] for n in order],
        neutral=torch.cat([part.neutral for part in parts])[order],
        positive=torch.cat([part.positive for part in parts])[order],
        positive_h=torch.cat([part.positive_h for part in parts])[order],
        bucket=torch.tensor([labels[n][1] for n in order]),
        held_out=torch.tensor([labels[n][0] // 2 in kept_out for n in order]),
    )


def _kept(state: HState, size: int) -> HState:
    """The first `size` rows as a copy (the other rows' memory is given back), packed."""
    return packed(state[torch.arange(size, device=state.h.device)], size)
