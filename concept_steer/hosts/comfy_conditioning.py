"""Steer one CONDITIONING of ComfyUI, so that only this prompt (or this region, or this time range) is steered.

The vector travels in the conditioning; ComfyUI's conditioning hooks bring the wrappers and the patch of `comfy.py`
along when a sampler uses it, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..steering import Steer
from .comfy import apply_model, before_decoder, predict_noise
from .comfy_plan import KEY


def _share_batch(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: our hook has done its work by now; taken off, all prompts share one batch again."""
    from comfy.hooks import HookGroup

    for conds in executor.class_obj.conds.values():
        for cond in conds:
            group = cond.get("hooks")
            if group is None:
                continue
            others = [hook for hook in group.hooks if getattr(hook, "transformers_dict", None) is not BROUGHT]
            if len(others) == len(group.hooks):
                continue
            cond.pop("hooks")
            if others:
                cond["hooks"] = HookGroup()
                for hook in others:
                    cond["hooks"].add(hook)
    return executor(*args, **kwargs)


BROUGHT = {
    "patches": {"output_block_patch": [before_decoder]},
    "wrappers": {
        "predict_noise": {KEY: [predict_noise]},
        "apply_model": {KEY: [apply_model]},
        "outer_sample": {KEY: [_share_batch]},
    },
}


def steer_conditioning(conditioning: Sequence[Any], steers: Sequence[Steer]) -> Any:
    """The CONDITIONING with these steers on each of its entries; the very same object when all strengths are 0.

    `rows` of the steers does not matter here: they act on this conditioning's own rows, wherever it is connected.
    Whether a vector fits the model is known, and checked, when a sampler runs.
    """
    active = tuple(steer for steer in steers if steer.strength != 0)
    if not active:
        return conditioning
    from comfy.hooks import HookGroup, TransformerOptionsHook, set_hooks_for_conditioning

    group = HookGroup()
    group.add(TransformerOptionsHook(transformers_dict=BROUGHT))
    entries = [[text, {**values, KEY: (*values.get(KEY, ()), *active)}] for text, values in conditioning]
    return set_hooks_for_conditioning(entries, group)
