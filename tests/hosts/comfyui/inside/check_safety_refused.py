"""The safety switch in ComfyUI fails closed: what keeps it from working is an error, and no picture comes out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from bench import call, conditioning, demo, output_folder, raises, replaced, same
from check_safe_latent_diffusion import BAD, GOOD, OTHER, _advanced, _drawn
from check_safety import _guarded, _node, _set
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from concept_steer_pack.concept_steer.errors import ConceptSteerError, FamilyMismatch, SafetyError
from concept_steer_pack.concept_steer.hosts.comfy_safety import guard_of, safe
from concept_steer_pack.concept_steer.safety import SafetySettings
from concept_steer_pack.nodes.safety import SafetyCheck
from torch import Tensor

import nodes as comfy_nodes

METHODS = ("vectors", "sld", "both")


def safety_steer_twice_is_refused() -> str:
    return raises(SafetyError, lambda: _guarded(_guarded()), "already")


def without_vectors_and_guidance_there_is_no_model() -> str:
    """A model that predicts a flow, of which there is no set."""
    flow = call(ModelSamplingSD3, model=demo()[0], shift=3.0)
    said = raises(SafetyError, lambda: safe(flow, demo()[1], SafetySettings()), "nothing is drawn")
    raises(SafetyError, lambda: safe(demo()[0], demo()[1], SafetySettings(method="vectors")), "no safety vectors")
    raises(SafetyError, lambda: safe(flow, demo()[1], SafetySettings(method="sld")), "not possible")
    raises(SafetyError, lambda: safe(flow, demo()[1], SafetySettings(method="both"), [_set()]), "not possible")
    return said


def a_set_of_another_family_is_refused() -> str:
    other = _set(family="sd1", channels=1280)
    raises(FamilyMismatch, lambda: _node(given=other), "made by a test")
    other_v2 = _set(family="sd2", channels=1280)
    return raises(FamilyMismatch, lambda: _node(given=other_v2, level="strict", method="both"), "made by a test")


def an_unknown_category_is_refused() -> str:
    for method in ("learned vectors", "both", "automatic"):
        said = raises(
            SafetyError, lambda m=method: _node(given=_set(), method=m, categories="alcohol, poison"), "poison"
        )
    raises(SafetyError, lambda: _node(method="Safe Latent Diffusion", categories="poison"), "poison")
    raises(ConceptSteerError, lambda: _node(given=_set(), texts="alcohol beer"), "not understood")
    return said


def a_damaged_set_in_the_library_is_refused() -> str:
    """One bit more is no set any more, and one with NaN is none; it is not passed over for another method."""
    folder = output_folder() / "sets"
    path = _set().save(folder / "one.safety.safetensors", overwrite=True)
    good = path.read_bytes()
    settings = SafetySettings()
    model, plan = safe(demo()[0], demo()[1], settings, folders=[folder])
    same(_drawn(model), _drawn(_guarded(method="both")))
    assert plan.method == "both" and plan.set.name == "made by a test"
    nan = bytearray(good)
    nan[-4:] = b"\x00\x00\xc0\x7f"
    for data in (good[:-7], bytes(nan), b"PK" + good, b""):
        path.write_bytes(data)
        said = raises(SafetyError, lambda: safe(demo()[0], demo()[1], settings, folders=[folder]), "one.safety")
    path.unlink()
    return said


def a_guider_that_predicts_by_itself_gives_no_picture() -> str:
    class Own(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            return torch.zeros_like(x)

    return _refused(Own)


def a_guider_that_tells_of_no_evaluation_gives_no_picture() -> str:
    class Own(comfy.samplers.CFGGuider):
        def __call__(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            return self.inner_model.apply_model(x, timestep, c_crossattn=conditioning(GOOD)[0][0].expand(2, -1, -1))

    return _refused(Own)


def a_guider_that_skips_comfyuis_evaluation_gives_no_picture() -> str:
    class Own(comfy.samplers.CFGGuider):
        def __call__(self, *args: Any, **more: Any) -> Any:
            return self.predict_noise(*args, **more)

    return _refused(Own)


def a_guider_that_samples_by_itself_gives_no_picture() -> str:
    class Own(comfy.samplers.CFGGuider):
        def sample(self, noise: Any, latent: Any, sampler: Any, sigmas: Any, *rest: Any, **more: Any) -> Any:
            self.conds = {k: [c.copy() for c in conds] for k, conds in self.original_conds.items()}
            return self.outer_sample(noise, latent, sampler, sigmas, *rest, **more)

    return _refused(Own)


def _refused(kind: Any) -> str:
    """By every method, vectors or not."""
    said = []
    for method in METHODS:
        guider = kind(_guarded(method=method))
        guider.set_conds(conditioning(GOOD), conditioning(BAD))
        guider.set_cfg(4.0)
        said.append(raises(ConceptSteerError, lambda g=guider: _advanced(g), "that node out", "could not act"))
        assert not guard_of(guider.model_patcher).runs
    return said[0]


def a_replaced_call_of_the_unet_gives_no_picture() -> str:
    """What fits ComfyUI's single slot for the UNet's call: a cache, another engine, a call without the options."""

    def engine(apply: Any, given: Any) -> Tensor:
        return given["input"] * 0.1

    def bare(apply: Any, given: Any) -> Tensor:
        return apply.__self__.apply_model(given["input"], given["timestep"], c_crossattn=given["c"]["c_crossattn"])

    def inner(apply: Any, given: Any) -> Tensor:
        rest = {k: v for k, v in given["c"].items() if k in ("c_crossattn", "transformer_options")}
        return apply.__self__._apply_model(given["input"], given["timestep"], **rest)

    cached: dict[int, Tensor] = {}

    def cache(apply: Any, given: Any) -> Tensor:
        """Every second evaluation of as many rows gives what the one before gave."""
        rows = len(given["input"])
        if rows in cached:
            return cached.pop(rows)
        cached[rows] = apply(given["input"], given["timestep"], **given["c"])
        return cached[rows]

    ways = (engine, bare, inner, cache)
    return [_wrapped(wrapper, method, cached.clear) for wrapper in ways for method in METHODS][-1]


def _wrapped(wrapper: Any, method: str, between: Any = lambda: None) -> str:
    """The error with the wrapper on the model before the switch comes, which it also has after."""
    model, later = demo()[0].clone(), _guarded(method=method)
    for one in (model, later):
        one.set_model_unet_function_wrapper(wrapper)
    said = raises(SafetyError, lambda: _drawn(_guarded(model, method=method)), "Take that node out")
    between()
    raises(SafetyError, lambda: _drawn(later), "Take that node out")
    between()
    return said


def an_unknown_layout_of_the_batch_gives_no_picture() -> str:
    """One row too many, and a batch in pieces of which each still says that it is whole."""

    def longer(apply: Any, given: Any) -> Tensor:
        x, t = (torch.cat([given[name], given[name][:1]]) for name in ("input", "timestep"))
        context = given["c"]["c_crossattn"]
        rest = {**given["c"], "c_crossattn": torch.cat([context, context[:1]])}
        return apply(x, t, **rest)[:-1]

    def pieces(apply: Any, given: Any) -> Tensor:
        """Two pictures of one prompt look like one picture of two."""
        c, parts = given["c"], []
        for rows in torch.arange(len(given["input"])).split(2):
            mine = {**c, "c_crossattn": c["c_crossattn"][rows]}
            parts.append(apply(given["input"][rows], given["timestep"][rows], **mine))
        return torch.cat(parts)

    return [_layout(wrapper, method) for wrapper in (longer, pieces) for method in METHODS][-1]


def _layout(wrapper: Any, method: str) -> str:
    model = _guarded(method=method)
    model.set_model_unet_function_wrapper(wrapper)
    return raises(ConceptSteerError, lambda: _drawn(model), "conditionings", "Another node")


def one_part_of_a_prompt_predicted_elsewhere_gives_no_picture() -> str:
    """A wrapper that keeps the second region's prediction from an earlier step."""

    def partly(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any) -> Any:
        return executor(model, [conds[0][:1], *conds[1:]], x, timestep, options)

    model = _guarded()
    model.add_wrapper_with_key("calc_cond_batch", "test", partly)
    left, right = (
        comfy_nodes.ConditioningSetArea().append(conditioning(text), 64, 128, x, 0, 1.0)[0]
        for text, x in ((GOOD, 0), (OTHER, 64))
    )
    return raises(SafetyError, lambda: _drawn(model, positive=[*left, *right]), "prompt's parts")


def numbers_that_are_none_give_no_picture() -> str:
    said = []
    for method in METHODS:
        model = _guarded(method=method)
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
        said.append(raises(SafetyError, lambda m=model: _drawn(m), "NaN"))
        assert not guard_of(model).runs
    return said[0]


def a_detector_that_is_missing_or_fails_gives_no_picture() -> str:
    SafetyCheck.hidden = SimpleNamespace(extra_pnginfo=None, prompt=None, unique_id="1")
    widgets = {"images": torch.rand(1, 64, 64, 3), "on_flag": "mark"}
    said = raises(SafetyError, lambda: SafetyCheck.execute(detector="Q16", **widgets), "Q16")
    raises(SafetyError, lambda: SafetyCheck.execute(detector="none", **widgets), "nothing to check")
    widgets["images"] = torch.full((1, 64, 64, 3), float("nan"))
    raises(SafetyError, lambda: SafetyCheck.execute(detector="demo judges", **widgets), "NaN")
    return said


def a_model_that_did_not_draw_the_pictures_gives_no_picture() -> str:
    """No switch on it, nothing drawn yet, or pictures that the detector knows nothing of."""
    images = torch.rand(2, 64, 64, 3)
    widgets = {"images": images, "detector": "demo judges", "on_flag": "mark"}
    raises(SafetyError, lambda: SafetyCheck.execute(safe_model=demo()[0], **widgets), "no Safety Steer")
    raises(SafetyError, lambda: SafetyCheck.execute(safe_model=_guarded(), **widgets), "drawn nothing")
    model = _guarded()
    _drawn(model)
    SafetyCheck.hidden = SimpleNamespace(extra_pnginfo=None, prompt=None, unique_id="1")
    SafetyCheck.execute(safe_model=model, **widgets)
    with _known_as(model, "sd1"):
        return raises(SafetyError, lambda: SafetyCheck.execute(safe_model=model, **widgets), "another (sd1)")


def _known_as(model: Any, family: str) -> Any:
    """Within, the model is one of another family."""
    from concept_steer_pack.concept_steer.hosts import comfy

    return replaced(comfy, "family_of", lambda _: (family, 1280))
