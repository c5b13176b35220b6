"""Safe Latent Diffusion through ComfyUI's own samplers: the same numbers as the core, the right rows, no traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from bench import (
    CELLS,
    call,
    column,
    conditioning,
    demo,
    different,
    free_memory_of,
    raises,
    recorded,
    rows_got,
    same,
    sample,
    vector,
)
from check_families import _model
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_custom_sampler import BasicGuider, DualCFGGuider, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_model_advanced import ModelSamplingSD3, RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from concept_steer_pack.concept_steer.errors import ConceptSteerError
from concept_steer_pack.concept_steer.guidance.safe_latent_diffusion import PRESETS, SafeLatentDiffusion, SafetyState
from concept_steer_pack.concept_steer.hosts.comfy import steer_model
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.hosts.comfy_guidance import guider_of, safe_model
from concept_steer_pack.concept_steer.sampling import sample as core_sample
from concept_steer_pack.concept_steer.sampling import timesteps
from concept_steer_pack.concept_steer.steering import Steer
from concept_steer_pack.nodes.safe_latent_diffusion import SafeLatentDiffusionGuider, SafeLatentDiffusionModel
from torch import Tensor

import nodes as comfy_nodes

GOOD, BAD, OTHER, TEXT = "a fight", "blurry", "a party", "weapons, blood, alcohol"
ALL = (GOOD, BAD, OTHER, TEXT, "")
PARITY = 0.1  # of latents up to about 5; mu rises by up to 5000 per unit and jumps at its threshold, so rounding grows


def _settings(name: str = "medium", **changes: Any) -> SafeLatentDiffusion:
    return SafeLatentDiffusion.preset(name, text=TEXT, **changes)


def _safe(model: Any = None, name: str = "medium", **changes: Any) -> Any:
    return safe_model(demo()[0] if model is None else model, demo()[1], _settings(name, **changes))


def _drawn(model: Any, **more: Any) -> Tensor:
    return sample(model, more.pop("positive", None) or conditioning(GOOD), conditioning(BAD), **more)


def _advanced(guider: Any, sampler: str = "euler", steps: int = 4, sigmas: Any = None, noise: Any = None) -> Tensor:
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(demo()[0].get_model_object("model_sampling"), "normal", steps)
    noise = RandomNoise().get_noise(1)[0] if noise is None else noise
    chosen = comfy.samplers.sampler_object(sampler)
    empty = {"samples": torch.zeros(2, 4, CELLS, CELLS)}
    return SamplerCustomAdvanced().sample(noise, guider, chosen, sigmas, empty)[0]["samples"]


# --- the same numbers


def _noise() -> Tensor:
    return torch.randn(2, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(3))


def _host(
    sampler: str,
    guide: SafeLatentDiffusion | None,
    steps: int,
    cfg: float,
    model: Any = None,
    callback: Any = None,
    text: str = GOOD,
) -> Tensor:
    """ComfyUI's latents, at the noise levels of the core's steps."""
    model = safe_model(*demo()[:2], guide) if model is None else model
    sampling = model.get_model_object("model_sampling")
    times = timesteps(ComfyDenoiser(model).schedule, steps)
    sigmas = torch.tensor([float(sampling.sigma(torch.tensor(t))) for t in times] + [0.0])
    found = comfy.sample.sample_custom(
        model, _noise(), cfg, comfy.samplers.sampler_object(sampler), sigmas, conditioning(text), conditioning(BAD),
        torch.zeros_like(_noise()), callback=callback, seed=1,
    )  # fmt: skip
    return model.model.process_latent_in(found)


def _core(guide: SafeLatentDiffusion, steps: int, cfg: float) -> Tensor:
    """The core's latents, from the same noise."""
    given: dict[str, Any] = {"seeds": [0, 0], "steps": steps, "guidance": cfg, "start_latents": _noise()}
    return core_sample(ComfyDenoiser(*demo()), [GOOD, GOOD], guide=guide, negative=BAD, **given)


def _parity(sampler: str, guide: SafeLatentDiffusion, steps: int = 10, cfg: float = 5.0) -> str:
    core, host = _core(guide, steps, cfg), _host(sampler, guide, steps, cfg)
    off = _host(sampler, SafeLatentDiffusion(scale=0.0), steps, cfg)
    worst, effect = float((core - host).abs().max()), float((off - host).abs().max())
    mean = float((core - host).abs().mean())
    assert worst < PARITY and mean < PARITY / 50 and effect > 30 * worst, (worst, mean, effect)
    return f"max difference {worst:.2g}, mean {mean:.2g} (effect {effect:.2g})"


def every_preset_gives_the_cores_latents() -> str:
    return "; ".join(f"{name} {_parity('euler', _settings(name))}" for name in PRESETS)


def every_step_is_the_cores_formula() -> str:
    """On ComfyUI's own predictions step by step, so that rounding cannot grow over the run."""
    measured, steps = [], 10
    for name in PRESETS:
        guide, found = _settings(name), []
        with recorded(safe_model(*demo()[:2], guide), ALL) as (model, calls):
            _host("euler", guide, steps, 5.0, model, lambda i, x0, x, n, to=found: to.append(x0.clone()))
        run, off = guide.begin(range(2), steps, 5.0), []
        for step, (one, denoised) in enumerate(zip(calls, found, strict=True)):
            rows = {text: torch.tensor([i for i, whose in enumerate(one.prompts) if whose == text]) for text in ALL}
            x, extra = one.x[rows[GOOD]], one.prediction[rows[TEXT]][None] if len(rows[TEXT]) else None
            assert run.needs(step) == (extra is not None), (name, step)
            combined = run.combine(step, 0.0, one.prediction[rows[BAD]], one.prediction[rows[GOOD]], extra)
            off.append((x - one.sigma * combined - denoised).abs().flatten())
        beyond = float((torch.cat(off) > 1e-3).float().mean())
        assert beyond < 1e-3, (name, beyond, float(torch.cat(off).max()))
        measured.append(f"{name} max {float(torch.cat(off).max()):.2g}, {beyond:.2%} beyond 0.001")
    return "; ".join(measured)


def ddim_gives_the_cores_latents() -> str:
    return _parity("ddim", _settings("strong"))


def a_held_direction_gives_the_cores_latents() -> str:
    return _parity("euler", _settings("strong", every=3))


def cfg_1_gives_the_cores_latents() -> str:
    return _parity("euler", _settings("max"), cfg=1.0)


def the_guider_gives_the_models_latents() -> str:
    guider = guider_of(demo()[0], conditioning(GOOD), conditioning(BAD), conditioning(TEXT), 4.0, _settings())
    plain = guider_of(demo()[0], conditioning(GOOD), conditioning(BAD), conditioning(TEXT), 4.0, _settings(scale=0.0))
    found = _advanced(guider)
    same(found, _drawn(_safe()))
    same(_advanced(plain), _drawn(demo()[0]))
    return different(found, _advanced(plain))


def the_nodes_do_what_their_functions_do() -> str:
    numbers = {"warmup": 5.0, "scale": 300.0, "threshold": 0.02, "momentum": 0.4, "beta": 0.5}
    widgets = {"preset": "strong", "every": 1, **numbers}
    model, clip, _ = demo()
    found = _drawn(call(SafeLatentDiffusionModel, model=model, clip=clip, text=TEXT, **widgets))
    same(found, _drawn(_safe(name="strong")))
    custom = call(SafeLatentDiffusionModel, model=model, clip=clip, text=TEXT, **{**widgets, "preset": "custom"})
    same(_drawn(custom), _drawn(_safe(**numbers)))
    conds = {"positive": conditioning(GOOD), "negative": conditioning(BAD), "safety": conditioning(TEXT)}
    same(_advanced(call(SafeLatentDiffusionGuider, model=model, **conds, cfg=4.0, **widgets)), found)
    return different(found, _drawn(custom))


def rows_that_do_not_fit_together_give_nearly_the_same() -> str:
    whole = _drawn(_safe())
    with free_memory_of(0):
        apart = _drawn(_safe())
    worst = float((whole - apart).abs().max())
    assert worst < 1e-2, worst
    return f"max difference {worst:.2g}"


# --- the right rows


def three_rows_in_one_batch() -> str:
    with recorded(_safe(), ALL) as (model, calls):
        _drawn(model)
    assert [sorted(one.prompts) for one in calls] == [sorted([GOOD, BAD, TEXT] * 2)] * 4
    return f"{len(calls)} calls of 6 rows, chunks {calls[0].chunks}"


def a_warmup_without_momentum_has_no_third_row() -> str:
    with recorded(_safe(name="weak"), ALL) as (model, calls):
        _drawn(model, steps=10)
    counts = [one.prompts.count(TEXT) // 2 for one in calls]
    assert counts == [0, 0, 0, *[1] * 7], counts  # 15 of 50 steps; this scheduler's percents are i / 9
    return str(counts)


def every_second_step_has_a_third_row() -> str:
    with recorded(_safe(every=2), ALL) as (model, calls):
        _drawn(model, steps=6)
    counts = [one.prompts.count(TEXT) // 2 for one in calls]
    assert counts == [1, 0, 1, 0, 1, 0], counts
    return str(counts)


def cfg_1_runs_the_negative_prompt_too() -> str:
    with recorded(_safe(), ALL) as (model, calls):
        safe = _drawn(model, cfg=1.0)
    assert sorted(calls[-1].prompts) == sorted([GOOD, BAD, TEXT] * 2)
    return different(safe, _drawn(demo()[0], cfg=1.0))


def a_guider_without_a_negative_prompt_gets_an_empty_one() -> str:
    with recorded(_safe(), ALL) as (model, calls):
        safe = _advanced(BasicGuider().get_guider(model, conditioning(GOOD))[0])
    assert sorted(calls[-1].prompts) == sorted([GOOD, "", TEXT] * 2)
    return different(safe, _advanced(BasicGuider().get_guider(demo()[0], conditioning(GOOD))[0]))


def steers_never_touch_the_safety_text() -> str:
    """Whichever node comes first, and also when both sides of CFG are steered."""
    v, c, measured = vector(), column(vector()), []
    for rows, added in (("cond", {GOOD: c, BAD: None}), ("uncond", {GOOD: None, BAD: c}), ("both", {GOOD: c, BAD: c})):
        steers = [Steer(v, rows=rows)]  # type: ignore[arg-type]
        before, after = steer_model(_safe(), steers), _safe(steer_model(demo()[0], steers))
        guider = guider_of(
            steer_model(demo()[0], steers), conditioning(GOOD), conditioning(BAD), conditioning(TEXT), 4.0, _settings()
        )
        for model in (before, after, guider.model_patcher):
            with recorded(model, ALL) as (one, calls):
                if model is guider.model_patcher:
                    guider.model_patcher, guider.model_options = one, one.model_options
                    _advanced(guider)
                else:
                    _drawn(one)
            measured.append(rows_got(calls, {**added, TEXT: None}))
        same(_drawn(before), _drawn(after))
    return measured[-1]


def regions_have_the_safety_text_each() -> str:
    left, right = (
        comfy_nodes.ConditioningSetArea().append(conditioning(text), 64, 128, x, 0, 1.0)[0]
        for text, x in ((GOOD, 0), (OTHER, 64))
    )
    with recorded(_safe(), ALL) as (model, calls):
        safe = _drawn(model, positive=[*left, *right], steps=2)
    sizes = [tuple(one.x.shape[2:]) for one in calls for name in one.prompts if name == TEXT]
    assert sizes and set(sizes) == {(16, 8)} and len(sizes) == 2 * 2 * 2, sizes
    return different(safe, _drawn(demo()[0], positive=[*left, *right], steps=2))


def parts_of_one_prompt_share_one_safety_row() -> str:
    with recorded(_safe(), ALL) as (model, calls):
        _drawn(model, positive=[*conditioning(GOOD), *conditioning(OTHER)])
    assert {one.prompts.count(TEXT) for one in calls} == {2}
    return f"{calls[0].chunks}"


def _controlled(positive: Any, negative: Any) -> tuple[Any, Any]:
    """Both with a ControlNet of random weights, made for the demo model."""
    import comfy.controlnet
    from comfy.cldm.cldm import ControlNet

    config = {k: v for k, v in demo()[0].model.model_config.unet_config.items() if k not in ("out_channels", "dtype")}
    config.pop("transformer_depth_output")
    net = ControlNet(**{**config, "hint_channels": 3, "dtype": torch.float32, "operations": comfy.ops.manual_cast})
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    hint = torch.rand(1, 128, 128, 3, generator=generator)
    return comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, 1.0, 0.0, 1.0)


def a_control_net_holds_for_the_safety_text() -> str:
    """All three rows have it; else the difference of predictions would show the control and not the text."""
    positive, negative = _controlled(conditioning(GOOD), conditioning(BAD))
    seen = []

    def controlled(executor: Any, x: Any, t: Any, concat: Any, context: Any, residuals: Any, *rest: Any, **more: Any):
        seen.append((x.shape[0], residuals is not None))
        return executor(x, t, concat, context, residuals, *rest, **more)

    model = _safe().clone()
    model.add_wrapper_with_key("apply_model", "test", controlled)
    safe = sample(model, positive, negative)
    assert set(seen) == {(6, True)}, seen  # all rows in one batch, so with one control
    return different(safe, sample(demo()[0], positive, negative))


def sdxl_and_sd2_are_guided_too() -> str:
    """SDXL has a pooled prompt beside; SD 2.x predicts v."""
    measured = []
    for kind in ("sdxl", "sd2"):
        with _model(kind) as (model, clip):
            clip.encode_from_tokens_scheduled = clip.conditioning  # type: ignore[attr-defined]
            safe = safe_model(model, clip, _settings("max"))
            latent = {"samples": torch.zeros(1, 4, 4, 4)}
            drawn = [
                comfy_nodes.common_ksampler(
                    one, 1, 2, 4.0, "euler", "normal", clip.conditioning("good"), clip.conditioning("bad"), latent
                )[0]["samples"]
                for one in (model, safe)
            ]
            measured.append(f"{kind} {different(*drawn)}")
    return ", ".join(measured)


# --- beside other nodes


def other_guidance_nodes_compose() -> str:
    """Each before and after; each changes the safe picture, the safe picture changes each, and no call is lost."""
    nodes = {
        "RescaleCFG": lambda m: call(RescaleCFG, model=m, multiplier=0.7),
        "FreeU": lambda m: call(FreeU, model=m, b1=1.1, b2=1.2, s1=0.9, s2=0.2),
        "CFGZeroStar": lambda m: call(CFGZeroStar, model=m),
        "PAG": lambda m: call(PerturbedAttentionGuidance, model=m, scale=2.0),
        "SAG": lambda m: call(SelfAttentionGuidance, model=m, scale=0.5, blur_sigma=2.0),
    }
    measured = []
    safe = _drawn(_safe(), steps=3)
    for name, add in nodes.items():
        before, after = _safe(add(demo()[0])), add(_safe())
        with recorded(before, ALL) as (model, calls):
            one = _drawn(model, steps=3)
        assert sum(c.prompts.count(TEXT) for c in calls) == 2 * 3, name
        worst = float((one - _drawn(after, steps=3)).abs().max())
        assert worst < 1e-4, (name, worst)
        different(one, safe)
        measured.append(f"{name} {different(one, _drawn(add(demo()[0]), steps=3))}")
    return "; ".join(measured)


def guiders_of_three_compose() -> str:
    measured = []
    for style in ("regular", "nested"):
        makes = lambda m, s=style: DualCFGGuider().get_guider(  # noqa: E731
            m, conditioning(GOOD), conditioning(OTHER), conditioning(BAD), 4.0, 3.0, s
        )[0]
        measured.append(different(_advanced(makes(_safe())), _advanced(makes(demo()[0]))))
    perp = {"positive": conditioning(GOOD), "negative": conditioning(BAD), "empty_conditioning": conditioning("")}
    makes = lambda m: call(PerpNegGuider, model=m, **perp, cfg=4.0, neg_scale=1.0)  # noqa: E731
    with recorded(_safe(), ALL) as (model, calls):
        safe = _advanced(makes(model))
    assert sum(c.prompts.count(TEXT) for c in calls) == 2 * 4
    return "; ".join([*measured, different(safe, _advanced(makes(demo()[0])))])


# --- samplers that call the model more than once a step


@contextmanager
def _evaluations() -> Iterator[list[tuple[int, bool]]]:
    """(step, whether it counts for the momentum) of each evaluation."""
    seen: list[tuple[int, bool]] = []
    real = SafetyState.gamma

    def told(self: Any, step: int, *rest: Any, keep: bool = True) -> Tensor:
        seen.append((step, keep))
        return real(self, step, *rest, keep=keep)

    SafetyState.gamma = told  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SafetyState.gamma = real  # type: ignore[method-assign]


def second_order_samplers_advance_the_momentum_once_a_step() -> str:
    middle = [(0, True), (0, False), (1, True), (1, False), (2, True), (2, False), (3, True)]
    wanted = {
        "euler": [(0, True), (1, True), (2, True), (3, True)],
        "heun": [(0, True), (1, True), (1, True), (2, True), (2, True), (3, True), (3, True)],
        "dpm_2": middle,
        "dpmpp_sde": middle,
        "dpmpp_2s_ancestral": [(0, True), (1, True), (1, True), (2, True), (2, True), (3, True), (3, True)],
    }
    for name, expected in wanted.items():
        with _evaluations() as seen:
            _drawn(_safe(), sampler=name)
        assert seen == expected, (name, seen)
    return ", ".join(wanted)


def samplers_of_all_kinds_are_guided() -> str:
    names = ("heunpp2", "dpm_fast", "dpm_adaptive", "lcm", "uni_pc", "euler_cfg_pp", "seeds_2", "dpmpp_3m_sde")
    for name in names:
        different(_drawn(_safe(), sampler=name), _drawn(demo()[0], sampler=name))
    return ", ".join(names)


def image_to_image_is_guarded_from_its_first_step() -> str:
    """Its noise level is past the warm-up already."""
    latent = torch.randn(1, 4, CELLS, CELLS)
    with recorded(_safe(name="weak"), ALL) as (model, calls):
        safe = _drawn(model, latent=latent, denoise=0.5)
    assert all(TEXT in one.prompts for one in calls)
    return different(safe, _drawn(demo()[0], latent=latent, denoise=0.5))


# --- no traces


def switched_off_it_is_the_model_itself() -> None:
    assert _safe(scale=0.0) is demo()[0]
    assert _safe(warmup=50.0) is demo()[0]


def two_runs_and_two_branches_share_nothing() -> str:
    model = demo()[0]
    plain, safe, strong = model, _safe(), _safe(name="strong")
    before = [_drawn(one) for one in (plain, safe, strong)]
    for one, wanted in ((strong, before[2]), (safe, before[1]), (safe.clone().clone(), before[1]), (plain, before[0])):
        same(_drawn(one), wanted)
    guider = guider_of(model, conditioning(GOOD), conditioning(BAD), conditioning(TEXT), 4.0, _settings())
    same(_advanced(guider), before[1])
    same(_advanced(guider), before[1])
    return different(before[1], before[2])


def after_an_error_or_an_interrupt_nothing_is_left() -> str:
    model = demo()[0]
    plain, safe = _drawn(model), _drawn(_safe())
    guider = guider_of(model, conditioning(GOOD), conditioning(BAD), conditioning(TEXT), 4.0, _settings())
    wanted, calls = _advanced(guider), []

    def bomb(h: Any, hsp: Any, options: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise ValueError("bomb")
        if len(calls) == 16:
            comfy.model_management.interrupt_current_processing(True)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return h, hsp

    broken = _safe().clone()
    broken.set_model_output_block_patch(bomb)
    own = guider.model_patcher, guider.model_options
    guider.model_patcher, guider.model_options = broken, broken.model_options
    raises(ValueError, lambda: _advanced(guider), "bomb")
    raises(comfy.model_management.InterruptProcessingException, lambda: _advanced(guider))
    assert "concept_steer_safety_run" not in broken.model_options["transformer_options"]
    guider.model_patcher, guider.model_options = own
    same(_advanced(guider), wanted)
    same(_drawn(model), plain)
    same(_drawn(_safe()), safe)
    return different(plain, safe)


# --- fails closed


def the_method_twice_is_refused() -> str:
    return raises(ConceptSteerError, lambda: _safe(_safe()), "already")


def a_model_that_predicts_a_flow_is_refused() -> str:
    flow = call(ModelSamplingSD3, model=demo()[0], shift=3.0)
    raises(ConceptSteerError, lambda: _safe(flow), "flow")
    later = call(ModelSamplingSD3, model=_safe(), shift=3.0)
    return raises(ConceptSteerError, lambda: _drawn(later), "flow")


def a_guider_that_goes_its_own_way_gives_no_picture() -> str:
    class Own(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            return torch.zeros_like(x)

    guider = Own(_safe())
    guider.set_conds(conditioning(GOOD), conditioning(BAD))
    return raises(ConceptSteerError, lambda: _advanced(guider), "could not act")


def a_part_of_the_batch_gives_no_picture() -> str:
    """As context windows do."""

    def half(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Any) -> Any:
        parts = [executor(model, conds, x[i : i + 1], timestep[i : i + 1], options) for i in range(x.shape[0])]
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    model = demo()[0].clone()
    model.add_wrapper_with_key("calc_cond_batch", "test", half)
    return raises(ConceptSteerError, lambda: _drawn(_safe(model)), "context windows")
