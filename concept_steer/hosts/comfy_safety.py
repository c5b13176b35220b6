"""The safety switch on a ComfyUI MODEL, under guard: where it was bypassed, sampling ends with an error, no picture.

The guard looks on at four places: the run, the sampler's evaluations, ComfyUI's calls of the UNet, and h itself. A
prompt that was predicted without its h having come by was predicted around the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SafetyError
from ..safety import SafetyPlan, SafetySet, SafetySettings, plan
from .comfy import family_of, steer_model
from .comfy_plan import KEY, Rows

GUARD, WATCH, PASSED = (f"{KEY}_{name}" for name in ("safety_guard", "safety_watch", "safety_passed"))
KEPT_RUNS = 16
WAY_OUT = "Take that node out (a model cache, an accelerator, a guider of its own), or switch safety off."


@dataclass(frozen=True)
class Run:
    """A sampler's run that came to its end under guard. gate: as `Firings.to_dict`, empty without vectors."""

    pictures: int
    evaluations: int
    gate: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Guard:
    """What a safe MODEL carries, in all its clones: its plan, and the last runs, the newest at the end."""

    plan: SafetyPlan
    runs: deque[Run] = field(default_factory=lambda: deque(maxlen=KEPT_RUNS))

    def __deepcopy__(self, memo: Any) -> Guard:
        return self  # ComfyUI copies a model's options with all their content at every clone

    def begin(self) -> None:
        self.plan.firings.reset()

    def end(self, pictures: int, evaluations: int) -> None:
        """A run without a step is none. Errors: SafetyError when the vectors' gates were never asked."""
        if evaluations:
            self.plan.check_ran()
            gate = self.plan.firings.to_dict() if self.plan.steers else {}
            self.runs.append(Run(pictures, evaluations, gate))


def guard_of(model: Any) -> Guard | None:
    """The guard that a MODEL carries, None when Safety Steer is not on it."""
    return model.model_options.get("transformer_options", {}).get(GUARD)


def safe(
    model: Any, clip: Any, settings: SafetySettings, sets: Sequence[SafetySet] = (), folders: Sequence[Path] = ()
) -> tuple[Any, SafetyPlan]:
    """(a clone of the MODEL with the switch on and under guard, what is in force); the very same model at level "off".

    sets: named by the user; else one is looked for in `folders`. Errors: SafetyError when safety is not possible,
    FamilyMismatch for a set of another family, ConceptSteerError for a model without a mid block.
    """
    if not settings.on:
        return model, SafetyPlan(settings)
    made = plan(settings, *family_of(model), sets=sets, folders=folders, can_guide=can_guide(model))
    steered = steer_model(model, made.steers)
    if made.steers and steered is model:
        raise SafetyError("All safety vectors have the strength 0, so nothing would be kept out: learn the set again.")
    if made.guide is not None:
        from .comfy_guidance import safe_model

        steered = safe_model(steered, clip, made.guide, made.firings.so_far if made.gated else None)
    return guarded(steered, Guard(made)), made


def can_guide(model: Any) -> bool:
    """Whether Safe Latent Diffusion is made for this model: it predicts noise (or v), not a flow."""
    from comfy.model_sampling import CONST

    return not isinstance(model.get_model_object("model_sampling"), CONST)


def guarded(model: Any, guard: Guard) -> Any:
    """A clone of the MODEL under guard. Errors: SafetyError when it is already."""
    from comfy.patcher_extension import WrappersMP

    if guard_of(model) is not None:
        raise SafetyError(
            "This model has Safety Steer already: use one node of it, and name all categories that are unwanted there."
        )
    clone = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        clone.add_wrapper_with_key(kind, GUARD, wrapper)
    if hasattr(clone, "set_model_middle_block_after_patch"):  # ComfyUI of 2026
        clone.set_model_middle_block_after_patch(after_middle)
    else:
        clone.set_model_output_block_patch(before_decoder)
    clone.model_options.setdefault("transformer_options", {})[GUARD] = guard
    return clone


class Watch:
    """One run of a sampler under guard."""

    def __init__(self) -> None:
        self.evaluations = 0
        self.prompts: set[Any] = set()  # ids of the guider's conditionings that are prompts
        self.passed: set[Any] = set()  # ids of the conditionings whose h came by in this evaluation
        self.pictures = 0  # in the batch that ComfyUI is asked for

    def __deepcopy__(self, memo: Any) -> Watch:
        return self

    def begin(self, guider: Any, x: Tensor) -> None:
        """Another evaluation by the sampler."""
        self.prompts = {uuid for uuid, row in Rows.of(guider, x).by_uuid.items() if row.kind in (None, "cond")}
        self.passed = set()
        self.evaluations += 1

    def check_layout(self, x: Tensor, options: Mapping[str, Any]) -> None:
        """Errors: SafetyError when the rows of x are not all pictures of each conditioning, one after another."""
        chunks = len(options.get("cond_or_uncond") or [0])
        if x.shape[0] != chunks * self.pictures:
            raise SafetyError(
                f"Safety could not act: the UNet gets {x.shape[0]} rows for {chunks} conditionings of {self.pictures} "
                f"pictures, so which row is whose is not known. Another node cuts or extends the batch. {WAY_OUT}"
            )

    def see(self, options: Mapping[str, Any]) -> None:
        """h of a batch of conditionings has come by."""
        indices = options.get("cond_or_uncond") or [0]
        self.passed |= set(options.get("uuids") or [f"index {index}" for index in indices])

    def check(self) -> None:
        """At an evaluation's end. Errors: SafetyError when no prompt's h came by."""
        if not self.passed & {*self.prompts, "index 0"}:
            raise SafetyError(f"Safety could not act: another node predicts the prompt by a way of its own. {WAY_OUT}")


def outer_sample(
    executor: Any, noise: Tensor, latent_image: Any, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any
) -> Any:
    """OUTER_SAMPLE wrapper: one run."""
    options = executor.class_obj.model_options["transformer_options"]
    guard: Guard = options[GUARD]
    watch = options[WATCH] = Watch()
    guard.begin()
    try:
        latents = executor(noise, latent_image, sampler, sigmas, *rest, **more)
    finally:
        del options[WATCH]
    if not watch.evaluations and len(sigmas) > 1:
        raise SafetyError(f"Safety could not act: this guider never told of its evaluations. {WAY_OUT}")
    check_finite(latents)
    guard.end(int(noise.shape[0]), watch.evaluations)
    return latents


def check_finite(latents: Tensor) -> None:
    """Of a run's result. Errors: SafetyError for NaN and infinity."""
    if not bool(torch.isfinite(latents).all()):
        raise SafetyError(
            "Sampling gave values that are no numbers (NaN), so safety cannot vouch for the picture. Try another "
            "precision (ComfyUI's --force-fp32), another sampler, or a lower CFG."
        )


def predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Any:
    """PREDICT_NOISE wrapper: one evaluation by the sampler."""
    watch = _watch((model_options or {}).get("transformer_options", {}))
    watch.begin(executor.class_obj, x)
    result = executor(x, timestep, model_options, seed)
    watch.check()
    return result


def calc_cond_batch(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> Any:
    """CALC_COND_BATCH wrapper: of each prompt that is asked for, h comes by."""
    watch = _watch(model_options.get("transformer_options", {}))
    if not watch.evaluations:
        raise SafetyError(f"Safety could not act: another node evaluates the model before sampling begins. {WAY_OUT}")
    before, watch.passed, watch.pictures = watch.passed, set(), int(x.shape[0])
    result = executor(model, conds, x, timestep, model_options)
    asked = {cond.get("uuid") for many in conds for cond in many or () if _active(cond, timestep)}
    missed = (asked & watch.prompts) - watch.passed
    if missed and "index 0" not in watch.passed:
        raise SafetyError(
            f"Safety could not act on {len(missed)} of the prompt's parts: another node skips the middle of the UNet, "
            f"or calls it by a way of its own. {WAY_OUT}"
        )
    watch.passed |= before
    return result


def apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: Any = None,
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL wrapper: where this runs, the vectors' own wrapper does too; a list tells whether h then came by."""
    passed: list[bool] = []  # a list that is filled keeps a compiled UNet in one graph
    options = {**(transformer_options or {}), PASSED: passed}
    watch = options.get(WATCH)
    if watch is not None:  # else h, when it comes by, is an error
        watch.check_layout(x, options)
    result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if passed:
        _watch(options).see(options)
    return result


def before_decoder(h: Tensor, hsp: Any, transformer_options: Any) -> tuple[Tensor, Any]:
    """Output-block patch: at the first output block, h is still the mid block's output."""
    if transformer_options.get("block") == ("output", 0):
        _passes(transformer_options)
    return h, hsp


def after_middle(args: Any) -> Any:
    """Middle-block patch of newer ComfyUI."""
    _passes(args["transformer_options"])
    return args


def _passes(options: Mapping[str, Any]) -> None:
    passed = options.get(PASSED)
    if passed is None:  # the vectors were not prepared for this call either
        raise SafetyError(f"Safety could not act: another node calls the UNet by a way of its own. {WAY_OUT}")
    passed.append(True)


def _watch(options: Mapping[str, Any]) -> Watch:
    found = options.get(WATCH)
    if found is None:
        raise SafetyError(f"Safety was not told of this run's beginning: another node samples on its own. {WAY_OUT}")
    return found


def _active(cond: Mapping[str, Any], timestep: Tensor) -> bool:
    """Whether ComfyUI evaluates a prepared conditioning at this sigma ("default" ones: only where no other is)."""
    sigma = float(timestep.reshape(-1)[0])
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    late, early = start is not None and sigma > start, end is not None and sigma < end
    return not (late or early or "default" in cond)
