"""Steer a ComfyUI MODEL or CONDITIONING through ComfyUI's own wrappers and patches; nothing of the model is replaced.

A PREDICT_NOISE wrapper learns from the guider which rows are the prompt's, an APPLY_MODEL wrapper turns sigma into
gains, and the patch at the mid block's output is `h + plan`: tensors only, so that a compiled UNet keeps one graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..steering import Steer, check_steers
from .comfy_plan import KEY, PICTURES, PLAN, ROWS, STEERS, Rows, plan_of, steered, take_over, tell_gates
from .ldm_unet import unet_family


def family_of(model: Any) -> tuple[str, int]:
    """(family key, channels of h) of a MODEL; ConceptSteerError when it has no mid block to steer."""
    width = model.model.model_config.unet_config.get("context_dim") or 0
    return unet_family(model.model.diffusion_model, width, type(model.model).__name__)


def steer_model(model: Any, steers: Sequence[Steer]) -> Any:
    """A clone of the MODEL with these steers added to those it has; the very same object when all strengths are 0.

    Errors: FamilyMismatch when a vector was made for another model, ConceptSteerError for a model without a mid block.
    """
    check_steers(steers, *family_of(model))
    active = tuple(steer for steer in steers if steer.strength != 0)
    if not active:
        return model
    clone = with_hooks(model)
    options = clone.model_options["transformer_options"]
    options[STEERS] = (*options.get(STEERS, ()), *active)
    return clone


def steer_pictures(model: Any, per_picture: Sequence[Sequence[Steer]]) -> Any:
    """A clone of the MODEL for one batch, each picture of which has steers of its own (beside those of the MODEL).

    Errors: as `steer_model`; ConceptSteerError while sampling when the batch has another number of pictures.
    """
    check_steers([steer for steers in per_picture for steer in steers], *family_of(model))
    clone = with_hooks(model)
    clone.model_options["transformer_options"][PICTURES] = tuple(tuple(steers) for steers in per_picture)
    return clone


def with_hooks(model: Any) -> Any:
    """A clone with our wrappers and our patch, each once: what it needs to be steered, while nothing steers it yet."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    for kind, wrapper in ((WrappersMP.PREDICT_NOISE, predict_noise), (WrappersMP.APPLY_MODEL, apply_model)):
        if wrapper not in clone.get_wrappers(kind, KEY):
            clone.add_wrapper_with_key(kind, KEY, wrapper)
    patched = clone.model_options["transformer_options"].get("patches", {})
    if not any(_ours(patch) for patches in patched.values() for patch in patches):
        if hasattr(clone, "set_model_middle_block_after_patch"):  # ComfyUI of 2026
            clone.set_model_middle_block_after_patch(after_middle)
        else:
            clone.set_model_output_block_patch(before_decoder)
    return clone


def steers_of(model: Any) -> tuple[Steer, ...]:
    """The steers a MODEL carries, for reports."""
    return model.model_options.get("transformer_options", {}).get(STEERS, ())


def predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Any:
    """PREDICT_NOISE wrapper: tell the model which conditionings are prompts, in a copy of the options."""
    model_options = model_options or {}
    rows = Rows.of(executor.class_obj, x)
    own = [steer for row in rows.by_uuid.values() for steer in row.steers]
    if own:
        check_steers(own, *family_of(executor.class_obj.model_patcher))
    options = {**model_options.get("transformer_options", {}), ROWS: rows}
    options["patches"] = _once(options.get("patches", {}))
    return executor(x, timestep, {**model_options, "transformer_options": options}, seed)


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
    """APPLY_MODEL wrapper: from sigma and the rows of this batch make the plan that the patch adds."""
    options = dict(transformer_options or {})
    further_out = options.pop(PLAN, None)  # the model and a prompt may both have brought this wrapper
    base = executor.class_obj
    unet = base.diffusion_model
    if hasattr(unet, "channel_mult"):
        timestep = timestep_of(base.model_sampling, t.reshape(-1)[0])
        plan = plan_of(options, x, timestep, len(unet.channel_mult) - 1)
        if plan is not None:
            options[PLAN] = plan
    result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if PLAN in options:
        tell_gates(options[PLAN])
    if further_out is not None:
        take_over(further_out)
    return result


def before_decoder(h: Tensor, hsp: Any, transformer_options: Any) -> tuple[Tensor, Any]:
    """Output-block patch: at the first output block, h is still the mid block's output."""
    plan = transformer_options.get(PLAN)
    if plan is None or transformer_options.get("block") != ("output", 0):
        return h, hsp
    return steered(h, plan), hsp


def after_middle(args: Any) -> Any:
    """Middle-block patch of newer ComfyUI."""
    plan = args["transformer_options"].get(PLAN)
    return args if plan is None else {**args, "h": steered(args["h"], plan)}


def _ours(patch: Any) -> bool:
    return patch is before_decoder or patch is after_middle


def _once(patches: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The patches with ours in them once: the model and several prompts may each have brought it."""
    seen, result = False, {}
    for name in sorted(patches, key=lambda n: n == "output_block_patch"):  # the exact place first, where there is one
        kept = []
        for patch in patches[name]:
            if _ours(patch):
                if seen:
                    continue
                seen = True
            kept.append(patch)
        result[name] = kept
    return result


def timestep_of(sampling: Any, sigma: Tensor) -> float:
    """The training timestep (999 noise .. 0 picture) that a model sampling's sigma stands for, in percent's meaning."""
    if round(float(sampling.timestep(sampling.sigma_max))) == 999:  # SD's own scale; continuous kinds have others
        return float(sampling.timestep(sigma))
    value, low, high = float(sigma), 0.0, 1.0
    for _ in range(20):  # continuous kinds only say percent -> sigma, which falls
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) > value else (low, middle)
    return 999.0 * (1.0 - (low + high) / 2)
