"""The latent check inside ComfyUI's samplers: one look at what each picture is about to become, and the answer to it.

A SAMPLER_SAMPLE wrapper spans the run, a PREDICT_NOISE wrapper has every evaluation's estimate of the finished
pictures. The batch stays whole, so that pictures that are not flagged keep their bits; what is withheld is blanked in
all that leaves the sampler (result, previews). When every picture is withheld, the run ends there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SafetyError, SettingError
from ..guidance.safe_latent_diffusion import step_of
from ..latent_clip.guard import LatentGuard
from ..latent_clip.guard_report import GuardReport
from ..latent_clip.guarded import GuardWatch, LatentCheck, ungated
from ..safety import SafetyPlan, SafetySet, SafetySettings
from ..safety import plan as plan_of
from ..safety.detectors import Verdict
from ..safety.gate import Firings
from ..steering import Steer
from .comfy import family_of, timestep_of, with_hooks
from .comfy_plan import KEY, PICTURES
from .comfy_safety import KEPT_RUNS, can_guide, check_finite, guard_of

GUARD, RUN = f"{KEY}_latent_guard", f"{KEY}_latent_look"
DONE = {"stop": "withheld", "steer": "steered"}
WAY_OUT = "Take that node out, or the Latent Guard, if the pictures need no check."


class AskedGate:
    """A gate that is always open: it counts how often it was asked, so that a steer that was bypassed is noticed."""

    fingerprint = "open"

    def __init__(self) -> None:
        self.asked = 0

    def __deepcopy__(self, memo: Any) -> AskedGate:
        return self  # ComfyUI copies a model's options with all their content

    def at(self, timestep: float, device: torch.device | str = "cpu") -> None:
        return None

    def opened(self, h: Tensor, at: None) -> Tensor:
        return torch.ones(h.shape[0], 1, 1, 1, dtype=torch.bool, device=h.device)

    def saw(self, timestep: float, opened: Tensor, pictures: Sequence[int | None] | None = None) -> None:
        self.asked += 1


@dataclass(frozen=True, eq=False)
class Look(GuardReport):
    """One run of a sampler. step: whose estimate was looked at, from 0, of `steps`; timestep: of training, 0..999.

    saved: steps that were not drawn, as all pictures were withheld.
    """

    step: int = field(kw_only=True)
    steps: int = field(kw_only=True)
    timestep: float = field(kw_only=True)
    saved: int = field(default=0, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        found = [one.worst if one.flagged else "" for one in self.verdicts]
        where = {"step": self.step + 1, "steps": self.steps, "timestep": round(self.timestep, 2), "saved": self.saved}
        return {**super().to_dict(), "found": found, **where}

    def text(self) -> str:
        lines = [super().text()]
        lines[0] += f" It looked at step {self.step + 1} of {self.steps}"
        if self.saved:
            lines[0] += f"; {self.saved} steps were saved, as no picture was left."
        elif any(self.withheld):
            lines[0] += "; no step was saved, as the other pictures went on."
        else:
            lines[0] += "."
        for number, (verdict, done) in enumerate(zip(self.verdicts, self.done, strict=True)):
            what = f": {verdict.worst}" if verdict.flagged else ""
            lines.append(f"picture {number}: {done}, score {verdict.score:.2f}{what}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Looking:
    """What a MODEL under the check carries, in all its clones. runs: the last ones, the newest at the end.

    harder: what "steer" lets act. firings: by which guidance knows the flagged pictures.
    """

    guard: LatentGuard
    check: LatentCheck
    harder: SafetyPlan | None = None
    firings: Firings = field(default_factory=Firings)
    gate: AskedGate = field(default_factory=AskedGate)
    runs: deque[Look] = field(default_factory=lambda: deque(maxlen=KEPT_RUNS))

    def __deepcopy__(self, memo: Any) -> Looking:
        return self  # ComfyUI copies a model's options with all their content at every clone

    def watch(self) -> GuardWatch:
        """Of one run."""
        if self.harder is None:
            return GuardWatch(self.guard, self.check, stop=True)
        if self.firings is not self.harder.firings:
            self.firings.reset()
        self.firings.begin()
        return GuardWatch(self.guard, self.check, stop=False, harder=self._steers, firings=self.firings)

    def _steers(self, verdict: Verdict) -> list[Steer]:
        return [replace(steer, gate=self.gate) for steer in ungated(self.harder, verdict)] if self.harder else []


def looking_of(model: Any) -> Looking | None:
    """What a MODEL carries, None when no Latent Guard is on it."""
    return model.model_options.get("transformer_options", {}).get(GUARD)


def look_at_pictures(
    model: Any,
    patcher: Any,
    guard: LatentGuard,
    check: LatentCheck,
    clip: Any = None,
    sets: Sequence[SafetySet] = (),
    folders: Sequence[Path] = (),
) -> tuple[Any, Looking]:
    """(a clone of the MODEL whose samplers look at their pictures, what it carries).

    patcher: ComfyUI's ModelPatcher of the guard's towers, so that they lie where the UNet does. For "steer": the switch
    that is on the MODEL acts harder; without one the switch's default acts on flagged pictures alone, its guidance
    where clip is given. Errors: FamilyMismatch for a MODEL of another latent space or a set of another family;
    SettingError for "retry"; SafetyError when there is nothing to steer with, or a second check.
    """
    from comfy.patcher_extension import WrappersMP

    if looking_of(model) is not None:
        raise SafetyError("This model has a Latent Guard already: use one, and name all categories there.")
    if check.answer not in DONE:
        raise SettingError("Drawing a picture again is not possible inside a sampler: choose stop or steer.")
    family, channels = family_of(model)
    guard.check_model(family)
    harder, firings, clone = None, Firings(), model.clone()
    if check.answer == "steer":
        clone, harder, firings = _steerable(model, clip, family, channels, sets, folders)
    clone.set_additional_models(GUARD, [patcher])
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, GUARD, sampler_sample)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, GUARD, predict_noise)
    looking = Looking(guard, check, harder, firings)
    clone.model_options.setdefault("transformer_options", {})[GUARD] = looking
    return clone, looking


def _steerable(
    model: Any, clip: Any, family: str, channels: int, sets: Sequence[SafetySet], folders: Sequence[Path]
) -> tuple[Any, SafetyPlan, Firings]:
    own = guard_of(model)
    if own is not None:
        if not own.plan.steers:
            raise SafetyError(
                "Flagged pictures are to be steered, but Safety Steer on this model guides all of them by Safe Latent "
                "Diffusion already, and has no vectors: choose stop, or another method there."
            )
        return with_hooks(model), own.plan, own.plan.firings if own.plan.gated else Firings()
    guides = clip is not None and can_guide(model)
    harder = plan_of(SafetySettings(), family, channels, sets=sets, folders=folders, can_guide=guides)
    firings = Firings()
    clone = with_hooks(model) if harder.steers else model.clone()
    if harder.guide is not None:
        from .comfy_guidance import safe_model

        clone = safe_model(clone, clip, harder.guide, firings.so_far)
    return clone, harder, firings


class _AllWithheld(Exception):
    """Nothing is left to be drawn."""


class Run:
    """One run of a sampler."""

    def __init__(self, looking: Looking, sigmas: Tensor, sampling: Any, pictures: int) -> None:
        self.looking, self.sampling, self.pictures = looking, sampling, pictures
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.steps = len(self.sigmas) - 1
        self.watch = looking.watch()
        self.looks = self.watch.begin(range(pictures), self.steps)
        self.step, self.timestep = -1, 0.0  # of the look

    def __deepcopy__(self, memo: Any) -> Run:
        return self

    @property
    def looked(self) -> bool:
        return self.step >= 0

    def evaluate(self, predict: Any, x: Tensor, sigma: Tensor, options: Mapping[str, Any]) -> Tensor:
        """One evaluation by the sampler. predict: transformer options -> denoised pictures.

        Errors: SafetyError when rows and pictures do not fit, or when what should act on a flagged picture did not;
        `GuardRun.look`'s.
        """
        if x.shape[0] != self.pictures:
            raise SafetyError(
                f"The latent check cannot tell which row is whose: the sampler draws {self.pictures} pictures, but "
                f"predicts {x.shape[0]}. Another node cuts or extends the batch. {WAY_OUT}"
            )
        t = timestep_of(self.sampling, sigma)
        steers = self.looks.steers()
        acts = any(steer.gain(t) for mine in steers for steer in mine)
        if self.looked:
            self.looks.tell(t)
        asked = self.looking.gate.asked
        denoised = predict(_with(options, steers) if acts else options)
        if acts and self.looking.gate.asked == asked:
            raise SafetyError(
                f"A flagged picture was not steered: another node calls the UNet by its own way. {WAY_OUT}"
            )
        step = step_of(self.sigmas, float(sigma))[0]
        if not self.looked and step >= self.looks.step:
            self.looks.look(self.looks.step, t, denoised.float)
            self.step, self.timestep = min(step, self.steps - 1), t
            if all(self.looks.stopped()):
                raise _AllWithheld
        return denoised

    def blank(self, latents: Any) -> Any:
        """Zeros for what is withheld by now; the very same tensor when nothing is."""
        if not any(self.looks.stopped()) or not isinstance(latents, Tensor):
            return latents
        gone = torch.tensor(self.looks.stopped(), device=latents.device).view(-1, *[1] * (latents.ndim - 1))
        return latents.masked_fill(gone, 0.0)

    def end(self, latents: Tensor, saved: int) -> None:
        """Errors: SafetyError when the pictures were not looked at, or are not finite."""
        if self.steps < 1:
            return  # nothing was drawn
        if not self.looked:
            raise SafetyError(f"The latent check never saw these pictures: another node predicts around it. {WAY_OUT}")
        check_finite(latents)
        check, verdicts = self.looking.check, tuple(self.watch.found[i] for i in range(self.pictures))
        flagged = tuple(one.flagged for one in verdicts)
        done = tuple(DONE[check.answer] if flag else "kept" for flag in flagged)
        where = {"step": self.step, "steps": self.steps, "timestep": self.timestep, "saved": saved}
        name = self.looking.guard.name
        self.looking.runs.append(Look(flagged, done, verdicts, (0,) * len(done), check, name=name, **where))  # type: ignore[arg-type]


def _with(options: Mapping[str, Any], steers: Sequence[Sequence[Steer]]) -> dict[str, Any]:
    """Transformer options in which each picture has these steers beside its own."""
    own = options.get(PICTURES) or ((),) * len(steers)
    if len(own) != len(steers):
        raise SafetyError(f"{len(own)} pictures have steers of their own, but {len(steers)} were looked at. {WAY_OUT}")
    return {**options, PICTURES: tuple((*mine, *more) for mine, more in zip(own, steers, strict=True))}


def sampler_sample(
    executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any, **more: Any
) -> Tensor:
    """SAMPLER_SAMPLE wrapper: one run."""
    options = extra_args["model_options"]["transformer_options"]
    sampling = guider.model_patcher.get_model_object("model_sampling")
    run = options[RUN] = Run(options[GUARD], sigmas, sampling, int(noise.shape[0]))

    def told(step: int, clean: Any, x: Any, steps: int) -> None:
        callback(step, run.blank(clean), run.blank(x), steps)

    saved = 0
    try:
        latents = run.blank(executor(guider, sigmas, extra_args, callback and told, noise, *rest, **more))
    except _AllWithheld:
        latents, saved = torch.zeros_like(noise), run.steps - 1 - run.step
        if callback is not None:  # else the last preview, and the denoised output, would be of the step before
            callback(run.steps - 1, latents, latents, run.steps)
    finally:
        del options[RUN]
    run.end(latents, saved)
    return latents


def predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Any:
    """PREDICT_NOISE wrapper: one evaluation by the sampler."""
    given = model_options or {}
    run: Run | None = given.get("transformer_options", {}).get(RUN)
    if run is None:
        raise SafetyError(f"The latent check was not told of this run: another node samples on its own. {WAY_OUT}")

    def predict(options: Mapping[str, Any]) -> Any:
        return executor(x, timestep, {**given, "transformer_options": options}, seed)

    return run.evaluate(predict, x, timestep.reshape(-1)[0], given["transformer_options"])
