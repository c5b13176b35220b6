"""What the web UIs (AUTOMATIC1111, Forge, reForge) need of us, without their user interface: folders, jobs, callbacks.

Only functions here touch the host's modules, so that all else can be tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConceptSteerError, SafetyError, SettingError
from ..library import Library, default_folders
from ..safety import SafetySettings
from ..steering import Steer
from .webui_guidance import Guidance
from .webui_hook import ForgeHook, TorchHook
from .webui_job import INFO, ON_P, Hook, Job, begin
from .webui_rows import Row
from .webui_safe_words import NO_SAFETY
from .webui_safety import PLAIN, Guard, plan_for
from .webui_schema import CONTROLS, NOTHING, ROWS, Settings
from .webui_settings import enforced, locked_level, safety_at_start

FOLDER = "concept-vectors"
AXES = "concept_steer_axes"  # where the X/Y/Z plot leaves its values
LEVEL = "safety_level"


def own_folder() -> Path:
    """models/concept-vectors of the web UI, where learned vectors are saved."""
    from modules import paths

    return Path(paths.models_path) / FOLDER


def library() -> Library:
    """The web UI's folder, those of its settings, then the usual ones."""
    from modules import shared

    named = str(getattr(shared.opts, "concept_steer_folders", "") or "")
    more = [Path(line.strip()).expanduser() for line in named.splitlines() if line.strip()]
    return Library([own_folder(), *more, *default_folders()])


def names() -> list[str]:
    return [entry.name for entry in library().entries()]


def is_forge() -> bool:
    return find_spec("modules_forge") is not None


def hook() -> Hook:
    from modules import shared

    return ForgeHook() if is_forge() else TorchHook(lambda: shared.sd_model.model.diffusion_model)


def process(p: Any, args: Sequence[Any]) -> None:
    """A run begins: make its job if anything is to act, note it in the infotext. Never raises; the job does, later."""
    Job.drop(p)
    if INFO in p.extra_generation_params:  # a copy of a former run's p shares its dict
        p.extra_generation_params = {k: v for k, v in p.extra_generation_params.items() if k != INFO}
    axes = getattr(p, AXES, {})
    try:
        settings = with_axes(args, axes, safety_at_start())
        settings = replace(settings, safety=enforced(settings.safety, locked_level()))
    except ConceptSteerError as error:
        begin(p, Settings(), hook(), library().load).failure = error
        return
    # a hires prompt may have tags where the prompt has none, and then it would be too late to begin
    if settings.acts or getattr(p, "enable_hr", False):
        job = begin(p, settings, hook(), library().load, balanced, guard_of(settings.safety, p), stopped)
        if settings.acts:
            job.note(settings.text())


def finish(p: Any, processed: Any = None) -> None:
    """A run is over: p is as it was, also for those who copy it now. What safety did stands under the pictures."""
    job = Job.of(p)
    if job is not None and job.guard is not None and processed is not None:
        processed.comments += job.guard.report() + "\n"
    Job.drop(p)


def balanced(job: Job) -> list[Sequence[Steer]]:
    """The steers of all pictures of a run that is to be fair."""
    from .webui_fair import balance

    return balance(job)


def guard_of(safety: SafetySettings, p: Any) -> Guard | None:
    """Safety over a run; None where it is off."""
    if not safety.on:
        return None
    folders = library().folders
    guidance = (
        None if is_forge() else (lambda settings, opened: Guidance(settings, encoder(p), conditioning_key, opened))
    )
    return Guard(
        safety,
        lambda family, channels: plan_for(safety, family, channels, folders, guidance is not None),
        guidance,
    )


def encoder(p: Any) -> Callable[[str, Any], Any]:
    """(text, on_cfg_denoiser's parameters) -> its conditioning by the model in use, kept while that stays."""
    from modules import prompt_parser, shared

    kept: dict[Any, tuple[Any, Any]] = {}

    def encode(text: str, asked: Any) -> Any:
        model, (height, width) = shared.sd_model, (8 * int(size) for size in asked.x.shape[-2:])
        key = (id(model), text, height, width)
        if key not in kept:
            words = prompt_parser.SdConditioning([text], width=width, height=height)
            kept[key] = model, model.get_learned_conditioning(words)  # with the model: an id may come again
        return kept[key][1]

    return encode


def conditioning_key() -> str:
    from modules import shared

    return str(shared.sd_model.model.conditioning_key)


def stopped() -> bool:
    """Whether the user interrupted or skipped."""
    from modules import shared

    state = shared.state
    return bool(state.interrupted or state.skipped or getattr(state, "stopping_generation", False))


def withhold_unsafe(p: Any, images: Any) -> None:
    """Pictures of a batch (B, 3, H, W) that safety was to look after and did not: another extension drew them."""
    job = Job.of(p)
    if job is not None and job.guard is not None and not job.guard.done:
        images.fill_(PLAIN)
        p.comment("Concept Steer: pictures are withheld, since they were drawn around the safety switch.")


def with_axes(args: Sequence[Any], axes: Mapping[str, Any], safety: SafetySettings = NO_SAFETY) -> Settings:
    """The settings with what an X/Y/Z plot says of single controls; a plot switches on what it changes.

    Errors: SettingError, also for a plot over a row that has no vector.
    """
    if not axes:
        return Settings.from_args(args, safety)
    given = args[0] if args and isinstance(args[0], Mapping) else None
    further: tuple[Row, ...] = ()
    if given is None:
        usual = replace(Settings(), safety=safety).to_controls()
        controls = {**usual, **dict(zip(CONTROLS, args, strict=False))}
    else:
        settings = Settings.from_dict(given, safety)
        controls, further = settings.to_controls(), settings.rows[ROWS:]
    if any(control != LEVEL for control in axes):
        controls["enabled"] = True
    if LEVEL in axes:
        controls["safety"] = axes[LEVEL] != "off"
    controls |= {control: value for control, value in axes.items() if (control, value) != (LEVEL, "off")}
    for control in axes:
        name, _, row = control.rpartition("_")
        if name in ("strength", "start", "end") and controls[f"vector_{row}"] in ("", NOTHING):
            raise SettingError(f"The plot changes {name.title()} {row}, but row {row} has no vector: choose one there.")
    found = Settings.from_controls(list(controls.values()))
    return replace(found, rows=(*found.rows, *further))


def use_tags(p: Any, items: Sequence[Sequence[str]]) -> None:
    """The tags of the prompt that is about to be drawn. Called for every batch, and again for the hires pass."""
    job = Job.of(p)
    if job is None:
        if not items:
            return
        job = begin(p, Settings(), hook(), library().load)
    given = job

    def act() -> None:
        given.tags = given.use([Row.parsed(one) for one in items])

    job.careful(act)


class Evaluations:
    """The host's two callbacks around an evaluation of the model; only the first one tells whose it is."""

    def __init__(self) -> None:
        self._now: tuple[Job, Any] | None = None

    def before(self, params: Any) -> None:
        """on_cfg_denoiser."""
        self._now = None
        p = getattr(params.denoiser, "p", None)
        job = None if p is None else Job.of(p) or _unasked(p)
        if job is not None:
            self._now = job, params
            job.careful(lambda: job.before_evaluation(params))

    def after(self, params: Any) -> None:
        """on_cfg_denoised: before the predictions are joined. AUTOMATIC1111 only."""
        now, self._now = self._now, None
        if now is not None and now[1].denoiser.inner_model is params.inner_model:
            now[0].careful(lambda: now[0].after_evaluation(now[1], params))


def _unasked(p: Any) -> Job | None:
    """A run that never came by our script, which another extension began by itself.

    Under the administrator's lock, and where a safe run was copied, it ends with an error: nobody switched safety off.
    """
    carried = getattr(p, ON_P, None)
    try:
        if locked_level() is None and (carried is None or carried.guard is None):
            return None
        raise SafetyError(
            "Safety is on, but another extension draws a picture by itself without Concept Steer. Name concept_steer "
            "among the scripts that it runs (ADetailer: 'Script names to apply to ADetailer'), or switch it off."
        )
    except ConceptSteerError as error:
        return Job(p, Settings(), hook(), library().load, failure=error)


def sentence(args: Sequence[Any]) -> str:
    """What will happen, or why it cannot, for the accordion: HTML, in which names of others' files stand as text."""
    try:
        settings = Settings.from_args(args, safety_at_start())
        locked = locked_level()
        settings = replace(settings, safety=enforced(settings.safety, locked))
        if settings.enabled:
            found = library()
            for row in settings.rows:
                found.find(row.vector)
        words = [settings.in_words()]
        if settings.safety.on and is_forge():
            words.append("Here safety is learned vectors only; Safe Latent Diffusion has no place in this web UI.")
        if locked is not None:
            words.append(f"The administrator keeps safety on, at least at the level {locked}.")
        return escape(" ".join(words))
    except ConceptSteerError as error:
        return escape(f"This cannot be drawn: {error}")
