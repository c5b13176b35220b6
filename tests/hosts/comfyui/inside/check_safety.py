"""The safety switch through ComfyUI's own samplers: it does what it says, and whatever goes around it is an error."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from bench import (
    CELLS,
    call,
    conditioning,
    demo,
    different,
    free_memory_of,
    raises,
    same,
    sample,
    vector,
)
from check_learning import _compiled
from check_safe_latent_diffusion import BAD, GOOD, OTHER, _advanced, _controlled, _drawn, _host, _noise, _settings
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_custom_sampler import BasicGuider, DisableNoise, DualCFGGuider
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from concept_steer_pack.concept_steer.guidance.safe_latent_diffusion import SafeLatentDiffusion
from concept_steer_pack.concept_steer.hosts.comfy import steer_model, steer_pictures
from concept_steer_pack.concept_steer.hosts.comfy_conditioning import steer_conditioning
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.hosts.comfy_guidance import safe_model
from concept_steer_pack.concept_steer.hosts.comfy_safety import guard_of, safe
from concept_steer_pack.concept_steer.safety import Presence, SafeConcept, SafetySet, SafetySettings, plan
from concept_steer_pack.concept_steer.safety.safety_set import SHIPPED, Strength
from concept_steer_pack.concept_steer.sampling import sample as core_sample
from concept_steer_pack.concept_steer.steering import Steer
from concept_steer_pack.nodes.common import register_folder
from concept_steer_pack.nodes.safety import SafetyCheck, SafetySteer

import nodes as comfy_nodes

OPEN, SHUT = -1e6, 1e6  # thresholds that every picture passes, or none
TOLERANCE = 1e-2  # of latents up to about 5


def _set(threshold: float = OPEN, family: str = "demo", channels: int = 192) -> SafetySet:
    """Two categories with vectors of their own."""
    concepts = {}
    for seed, name in enumerate(("alcohol", "weapons")):
        made = vector(seed, channels, family, 0.5)
        reading = torch.full((1, 1, channels), 1.0 + seed)
        gate = Presence(reading, torch.zeros(1, 1), torch.ones(1, 1), (500.0,), threshold)
        levels = {level: Strength(0.5, threshold) for level in ("gentle", "standard", "strict")}
        concepts[name] = SafeConcept(name, name, made, gate, levels)
    return SafetySet("made by a test", concepts)


def _guarded(model: Any = None, threshold: float = OPEN, **settings: Any) -> Any:
    """Vectors under guard, that act on every picture."""
    given = SafetySettings(**{"method": "vectors", **settings})
    return safe(demo()[0] if model is None else model, demo()[1], given, [_set(threshold)])[0]


def _by_hand(model: Any = None) -> Any:
    """The same vectors without gate and guard."""
    return steer_model(demo()[0] if model is None else model, [Steer(vector(seed), 0.5) for seed in (0, 1)])


def _node(model: Any = None, given: SafetySet | None = None, **settings: Any) -> Any:
    register_folder()
    widgets = {"level": "standard", "method": "automatic", **settings}
    model = demo()[0] if model is None else model
    return SafetySteer.execute(model=model, clip=demo()[1], safety_set=given, **widgets)


# --- it changes nothing


def the_guard_keeps_every_bit_and_counts_the_runs() -> str:
    steered, model = _by_hand(), _guarded()
    for settings in ({}, {"cfg": 1.0}, {"sampler": "heun"}, {"steps": 1}, {"size": (12, 20), "batch": 3}):
        same(_drawn(model, **settings), _drawn(steered, **settings))
    with free_memory_of(0):  # every conditioning by itself
        same(_drawn(model), _drawn(steered))
    runs = list(guard_of(model).runs)
    counts = [(run.pictures, run.evaluations) for run in runs]
    assert counts == [(2, 4), (2, 4), (2, 7), (2, 1), (3, 4), (2, 4)], counts
    assert all(run.gate["pictures"] == run.gate["fired_pictures"] == run.pictures for run in runs), runs
    assert [run.gate["fired_steps"] for run in runs] == [8, 8, 8, 2, 12, 8], runs  # Heun comes back to its steps
    return f"{counts}"


def other_nodes_and_samplers_get_through() -> str:
    """Guidance nodes with passes of their own, three conditionings, ranges of steps, regions, every sampler's way."""
    add: dict[str, Callable[[Any], Any]] = {
        "RescaleCFG": lambda m: call(RescaleCFG, model=m, multiplier=0.7),
        "FreeU": lambda m: call(FreeU, model=m, b1=1.1, b2=1.2, s1=0.9, s2=0.2),
        "CFGZeroStar": lambda m: call(CFGZeroStar, model=m),
        "PAG": lambda m: call(PerturbedAttentionGuidance, model=m, scale=2.0),
        "SAG": lambda m: call(SelfAttentionGuidance, model=m, scale=0.5, blur_sigma=2.0),
        "SLD": lambda m: safe_model(m, demo()[1], _settings()),
    }
    for node in add.values():
        _drawn(node(_guarded()))
        _drawn(_guarded(node(demo()[0])))
    perp = {"positive": conditioning(GOOD), "negative": conditioning(BAD), "empty_conditioning": conditioning("")}
    _advanced(call(PerpNegGuider, model=_guarded(), **perp, cfg=4.0, neg_scale=1.0))
    _advanced(BasicGuider().get_guider(_guarded(), conditioning(GOOD))[0])
    for style in ("regular", "nested"):
        three = conditioning(GOOD), conditioning(OTHER), conditioning(BAD)
        _advanced(DualCFGGuider().get_guider(_guarded(), *three, 4.0, 3.0, style)[0])
    early, late = (
        comfy_nodes.NODE_CLASS_MAPPINGS["ConditioningSetTimestepRange"]().set_range(conditioning(text), *window)[0]
        for text, window in ((GOOD, (0.0, 0.5)), (OTHER, (0.5, 1.0)))
    )
    _drawn(_guarded(), positive=[*early, *late])
    left = comfy_nodes.ConditioningSetArea().append(conditioning(GOOD), 64, 128, 0, 0, 1.0)[0]
    _drawn(_guarded(), positive=[*left, *conditioning(OTHER)])
    right = comfy_nodes.ConditioningSetArea().append(conditioning(OTHER), 64, 128, 64, 0, 1.0)[0]
    _drawn(_guarded(method="sld"), positive=[*left, *right])
    samplers = ("heunpp2", "dpm_2", "dpm_fast", "dpm_adaptive", "uni_pc", "euler_cfg_pp", "dpmpp_3m_sde")
    for name in samplers:
        _drawn(_guarded(), sampler=name)
    return f"{', '.join([*add, *samplers])}"


def image_to_image_gets_through() -> None:
    model, given = _guarded(), torch.randn(1, 4, CELLS, CELLS)
    _drawn(model, latent=given, denoise=0.5)
    assert guard_of(model).runs[-1].pictures == 1
    guider = comfy.samplers.CFGGuider(model)  # a schedule without a step draws nothing, so it is no run
    guider.set_conds(conditioning(GOOD), conditioning(BAD))
    _advanced(guider, sigmas=torch.zeros(1), noise=call(DisableNoise))
    assert len(guard_of(model).runs) == 1


def a_compiled_unet_has_no_more_graph_breaks_under_guard() -> str:
    plain, under = _compiled(_by_hand().clone()), _compiled(_guarded().clone())
    assert under[0] <= plain[0] and under[1] <= plain[1], (under[:2], plain[:2])
    return f"(breaks, graphs) {plain[:2]}, under guard {under[:2]}"


# --- the switch


def the_shipped_set_gives_the_cores_latents() -> str:
    """Gates and vectors of the set that comes with the demo model, on a prompt that it acts on and one that it spares.

    On the same noise and noise levels; the same pictures fire at the same number of steps.
    """
    said = []
    for text, acts in ((GOOD, True), ("a cat", False)):
        made = plan(SafetySettings(method="vectors"), "demo", 192)
        given: dict[str, Any] = {"seeds": [0, 0], "steps": 10, "guidance": 5.0, "start_latents": _noise()}
        core = core_sample(ComfyDenoiser(*demo()), [text, text], steers=made.steers, negative=BAD, **given)
        model, _ = safe(*demo()[:2], SafetySettings(method="vectors"), folders=[SHIPPED])
        host = _host("euler", None, 10, 5.0, model, text=text)
        worst, gate = float((core - host).abs().max()), dict(guard_of(model).runs[-1].gate)
        assert worst < TOLERANCE, worst
        assert gate == made.firings.to_dict() and bool(gate["fired_pictures"]) == acts, (gate, made.firings.to_dict())
        said.append(f"{text}: max difference {worst:.2g}, {gate['fired_steps']} of {gate['steps']} picture-steps")
    return "; ".join(said)


def off_hands_on_the_very_model() -> None:
    found = _node(given=_set(), level="off")
    assert found[0] is demo()[0] and found[1] == "Safety is off."


def a_shut_gate_keeps_every_bit() -> str:
    model = _guarded(threshold=SHUT)
    same(_drawn(model), _drawn(demo()[0]))
    with free_memory_of(0):
        same(_drawn(model), _drawn(demo()[0]))
    gate = dict(guard_of(model).runs[-1].gate)
    assert (gate["fired_pictures"], gate["fired_steps"], gate["pictures"]) == (0, 0, 2), gate
    return f"{gate}"


def guidance_through_the_switch_is_safe_latent_diffusion() -> str:
    """Alone, and beside vectors."""
    texts = SafetySettings(method="sld", texts={"violence": "weapons, blood"}, categories=("violence",))
    model, made = safe(demo()[0], demo()[1], texts)
    assert made.method == "sld" and made.guide.text == "an image showing weapons, blood" and not made.steers
    by_hand = safe_model(demo()[0], demo()[1], SafeLatentDiffusion.preset("strong", text=made.guide.text))
    same(_drawn(model), _drawn(by_hand))
    both, made = safe(demo()[0], demo()[1], SafetySettings("strict"), [_set()])
    assert made.method == "both"
    guide = safe_model(_by_hand(), demo()[1], made.guide)
    same(_drawn(both), _drawn(guide))
    return different(_drawn(both), _drawn(_guarded()))


def it_composes_with_other_steering_in_any_order() -> str:
    """Concept Steer, FreeU and a ControlNet's residuals, before and after; vectors of pictures and of prompts."""
    added = [Steer(vector(3))]
    freeu = lambda m: call(FreeU, model=m, b1=1.1, b2=1.2, s1=0.9, s2=0.2)  # noqa: E731
    positive, negative = _controlled(conditioning(GOOD), conditioning(BAD))
    before = freeu(steer_model(_guarded(), added))
    after = freeu(_guarded(steer_model(demo()[0], added)))
    by_hand = freeu(steer_model(_by_hand(), added))
    found = sample(before, positive, negative)
    same(found, sample(after, positive, negative))
    rounding = float((found - sample(by_hand, positive, negative)).abs().max())  # another order of the sum
    assert rounding < 1e-3, rounding
    outermost = _guarded(steer_model(freeu(demo()[0]), added))
    sample(outermost, positive, negative)  # FreeU comes first there, so h is another: only that it is let through
    own = [[Steer(vector(4))], []]  # Fair Sampling's way: the pictures of a batch have steers of their own
    fair, fair_by_hand = (sample(steer_pictures(one, own), positive, negative) for one in (_guarded(), _by_hand()))
    assert float((fair - fair_by_hand).abs().max()) < 1e-3
    texts = [steer_conditioning(conditioning(GOOD), [Steer(vector(5))]), negative]
    model = _guarded()
    prompted, prompted_by_hand = (sample(one, *texts) for one in (model, _by_hand()))
    assert float((prompted - prompted_by_hand).abs().max()) < 1e-3
    assert [run.gate["fired_steps"] for run in guard_of(model).runs] == [8]  # the prompt brings our wrapper once more
    return different(found, sample(_guarded(), positive, negative))


def two_branches_share_nothing() -> str:
    model = demo()[0]
    branches = [model, _guarded(), _guarded(threshold=SHUT), _guarded(method="sld"), _guarded(categories=("alcohol",))]
    wanted = [_drawn(one) for one in branches]
    for i in (4, 2, 3, 1, 0, 3, 0, 4):
        same(_drawn(branches[i]), wanted[i])
    same(_drawn(branches[1].clone().clone()), wanted[1])
    same(wanted[2], wanted[0])
    fired = [sum(run.gate.get("fired_pictures", 0) for run in guard_of(one).runs) for one in branches[1:]]
    assert fired == [3 * 2, 0, 0, 3 * 2], fired
    return "; ".join(different(wanted[0], wanted[i]) for i in (1, 3, 4))


def a_checked_picture_tells_of_its_run() -> str:
    """Safety Check at the safe model, and what it says without one."""
    model = _guarded()
    images = demo()[2].decode(_drawn(model))
    widgets = {"detector": "demo judges", "on_flag": "withhold"}
    SafetyCheck.hidden = SimpleNamespace(extra_pnginfo={}, prompt=None, unique_id="7")
    found = SafetyCheck.execute(images=images, threshold=1.0, safe_model=model, **widgets)
    assert "2 of 2 pictures" in found[2] and found[1] == [False, False] and torch.equal(found[0], images)
    told = SafetyCheck.hidden.extra_pnginfo["concept_steer_safety"]["7"]
    assert (told["level"], told["method"], told["categories"]) == ("standard", "vectors", ["alcohol", "weapons"]), told
    assert told["gate"]["fired_pictures"] == 2 and told["detector"]["done"] == ["kept", "kept"], told
    SafetyCheck.hidden.unique_id = "8"
    flagged = SafetyCheck.execute(images=images, threshold=1e-9, **widgets)
    assert flagged[1] == [True, True] and "2 withheld" in flagged[2] and "not known" in flagged[2]
    assert not torch.equal(flagged[0], images) and flagged[0].shape == images.shape
    both = SafetyCheck.hidden.extra_pnginfo["concept_steer_safety"]
    assert both["7"] is told and set(both["8"]) == {"detector"}  # each check has its own
    only = SafetyCheck.execute(images=images[:1], safe_model=model, **{**widgets, "detector": "none"})
    assert "not looked at" in only[2] and "drew 2 pictures; here are 1" in only[2] and only[1] == [False], only[2]
    same(only[0], images[:1])
    return found[2]


def after_an_error_or_an_interrupt_the_next_picture_is_right() -> str:
    model, calls = _guarded(), []
    wanted = _drawn(model)

    def bomb(h: Any, hsp: Any, options: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise ValueError("bomb")
        if len(calls) == 16:
            comfy.model_management.interrupt_current_processing(True)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return h, hsp

    broken = model.clone()
    broken.set_model_output_block_patch(bomb)
    raises(ValueError, lambda: _drawn(broken), "bomb")
    raises(comfy.model_management.InterruptProcessingException, lambda: _drawn(broken))
    assert "concept_steer_safety_watch" not in broken.model_options["transformer_options"]
    assert len(guard_of(model).runs) == 1
    same(_drawn(model), wanted)
    return different(wanted, _drawn(demo()[0]))
