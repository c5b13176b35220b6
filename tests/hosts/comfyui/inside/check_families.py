"""SD 1.x, SD 2.x and SDXL as ComfyUI builds them, with random weights and small depth; and models that have no h."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
from bench import call, column, different, raises, same, vector, vector_for
from comfy_extras.nodes_freelunch import FreeU
from concept_steer_pack.concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer_pack.concept_steer.hosts.comfy import family_of, steer_model
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.learn import learn_difference, learn_score
from concept_steer_pack.concept_steer.steering import Steer
from torch import Tensor

import nodes as comfy_nodes

CPU = torch.device("cpu")
PAIRS = [("a doctor", "a woman doctor")]
SMALL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 4],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 0],
    "transformer_depth_output": [0, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "legacy": False,
    "adm_in_channels": None,
}
# how ComfyUI tells that an SD 2.x model predicts v
V_MARK = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}
KINDS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "sd1": (comfy.supported_models.SD15, {"context_dim": 768}, {}),
    "sd2": (comfy.supported_models.SD20, {"context_dim": 1024, "use_linear_in_transformer": True}, V_MARK),
    "sdxl": (
        comfy.supported_models.SDXL,
        {
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        },
        {},
    ),
}


class FakeClip:
    """Embeddings that depend on the prompt only."""

    def __init__(self, width: int) -> None:
        self.width = width

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, text: str, return_pooled: bool = False) -> Any:
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        embeds = torch.randn(1, 77, self.width, generator=generator)
        return (embeds, torch.randn(1, 1280, generator=generator)) if return_pooled else embeds

    def conditioning(self, text: str) -> Any:
        embeds, pooled = self.encode_from_tokens(text, return_pooled=True)
        return [[embeds, {"pooled_output": pooled}]]


def _patcher(config: Any, state: Any) -> Any:
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(dict(state), "", device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


@contextmanager
def _model(kind: str) -> Iterator[tuple[Any, FakeClip]]:
    make, extra, state = KINDS[kind]
    patcher = _patcher(make({**SMALL, **extra}), state)
    try:
        yield patcher, FakeClip(extra["context_dim"])
    finally:
        comfy.model_management.unload_all_models()
        del patcher
        gc.collect()


def _sample(model: Any, clip: FakeClip) -> Tensor:
    positive, negative = clip.conditioning("good"), clip.conditioning("bad")
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    return comfy_nodes.common_ksampler(model, 1, 2, 4.0, "euler", "normal", positive, negative, latent)[0]["samples"]


def _steers(kind: str) -> str:
    with _model(kind) as (model, clip):
        assert family_of(model) == (kind, 1280), family_of(model)
        plain = _sample(model, clip)
        assert bool(torch.isfinite(plain).all())
        measured = different(_sample(steer_model(model, [Steer(vector_for(model))]), clip), plain)
        same(_sample(model, clip), plain)
        for other in {"sd1", "sd2", "sdxl", "demo"} - {kind}:
            wrong = vector(0, 192 if other == "demo" else 1280, other)
            raises(FamilyMismatch, lambda v=wrong: steer_model(model, [Steer(v)]), f"({other})", f"({kind})")
        return measured


def _learns(kind: str) -> str:
    with _model(kind) as (model, clip):
        denoiser = ComfyDenoiser(model, clip, size=32)
        assert denoiser.schedule.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
        x, cond = torch.randn(2, 4, 4, 4), denoiser.encode_text(["a doctor", "a pilot"])
        whole, halves = denoiser.predict(x, 500.0, cond), denoiser.from_h(denoiser.to_h(x, 500.0, cond)).float()
        same(whole, halves)
        before = {name: value.clone() for name, value in list(denoiser.unet.state_dict().items())[:8]}
        quick = learn_difference(denoiser, PAIRS, seeds=2)
        best = learn_score(denoiser, PAIRS, steps=2, trajectories=4, sample_steps=2, batch=2)
        assert quick.vector.family == best.vector.family == kind
        assert tuple(best.vector.tensor.shape) == (1280,) and len(best.losses) == 2
        assert all(torch.equal(value, denoiser.unet.state_dict()[name]) for name, value in before.items())
        assert not any(p.requires_grad and not p.is_inference() for p in denoiser.unet.parameters())
        steered = _sample(steer_model(model, [Steer(best.vector)]), clip)
        return f"{different(steered, _sample(model, clip), 1e-6)}, halves == whole, {best.seconds:.1f} s"


def sd1_is_detected_and_steered() -> str:
    return _steers("sd1")


def sd2_is_detected_and_steered() -> str:
    return _steers("sd2")


def sdxl_is_detected_and_steered() -> str:
    return _steers("sdxl")


def sd1_learns_in_inference_mode() -> str:
    return _learns("sd1")


def sd2_learns_in_inference_mode() -> str:
    return _learns("sd2")


def sdxl_learns_in_inference_mode() -> str:
    return _learns("sdxl")


def freeu_before_and_after_steering() -> str:
    """It scales half the channels of h at the same place; what was added before it is scaled with them."""
    with _model("sd1") as (model, clip):
        v = vector_for(model)
        c, half, factor = column(v), 640, 1.3
        settings = {"b1": factor, "b2": 1.0, "s1": 1.0, "s2": 1.0}
        first = steer_model(call(FreeU, model=model, **settings), [Steer(v, rows="both")])
        last = call(FreeU, model=steer_model(model, [Steer(v, rows="both")]), **settings)
        results: dict[str, tuple[Tensor, Tensor]] = {}
        for name, one in (("freeu first", first), ("freeu last", last)):
            results[name] = _h_of_first_call(one, clip)
        worst = 0.0
        for name, (before, after) in results.items():
            scale = torch.ones(1, 1280, 1, 1)
            scale[:, :half] = factor
            want = before * scale + c if name == "freeu first" else (before + c) * scale
            worst = max(worst, float((after - want).abs().max()))
        assert worst < 1e-5, worst
        return f"off by {worst:.2g}; {different(results['freeu first'][1], results['freeu last'][1])}"


def _h_of_first_call(model: Any, clip: FakeClip) -> tuple[Tensor, Tensor]:
    unet, seen = model.model.diffusion_model, {}

    def keep(name: str, value: Callable[[], Tensor]) -> None:
        seen.setdefault(name, value().clone())

    hooks = [
        unet.middle_block[-1].register_forward_hook(lambda m, a, out: keep("before", lambda: out)),
        unet.output_blocks[0][0].register_forward_pre_hook(lambda m, a: keep("after", lambda: a[0][:, :1280])),
    ]
    try:
        _sample(model, clip)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["before"], seen["after"]


def a_transformer_model_is_refused_by_name() -> str:
    config = comfy.supported_models.Flux(
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 8,
            "context_in_dim": 8,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
        }
    )
    model = _patcher(config, {})
    raises(ConceptSteerError, lambda: ComfyDenoiser(model), "Flux")
    return raises(ConceptSteerError, lambda: steer_model(model, [Steer(vector())]), "Flux", "UNet", "SDXL")


def a_unet_without_a_mid_block_is_refused() -> str:
    narrow = {"model_channels": 32, "channel_mult": [1, 2], "context_dim": 768, "transformer_depth_middle": -2}
    model = _patcher(comfy.supported_models.SD15({**SMALL, **narrow}), {})
    return raises(ConceptSteerError, lambda: steer_model(model, [Steer(vector())]), "no mid block")


def an_unlisted_unet_gets_a_family_of_its_own() -> str:
    narrow = {"model_channels": 32, "channel_mult": [1, 2], "context_dim": 64}
    model = _patcher(comfy.supported_models.SD15({**SMALL, **narrow}), {})
    assert family_of(model) == ("custom:64x64", 64), family_of(model)
    clip = FakeClip(64)
    return different(_sample(steer_model(model, [Steer(vector_for(model))]), clip), _sample(model, clip))
