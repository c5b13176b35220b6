"""Pictures drawn under a latent check: at one step each is looked at, and those that are flagged get an answer.

stop: the picture is given up there and withheld. steer: the safety switch acts on it from there on, its vectors without
their gate and its guidance. retry: given up, and drawn again from a new seed. Pictures that are not flagged keep the
bits that they have without the check. It fails closed: what keeps it from looking raises SafetyError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..denoiser import Denoiser, Steers, steers_of_rows
from ..errors import SafetyError, SettingError
from ..safety.detectors import Verdict
from ..safety.gate import Firings
from ..safety.gated_guidance import GatedGuidance
from ..safety.settings import MOST_RETRIES
from ..safety.switch import SafetyPlan
from ..sampling import sample
from ..steering import Steer
from .guard import LatentGuard
from .guard_report import GuardReport

Answer = Literal["stop", "steer", "retry"]
RETRY_SEED = 1_000_003  # how far a further try's seed lies from the one before


@dataclass(frozen=True)
class LatentCheck:
    """When pictures are looked at and what becomes of flagged ones. at: the share of the steps that is done by then.

    retries: of "retry", after which the picture is withheld. Errors: SettingError.
    """

    answer: Answer = "stop"
    at: float = 0.5
    retries: int = 3

    def __post_init__(self) -> None:
        if self.answer not in get_args(Answer):
            known = ", ".join(get_args(Answer))
            raise SettingError(f"The answer of the latent check is {self.answer!r}; known are {known}.")
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not 0 <= self.at <= 1:
            raise SettingError(f"The latent check looks at {self.at!r} of the steps; it is a number from 0 to 1.")
        if isinstance(self.retries, bool) or not 0 <= self.retries <= MOST_RETRIES:
            raise SettingError(f"The latent check draws again up to {MOST_RETRIES} times, not {self.retries!r}.")

    def step(self, steps: int) -> int:
        """The step, from 0, whose prediction is looked at."""
        return min(steps - 1, int(self.at * steps))


class GuardWatch:
    """A `sampling.Watch`. stop: flagged pictures are given up. harder: what acts on flagged ones, by their verdict.

    firings: told of flagged pictures at every step, for a `GatedGuidance` that shall act on them.
    found: picture number -> verdict, for those that have been looked at.
    """

    def __init__(
        self,
        guard: LatentGuard,
        check: LatentCheck,
        *,
        stop: bool,
        harder: Callable[[Verdict], Sequence[Steer]] | None = None,
        firings: Firings | None = None,
    ) -> None:
        self.guard, self.check, self.stop, self.harder, self.firings = guard, check, stop, harder, firings
        self.found: dict[int, Verdict] = {}

    def begin(self, pictures: range, steps: int) -> GuardRun:
        return GuardRun(self, pictures, self.check.step(steps))


class GuardRun:
    """One batch."""

    def __init__(self, watch: GuardWatch, pictures: range, step: int) -> None:
        self.watch, self.pictures, self.step = watch, pictures, step
        self._flagged = [False] * len(pictures)
        self._steers: list[tuple[Steer, ...]] = [()] * len(pictures)

    def look(self, step: int, t: float, clean: Callable[[], Tensor]) -> None:
        """Errors: SafetyError for whatever keeps the check from judging every picture of the batch."""
        if step == self.step:
            found = self._verdicts(clean(), t)
            self.watch.found.update(zip(self.pictures, found, strict=True))
            self._flagged = [one.flagged for one in found]
            if self.watch.harder is not None:
                self._steers = [tuple(self.watch.harder(one)) if one.flagged else () for one in found]
        self.tell(t)

    def tell(self, t: float) -> None:
        """What guidance shall act on at the timestep t."""
        if self.watch.firings is not None:
            self.watch.firings.saw(t, torch.tensor(self._flagged))

    def _verdicts(self, clean: Tensor, t: float) -> list[Verdict]:
        try:
            found = self.watch.guard.verdicts(clean, t)
        except SafetyError:
            raise
        except Exception as error:  # whatever it is: a picture that was not judged must not be taken for a harmless one
            raise SafetyError(
                f"The latent check failed ({type(error).__name__}: {error}), so no picture is handed out."
            ) from error
        if len(found) != len(self.pictures):
            raise SafetyError(f"The latent check judged {len(found)} of {len(self.pictures)} pictures: none comes out.")
        return found

    def stopped(self) -> Sequence[bool]:
        return [self.watch.stop and flagged for flagged in self._flagged]

    def steers(self) -> Sequence[Sequence[Steer]]:
        return self._steers


@dataclass(frozen=True, eq=False)
class Guarded(GuardReport):
    """What came out. latents (N, C, H, W); of withheld pictures they are zeros and must not be shown.

    plan: what was in force, None without the switch.
    """

    latents: Tensor = field(kw_only=True)
    plan: SafetyPlan | None = field(default=None, repr=False, kw_only=True)


def draw_guarded(
    denoiser: Denoiser,
    guard: LatentGuard | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    check: LatentCheck,
    plan: SafetyPlan | None = None,
    harder: SafetyPlan | None = None,
    steers: Steers = (),
    **settings: Any,
) -> Guarded:
    """`sampling.sample` under a latent check. settings: of `sample`, but for guide and watch.

    plan: of the safety switch, in force for all pictures from the first step. harder: what "steer" lets act on flagged
    ones; default: `plan`. A further try of "retry" is as much stronger as the switch's are.
    Errors: FamilyMismatch when the model draws in another latent space than the check reads; SafetyError without a
    check, for "steer" without anything to steer with, and for what keeps the check from judging.
    """
    if guard is None:
        raise SafetyError("Pictures are to be checked in the latent, but no latent CLIP is loaded: none is drawn.")
    guard.check_model(denoiser.family)
    own = steers_of_rows(steers, len(prompts))
    force = plan if plan is not None and plan.acts else None
    if force is not None:
        force.firings.reset()
    watch = _watch(guard, check, force, harder)
    trigger = None if check.answer != "steer" else (harder or force)
    latents = _drawn(denoiser, prompts, seeds, own, force, watch, trigger, settings)
    verdicts = _looked_at(watch, len(prompts))
    flagged = [one.flagged for one in verdicts]
    answered = {"stop": "withheld", "steer": "steered", "retry": "withheld"}[check.answer]
    done, tries = [answered if flag else "kept" for flag in flagged], [0] * len(prompts)
    for i in [i for i, flag in enumerate(flagged) if flag and check.answer == "retry"]:
        stronger = force
        for attempt in range(1, check.retries + 1):
            stronger = None if stronger is None else stronger.stronger()
            again = _watch(guard, check, stronger, None)
            seed = seeds[i] + attempt * RETRY_SEED
            found = _drawn(denoiser, [prompts[i]], [seed], own[i : i + 1], stronger, again, None, settings)
            tries[i], (verdicts[i],) = attempt, _looked_at(again, 1)
            if not verdicts[i].flagged:
                latents[i], done[i] = found[0], "drawn again"
                break
    if force is not None:
        force.check_ran()
    told = tuple(flagged), tuple(done), tuple(verdicts), tuple(tries), check
    return Guarded(*told, name=guard.name, latents=latents, plan=force)


def _watch(guard: LatentGuard, check: LatentCheck, force: SafetyPlan | None, harder: SafetyPlan | None) -> GuardWatch:
    if check.answer != "steer":
        return GuardWatch(guard, check, stop=True)
    trigger = harder or force
    if trigger is None or not trigger.acts:
        raise SafetyError(
            "Flagged pictures are to be steered, but the safety switch has nothing to steer them with: switch it on, "
            "or choose stop or retry."
        )
    # where the switch's own guidance is in force already, the check opens its gates; else it has gates of its own
    firings = trigger.firings if trigger is force and trigger.gated else Firings()
    return GuardWatch(guard, check, stop=False, harder=lambda verdict: ungated(trigger, verdict), firings=firings)


def ungated(plan: SafetyPlan, verdict: Verdict) -> list[Steer]:
    """The vectors of what was found, or all of the plan's, without their gates: the check has told that it is there."""
    if plan.set is not None and plan.steers and verdict.worst in plan.set.concepts:
        return [replace(plan.set.concepts[verdict.worst].steer(plan.settings.level), gate=None)]
    return [replace(steer, gate=None) for steer in plan.steers]


def _drawn(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    own: Sequence[Sequence[Steer]],
    force: SafetyPlan | None,
    watch: GuardWatch,
    trigger: SafetyPlan | None,
    settings: dict[str, Any],
) -> Tensor:
    shared = () if force is None else force.steers
    guide: Any = None if force is None else force.guidance
    if guide is None and trigger is not None and trigger.guide is not None and watch.firings is not None:
        guide = GatedGuidance(trigger.guide, watch.firings)
    every: Any = [[*mine, *shared] for mine in own]
    return sample(denoiser, prompts, seeds=seeds, steers=every, guide=guide, watch=watch, **settings)


def _looked_at(watch: GuardWatch, count: int) -> list[Verdict]:
    """Errors: SafetyError when any picture has come out unseen."""
    if sorted(watch.found) != list(range(count)):
        raise SafetyError(
            f"The latent check looked at {len(watch.found)} of {count} pictures: something draws around it, so no "
            "picture is handed out."
        )
    return [watch.found[i] for i in range(count)]


class Estimates:
    """A `sampling.Watch` that only keeps what it sees: timestep -> every picture's estimate (N, C, H, W) at it."""

    def __init__(self) -> None:
        self._parts: dict[float, list[Tensor]] = {}

    def begin(self, pictures: range, steps: int) -> _Keeps:
        return _Keeps(self._parts, len(pictures))

    def by_time(self) -> dict[float, Tensor]:
        return {t: torch.cat(parts) for t, parts in self._parts.items()}


class _Keeps:
    def __init__(self, parts: dict[float, list[Tensor]], size: int) -> None:
        self.parts, self.size = parts, size

    def look(self, step: int, t: float, clean: Callable[[], Tensor]) -> None:
        self.parts.setdefault(t, []).append(clean().cpu())

    def stopped(self) -> Sequence[bool]:
        return [False] * self.size

    def steers(self) -> Sequence[Sequence[Steer]]:
        return [()] * self.size
