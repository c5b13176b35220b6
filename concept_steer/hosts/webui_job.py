"""One run of the web UI: its steers, whose rows they act on, and everything that has to be undone after it.

A job hangs on the web UI's own object of a run, `p`, and nowhere else. Hooks sit on the UNet only while p.sample runs.
Exceptions in an extension's callbacks are printed and forgotten there, so a job keeps its failure and raises it where
it ends the run: before sampling, or inside the UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from ..denoiser import steer_rows
from ..errors import ConceptSteerError
from ..steering import Steer, check_steers
from .webui_plan import Row
from .webui_rows import Row as Setting
from .webui_safety import REPLACED, Guard
from .webui_schema import Settings

ON_P = "concept_steer_job"
INFO = "Concept Steer"  # the infotext's key
BYPASSED = (
    "Concept Steer: the model ran without its mid block's output being reached, so nothing was steered. A replaced "
    "UNet (TensorRT, another engine, a cache) bypasses it; choose 'None' as the SD Unet."
)


class Hook(Protocol):
    """How a host lets h be changed."""

    def attach(self, job: Job, params: Any) -> int:
        """Before every evaluation of the model: make sure that the UNet in use asks `job`.

        How many rows of prompts it will have, at least.
        """
        ...

    def aside(self) -> AbstractContextManager[Any]:
        """While it lasts, calls of the UNet are our own and are not steered."""
        ...

    def detach(self) -> None: ...
    def family(self, p: Any, params: Any = None) -> tuple[str, int]:
        """(family, channels of h) of the model in use."""
        ...


@dataclass(eq=False)
class Job:
    """settings: the accordion's. load: a vector by name. balance: (job) -> steers of each picture of the run.

    calls: how often h was reached; evaluations: how often the model was run. stopped: whether the user interrupted.
    """

    p: Any
    settings: Settings
    hook: Hook
    load: Callable[[str], Any]
    balance: Callable[[Job], Sequence[Sequence[Steer]]] | None = None
    rows: tuple[Steer, ...] = ()
    tags: tuple[Steer, ...] = ()
    guard: Guard | None = None
    stopped: Callable[[], bool] = lambda: False
    pictures: Sequence[Sequence[Steer]] = ()
    running: bool = False
    failure: Exception | None = None
    evaluations: int = 0
    calls: int = 0
    families: dict[Any, bool] = field(default_factory=dict)
    main: tuple[str, int] | None = None

    @staticmethod
    def of(p: Any) -> Job | None:
        """The job of this very run; a copy of `p` for another run has none."""
        job = getattr(p, ON_P, None)
        return job if job is not None and job.p is p else None

    @staticmethod
    def drop(p: Any) -> None:
        """Forget a former run's job, also one that came along in a copy of its `p`."""
        job = p.__dict__.pop(ON_P, None)
        sample = p.__dict__.get("sample")
        if job is not None:
            job.hook.detach()
        if getattr(sample, "concept_steer", False):
            former = sample.former
            del p.sample
            if former is not None:
                p.sample = former

    def start(self) -> Job:
        """Put on p; its sampling now begins and ends with this job's."""
        p = self.p
        former = p.__dict__.get("sample")  # another extension's
        sample = p.sample

        def sampling(*args: Any, **kwargs: Any) -> Any:
            return self.sampled(lambda: sample(*args, **kwargs))

        sampling.concept_steer, sampling.former = True, former  # type: ignore[attr-defined]
        setattr(p, ON_P, self)
        p.sample = sampling
        return self

    def careful(self, act: Callable[[], None]) -> None:
        """Do something in a callback of the host; what goes wrong ends the run later."""
        try:
            act()
        except Exception as error:
            self.failure = self.failure or error

    def use(self, settings: Sequence[Setting]) -> tuple[Steer, ...]:
        """Steers of rows; those of strength 0 are nothing."""
        return tuple(row.steer(self.load(row.vector)) for row in settings if row.strength)

    def sampled(self, sample: Callable[[], Any]) -> Any:
        """What sample() returns. Errors: the job's failure, before sampling or after; whatever sample() raises."""
        self.evaluations = self.calls = 0
        self._raise()
        if self.guard is not None:
            self.guard.start()
        if self.rows or self.tags or self.balance is not None or self.guard is not None:
            self.main = self.hook.family(self.p)
            check_steers([*self.rows, *self.tags], *self.main)
        if self.guard is not None and self.main is not None:
            self.guard.use(*self.main)
        if self.balance is not None and not self.pictures:
            self.pictures = self.balance(self)
        self.running = True
        try:
            result = sample()
        finally:
            self.running = False
            self.hook.detach()
            self.families.clear()
        self._raise()
        if self.guard is not None:
            self.guard.finish(result, self.stopped())
        if self.evaluations and not self.calls:
            self.p.comment(BYPASSED)
            print(BYPASSED)  # the web UI's API does not hand out comments
            self.note(Settings(safety=self.settings.safety).text() or None)  # no word of what did not happen
        return result

    def before_evaluation(self, params: Any) -> None:
        """The host is about to run the model."""
        if self.failure is None and not self.running and (self.guard is not None or self._acts()):
            self.failure = ConceptSteerError(REPLACED)
        if self.failure is not None:
            self.hook.attach(self, params)  # to raise it
            return
        safe = self._safe(params)
        self.steering = self._acts() and self._fits(params)
        if not self.steering and not safe:
            self.hook.detach()
        rows = self.hook.attach(self, params) if self.steering or safe else 0
        self.evaluations += bool(rows)
        if self.guard is not None:
            self.guard.begin(rows)

    def _safe(self, params: Any) -> bool:
        """Whether safety steers the model in use, too. Errors: SafetyError, FamilyMismatch."""
        if self.guard is None:
            return False
        model = self.hook.family(self.p, params)
        self.guard.use(*model)
        check_steers(self.guard.steers, *model)
        return bool(self.guard.steers)

    def after_evaluation(self, asked: Any, denoised: Any) -> None:
        """The host has run the model and is about to join its predictions."""
        if self.guard is not None and self.failure is None:
            with self.hook.aside():
                self.guard.after(asked, denoised)

    def _acts(self) -> bool:
        """In the pass that runs."""
        return bool(self.tags or self._of_pass(self.rows) or any(self._of_pass(own) for own in self.pictures))

    def steered(self, h: Tensor, timestep: float, rows: Sequence[Row]) -> Tensor:
        """h (B, C, H, W) for these rows: a new tensor, or the same one. Errors: the job's failure."""
        self._raise()
        self.calls += 1
        conds, pictures = [row.cond for row in rows], [row.picture for row in rows]
        safe = ()
        if self.guard is not None:
            self.guard.reached(sum(conds))
            safe = self.guard.steers
        everywhere = [*self._of_pass(self.rows), *self.tags, *safe] if self.steering else [*safe]
        if not self.pictures or not self.steering:
            return steer_rows(h, everywhere, timestep, conds, pictures)
        first = int(getattr(self.p, "iteration", 0)) * int(self.p.batch_size)
        own = [self._of_pass(self.pictures[first + row.picture]) for row in rows]
        return steer_rows(h, [(*everywhere, *mine) for mine in own], timestep, conds, pictures)

    def _of_pass(self, steers: Sequence[Steer]) -> Sequence[Steer]:
        """The accordion's steers in the pass that runs."""
        factor = self.settings.hires
        if factor == 1 or not getattr(self.p, "is_hr_pass", False):
            return steers
        key = (id(steers), factor)
        if key not in self._scaled:
            self._scaled[key] = (steers, tuple(replace(s, strength=s.strength * factor) for s in steers if factor))
        return self._scaled[key][1]

    def __post_init__(self) -> None:
        self.steering = False  # whether the model in use takes more than what safety adds
        self._scaled: dict[Any, tuple[Sequence[Steer], tuple[Steer, ...]]] = {}

    def _fits(self, params: Any) -> bool:
        """Whether the model in use is steered; it may have changed since sampling began. Errors: FamilyMismatch."""
        family, channels = self.hook.family(self.p, params)
        key = (family, channels, self.tags)
        if key not in self.families:
            self.families[key] = True
            if family == "sdxl-refiner" and self.main is not None and self.main[0] == "sdxl":
                self.families[key] = False
                self.p.comment("Concept Steer: SDXL's refiner has another mid block; only the base model is steered.")
            else:
                check_steers([*self.rows, *self.tags, *(s for own in self.pictures for s in own)], family, channels)
        return self.families[key]

    def _raise(self) -> None:
        if self.failure is not None:
            raise self.failure

    def note(self, value: Any) -> None:
        """Into the infotext, None for nothing; in a dict of its own, since copies of p share theirs."""
        self.p.extra_generation_params = {**self.p.extra_generation_params, INFO: value}


def begin(
    p: Any,
    settings: Settings,
    hook: Hook,
    load: Callable[[str], Any],
    balance: Callable[[Job], Sequence[Sequence[Steer]]] | None = None,
    guard: Guard | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Job:
    """A fresh job on p, its vectors loaded; what goes wrong with that ends the run when it samples."""
    Job.drop(p)
    job = Job(
        p,
        settings,
        hook,
        load,
        balance if settings.enabled and settings.fair is not None else None,
        guard=guard,
        stopped=stopped,
    )

    def vectors() -> None:
        job.rows = job.use(settings.rows) if settings.enabled else ()

    job.careful(vectors)
    return job.start()
