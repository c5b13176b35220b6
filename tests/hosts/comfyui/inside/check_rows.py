"""The row table: whatever the guider, the layout or the sampler, exactly the prompt's rows get the vector.

Whose a row is, is told by its text embedding; h is read by the UNet's own blocks on both sides of the patch.
"""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch
from bench import CELLS, call, column, conditioning, demo, different, free_memory_of, recorded, rows_got, sample, vector
from comfy_extras.nodes_custom_sampler import DualCFGGuider, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg, PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from concept_steer_pack.concept_steer.hosts.comfy import steer_model
from concept_steer_pack.concept_steer.steering import Steer

import nodes as comfy_nodes

GOOD, BAD, OTHER, EMPTY = "a doctor", "blurry", "a pilot", ""
ALL = (GOOD, BAD, OTHER, EMPTY)
V = vector()
C = column(V)


def _steered(rows: Any = "cond", model: Any = None, strength: float = 1.0) -> Any:
    return steer_model(demo()[0] if model is None else model, [Steer(V, strength, rows=rows)])


def _sampled(model: Any, positive: Any = None, added: Any = None, **more: Any) -> str:
    """Sample with KSampler, then check every row."""
    with recorded(model, ALL) as (one, calls):
        sample(one, conditioning(GOOD) if positive is None else positive, conditioning(BAD), **more)
    return rows_got(calls, {GOOD: C, BAD: None} if added is None else added)


def _advanced(guider: Any, sampler: str = "euler", steps: int = 4) -> None:
    sigmas = comfy.samplers.calculate_sigmas(demo()[0].get_model_object("model_sampling"), "normal", steps)
    noise = RandomNoise().get_noise(1)[0]
    chosen = comfy.samplers.sampler_object(sampler)
    SamplerCustomAdvanced().sample(noise, guider, chosen, sigmas, {"samples": torch.zeros(2, 4, CELLS, CELLS)})


def plain_cfg() -> str:
    return _sampled(_steered())


def strength_scales_what_is_added() -> str:
    return _sampled(_steered(strength=-1.5), added={GOOD: column(V, -1.5), BAD: None})


def the_negative_prompt_alone() -> str:
    return _sampled(_steered("uncond"), added={GOOD: None, BAD: C})


def both_rows() -> str:
    return _sampled(_steered("both"), added={GOOD: C, BAD: C})


def cfg_1_runs_the_prompt_only() -> str:
    return _sampled(_steered(), added={GOOD: C}, cfg=1.0)


def low_memory_runs_each_side_apart() -> str:
    with free_memory_of(0):
        measured = _sampled(_steered())
    assert "[0]" in measured and "[1]" in measured and "[1, 0]" not in measured, measured
    return measured


def dual_cfg_steers_both_prompts_and_not_the_negative() -> str:
    measured = []
    for style in ("regular", "nested"):
        with recorded(_steered(), ALL) as (model, calls):
            guider = DualCFGGuider().get_guider(
                model, conditioning(GOOD), conditioning(OTHER), conditioning(BAD), 4.0, 3.0, style
            )[0]
            _advanced(guider)
        measured.append(rows_got(calls, {GOOD: C, OTHER: C, BAD: None}))
    return "; ".join(measured)


def perp_neg_steers_neither_the_negative_nor_the_empty_prompt() -> str:
    with recorded(_steered(), ALL) as (model, calls):
        guider = call(
            PerpNegGuider,
            model=model,
            positive=conditioning(GOOD),
            negative=conditioning(BAD),
            empty_conditioning=conditioning(EMPTY),
            cfg=4.0,
            neg_scale=1.0,
        )
        _advanced(guider)
    return rows_got(calls, {GOOD: C, BAD: None, EMPTY: None})


def the_older_perp_neg_node_too() -> str:
    """It runs its empty prompt by itself, as index 0, and no list of the guider knows it."""
    model = call(PerpNeg, model=_steered(), empty_conditioning=conditioning(EMPTY), neg_scale=1.0)
    measured = _sampled(model, added={GOOD: C, BAD: None, EMPTY: None})
    assert "[0]" in measured, measured
    return measured


def self_attention_guidance_before_and_after_steering() -> str:
    """It runs the negative prompt a second time, as index 0."""
    before = _steered(model=call(SelfAttentionGuidance, model=demo()[0], scale=0.5, blur_sigma=2.0))
    after = call(SelfAttentionGuidance, model=_steered(), scale=0.5, blur_sigma=2.0)
    measured = [_sampled(model) for model in (before, after)]
    assert all("[0]" in text for text in measured), measured
    return "; ".join(measured)


def perturbed_attention_guidance_before_and_after_steering() -> str:
    """It runs the prompt a second time."""
    before = _steered(model=call(PerturbedAttentionGuidance, model=demo()[0], scale=3.0))
    after = call(PerturbedAttentionGuidance, model=_steered(), scale=3.0)
    return "; ".join(_sampled(model) for model in (before, after))


def combined_prompts_are_both_steered() -> str:
    positive = conditioning(GOOD) + conditioning(OTHER)
    return _sampled(_steered(), positive, {GOOD: C, OTHER: C, BAD: None})


def combined_negative_prompts_stay() -> str:
    with recorded(_steered(), ALL) as (model, calls):
        sample(model, conditioning(GOOD), conditioning(BAD) + conditioning(EMPTY))
    return rows_got(calls, {GOOD: C, BAD: None, EMPTY: None})


def _area(text: str, x: int, width: int = 64) -> Any:
    place = {"width": width, "height": 128, "x": x, "y": 0, "strength": 1.0}
    return call(comfy_nodes.ConditioningSetArea, conditioning=conditioning(text), **place)


def areas_on_the_prompt_side() -> str:
    """The negative prompt is then copied into each area, with the area's own id."""
    return _sampled(_steered(), _area(GOOD, 0) + _area(OTHER, 64), {GOOD: C, OTHER: C, BAD: None})


def areas_on_both_sides() -> str:
    with recorded(_steered(), ALL) as (model, calls):
        sample(model, _area(GOOD, 0) + _area(OTHER, 64), _area(BAD, 0, 96) + conditioning(EMPTY))
    return rows_got(calls, {GOOD: C, OTHER: C, BAD: None, EMPTY: None})


def areas_under_dual_cfg() -> str:
    """Index 0 is the negative side here, and the areas copy their ids to the other lists."""
    with recorded(_steered(), ALL) as (model, calls):
        guider = DualCFGGuider().get_guider(
            model, _area(GOOD, 0), conditioning(OTHER), conditioning(BAD), 4.0, 3.0, "regular"
        )[0]
        _advanced(guider)
    return rows_got(calls, {GOOD: C, OTHER: C, BAD: None})


def time_ranges_of_prompts() -> str:
    ranged = comfy_nodes.ConditioningSetTimestepRange()
    positive = ranged.set_range(conditioning(GOOD), 0.0, 0.5)[0] + ranged.set_range(conditioning(OTHER), 0.5, 1.0)[0]
    return _sampled(_steered(), positive, {GOOD: C, OTHER: C, BAD: None}, steps=6)


def masks_of_prompts() -> str:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    masked = comfy_nodes.ConditioningSetMask()
    left = masked.append(conditioning(GOOD), mask, "mask bounds", 1.0)[0]
    right = masked.append(conditioning(OTHER), 1 - mask, "default", 1.0)[0]
    return _sampled(_steered(), left + right, {GOOD: C, OTHER: C, BAD: None})


def batches_of_1_and_3() -> str:
    return "; ".join(_sampled(_steered(), batch=batch) for batch in (1, 3))


def odd_sizes() -> str:
    """136 x 120 and 200 x 72 pixels."""
    return "; ".join(_sampled(_steered(), size=size) for size in ((15, 17), (9, 25)))


def samplers_that_call_twice_a_step() -> str:
    return "; ".join(_sampled(_steered(), sampler=name) for name in ("heun", "dpmpp_2s_ancestral", "dpm_2"))


def samplers_of_other_kinds() -> str:
    names = ("dpmpp_2m", "ddim", "uni_pc", "lcm", "euler_cfg_pp")
    return "; ".join(_sampled(_steered(), sampler=name) for name in names)


def image_to_image() -> str:
    start = torch.randn(2, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(3))
    return _sampled(_steered(), latent=start, denoise=0.5)


def inpainting_with_a_mask() -> str:
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    latent = {"samples": torch.randn(2, 4, CELLS, CELLS), "noise_mask": mask}
    with recorded(_steered(), ALL) as (model, calls):
        comfy_nodes.common_ksampler(
            model, 1, 4, 4.0, "euler", "normal", conditioning(GOOD), conditioning(BAD), latent, denoise=1.0
        )
    return rows_got(calls, {GOOD: C, BAD: None})


def two_passes_of_two_sizes() -> str:
    model = _steered()
    first = sample(model)
    larger = torch.nn.functional.interpolate(first, scale_factor=1.5, mode="bilinear")
    return _sampled(model, latent=larger, denoise=0.6)


def another_model_sampling_after_steering() -> str:
    """ModelSamplingDiscrete and Rescale CFG may come later in the graph; sigma is looked up when the model runs."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG

    rescaled = call(RescaleCFG, model=_steered(), multiplier=0.7)
    zsnr = call(ModelSamplingDiscrete, model=_steered(), sampling="eps", zsnr=False)
    different(sample(rescaled), sample(call(RescaleCFG, model=demo()[0], multiplier=0.7)))
    return "; ".join(_sampled(model) for model in (rescaled, zsnr))


def a_control_net() -> str:
    """Its middle residual is in h before the vector is."""
    import comfy.controlnet
    from comfy.cldm.cldm import ControlNet
    from concept_steer_pack.concept_steer.hosts.comfy_demo import UNET

    config = {k: v for k, v in demo()[0].model.model_config.unet_config.items() if k not in ("out_channels", "dtype")}
    assert config["model_channels"] == UNET["model_channels"]
    config.pop("transformer_depth_output")
    net = ControlNet(**{**config, "hint_channels": 3, "dtype": torch.float32, "operations": comfy.ops.manual_cast})
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    positive, negative = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
        conditioning(GOOD), conditioning(BAD), control, torch.rand(1, 128, 128, 3), 1.0, 0.0, 1.0
    )
    with recorded(_steered(), ALL) as (model, calls):
        controlled = sample(model, positive, negative)
    different(controlled, sample(_steered(), conditioning(GOOD), conditioning(BAD)))
    return rows_got(calls, {GOOD: C, BAD: None})
