"""Latent Guard through ComfyUI's own samplers: who is not flagged keeps every bit, and what cannot be judged is no
picture."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from bench import CELLS, conditioning, demo, different, free_memory_of, raises, replaced, same
from check_gated_guidance import _Rows
from check_safe_latent_diffusion import BAD, GOOD, _advanced, _drawn, _host, _noise
from check_safety import SHUT, TOLERANCE, _guarded
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import RandomNoise, SamplerCustomAdvanced
from concept_steer_pack.concept_steer.demo import latent_clip as embedded
from concept_steer_pack.concept_steer.demo.latent_guard import load_guard
from concept_steer_pack.concept_steer.errors import ConceptSteerError, FamilyMismatch, SafetyError, SettingError
from concept_steer_pack.concept_steer.hosts import comfy_latent_guard
from concept_steer_pack.concept_steer.hosts.comfy import steer_model
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.hosts.comfy_latent_guard import look_at_pictures, looking_of
from concept_steer_pack.concept_steer.hosts.comfy_safety import guard_of
from concept_steer_pack.concept_steer.latent_clip import LatentCheck, draw_guarded
from concept_steer_pack.concept_steer.safety import SafetySettings, plan
from concept_steer_pack.concept_steer.safety.safety_set import SHIPPED
from concept_steer_pack.nodes.common import register_folder
from concept_steer_pack.nodes.latent_clip import Loaded
from concept_steer_pack.nodes.latent_guard import LatentGuardNode, guard_for
from concept_steer_pack.nodes.safety import SafetyCheck
from torch import Tensor

ALL, NONE = 0.0, 1.0  # thresholds
SAMPLERS = ("heun", "dpm_2", "dpm_fast", "dpm_adaptive", "uni_pc", "euler_ancestral", "dpmpp_3m_sde", "euler_cfg_pp")


@cache
def _towers() -> Loaded:
    clip = embedded.load()
    return Loaded(clip, comfy.model_patcher.ModelPatcher(clip, torch.device("cpu"), torch.device("cpu")), True)


def _looking(threshold: float, answer: Any = "stop", at: float = 0.5, model: Any = None, clip: Any = None) -> Any:
    """The embedded model, or another, under the shipped check."""
    given = guard_for(_towers(), "", threshold)
    check = LatentCheck(answer, at)
    model = demo()[0] if model is None else model
    return look_at_pictures(model, _towers().patcher, given, check, clip, folders=[SHIPPED])[0]


def _between(**more: Any) -> float:
    """A threshold that one of the two pictures of `_drawn` is above."""
    model = _looking(NONE)
    _drawn(model, **more)
    low, high = sorted(one.score for one in looking_of(model).runs[-1].verdicts)
    assert high - low > 1e-3, (low, high)
    return (low + high) / 2


def _kept(seen: list[Tensor], step: int, clean: Tensor, x: Tensor, steps: int) -> None:
    seen.append(clean)


# --- stop


def what_is_not_flagged_keeps_every_bit() -> str:
    model = _looking(NONE)
    for settings in ({}, {"cfg": 1.0}, {"steps": 1}, {"size": (16, 24), "batch": 3}, {"denoise": 0.5}):
        same(_drawn(model, **settings), _drawn(demo()[0], **settings))
    for sampler in SAMPLERS:
        same(_drawn(model, sampler=sampler), _drawn(demo()[0], sampler=sampler))
    with free_memory_of(0):
        same(_drawn(model), _drawn(demo()[0]))
    runs = list(looking_of(model).runs)
    assert [run.step for run in runs[:2]] == [2, 2] and runs[2].steps == 1, runs
    assert all(not any(run.flagged) for run in runs)
    return f"{len(runs)} runs"


def of_a_batch_only_the_flagged_picture_is_withheld() -> str:
    """Whatever the sampler; the other keeps the bits that it has without the check."""
    said = []
    for sampler in ("euler", *SAMPLERS):
        model = _looking(_between(sampler=sampler))
        found, plain = _drawn(model, sampler=sampler), _drawn(demo()[0], sampler=sampler)
        look = looking_of(model).runs[-1]
        assert sorted(look.done) == ["kept", "withheld"] and look.saved == 0, look
        gone = look.done.index("withheld")
        assert not found[gone].any()
        same(found[1 - gone], plain[1 - gone])
        said.append(f"{sampler} {gone}")
    return ", ".join(said)


def a_withheld_picture_is_in_no_preview_after_the_look() -> None:
    """Not in the second output of SamplerCustomAdvanced either, and also where all are withheld."""
    for threshold in (_between(), ALL):
        model = _looking(threshold)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning(GOOD), conditioning(BAD))
        guider.set_cfg(4.0)
        empty = torch.zeros(2, 4, CELLS, CELLS)
        noise = RandomNoise().get_noise(1)[0].generate_noise({"samples": empty})
        seen: list[Tensor] = []
        told: Any = partial(_kept, seen)
        guider.sample(noise, empty, comfy.samplers.sampler_object("euler"), sigmas, callback=told)
        gone = [i for i, flag in enumerate(looking_of(model).runs[-1].withheld) if flag]
        assert gone and all(one.any() for one in seen[:2])
        assert all(not one[gone].any() for one in seen[2:]), "a preview shows what is withheld"
        both = SamplerCustomAdvanced().sample(
            RandomNoise().get_noise(1)[0], guider, comfy.samplers.sampler_object("euler"), sigmas, {"samples": empty}
        )
        assert not any(one["samples"][gone].any() for one in both)


def when_all_are_flagged_sampling_ends_there() -> str:
    said = []
    for at, rows in ((0.0, 1), (0.5, 5), (1.0, 8)):
        model = _looking(ALL, at=at)
        with _Rows(model) as counted:
            found = _drawn(model, steps=8)
        look = looking_of(model).runs[-1]
        assert not found.any() and counted.count == rows * 2 * 2, (at, counted.count)
        assert look.saved == 8 - rows and (look.saved == 0 or f"{look.saved} steps were saved" in look.text())
        said.append(f"at {at:g}: {counted.count} of 32 rows")
    same(_drawn(demo()[0]), _drawn(_looking(NONE)))
    return "; ".join(said)


def behind_safety_steer_both_do_their_part() -> str:
    """A run that ends early is a run for the switch as well, before it or behind it."""
    plain = _drawn(_guarded(method="both"))
    model = _looking(NONE, model=_guarded(method="both"))
    same(_drawn(model), plain)
    for both in (_looking(ALL, model=_guarded(method="both")), _guarded(_looking(ALL), method="both")):
        assert not _drawn(both).any()
        assert guard_of(both).runs[-1].pictures == 2 and looking_of(both).runs[-1].saved == 1
    return different(plain, _drawn(demo()[0]))


# --- steer


def only_the_flagged_picture_is_steered() -> str:
    """With vectors alone, with guidance too, behind a switch whose gates are shut, and with other steering on it."""
    said, threshold = [], _between()
    for way in ("vectors", "guidance", "behind a shut switch", "with steering"):
        model = demo()[0]
        if way == "behind a shut switch":
            model = _guarded(method="both", threshold=SHUT)
        elif way == "with steering":
            model = steer_model(model, [plan(SafetySettings(), "demo", 192).steers[0]])
        mixed = _looking(threshold, "steer", model=model, clip=demo()[1] if way == "guidance" else None)
        for memory in (None, 0):
            with nullcontext() if memory is None else free_memory_of(memory):
                found, plain = _drawn(mixed), _drawn(model)
            look = looking_of(mixed).runs[-1]
            if way == "with steering":
                changed = [not torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
                assert changed == list(look.flagged), (way, changed, look.flagged)
                continue
            assert sorted(look.done) == ["kept", "steered"], (way, look)
            acted = look.done.index("steered")
            same(found[1 - acted], plain[1 - acted])
            said.append(f"{way}: {different(found[acted], plain[acted])}")
    return "; ".join(said[::2])


def the_core_finds_the_same_pictures_and_draws_the_same() -> str:
    """On the core's noise and noise levels: stop, and steer with vectors (guidance sets in a step later in here)."""
    said = []
    for answer in ("stop", "steer"):
        guard = load_guard(_towers().clip, threshold=_core_threshold())
        harder = plan(SafetySettings(method="vectors"), "demo", 192) if answer == "steer" else None
        given: dict[str, Any] = {"seeds": [0, 0], "steps": 10, "guidance": 5.0, "start_latents": _noise()}
        check: Any = LatentCheck(answer, 0.5)  # type: ignore[arg-type]
        core = draw_guarded(
            ComfyDenoiser(*demo()), guard, [GOOD, GOOD], check=check, harder=harder, negative=BAD, **given
        )
        model = _looking(guard.threshold, answer)
        host = _host("euler", None, 10, 5.0, model)
        look = looking_of(model).runs[-1]
        assert (look.flagged, look.done) == (core.flagged, core.done) and sum(look.flagged) == 1, (look, core.flagged)
        scores = zip(look.verdicts, core.verdicts, strict=True)
        assert max(abs(a.score - b.score) for a, b in scores) < 1e-3
        away = float((core.latents - host).abs().max())
        assert away < TOLERANCE, away
        said.append(f"{answer}: max difference {away:.2g}")
    return "; ".join(said)


@cache
def _core_threshold() -> float:
    model = _looking(NONE)
    _host("euler", None, 10, 5.0, model)
    return sum(one.score for one in looking_of(model).runs[-1].verdicts) / 2


def without_anything_to_steer_with_there_is_no_model() -> str:
    only_guidance = _guarded(method="sld")
    said = raises(SafetyError, lambda: _looking(NONE, "steer", model=only_guidance), "guides all of them")
    _looking(NONE, model=only_guidance)
    given, check = guard_for(_towers(), "", 0.5), LatentCheck("steer")
    raises(SafetyError, lambda: look_at_pictures(demo()[0], _towers().patcher, given, check), "nothing is drawn")
    return said


# --- what cannot be judged


def another_latent_space_names_both() -> str:
    with replaced(comfy_latent_guard, "family_of", lambda _: ("sd1", 1280)):
        return raises(FamilyMismatch, lambda: _looking(0.5), "Stable Diffusion 1", "demo")


def a_second_check_and_a_further_try_are_refused() -> str:
    raises(SettingError, lambda: _looking(0.5, "retry"), "inside a sampler")
    return raises(SafetyError, lambda: _looking(0.5, model=_looking(0.5)), "already")


def numbers_that_are_none_give_no_picture() -> str:
    """At the look, and after it."""
    for bad in (2, 3):
        model, calls = _looking(0.5), []

        def broken(args: Any, calls: list[int] = calls, bad: int = bad) -> Any:
            calls.append(1)
            return args["denoised"] * (float("nan") if len(calls) == bad + 1 else 1.0)

        model.set_model_sampler_post_cfg_function(broken)
        said = raises(SafetyError, lambda m=model: _drawn(m), "NaN")
        assert not looking_of(model).runs
    return said


def a_batch_that_is_cut_gives_no_picture() -> str:
    def half(executor: Any, x: Any, timestep: Any, options: Any = None, seed: Any = None) -> Any:
        return torch.cat([executor(part, timestep[:1], options, seed) for part in x.split(1)])

    model = demo()[0].clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", half)
    return raises(SafetyError, lambda: _drawn(_looking(0.5, model=model)), "draws 2 pictures", "predicts 1")


def a_run_that_is_never_looked_at_gives_no_picture() -> str:
    class Own(comfy.samplers.CFGGuider):
        def __call__(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            return self.predict_noise(x, timestep, model_options, seed)

    guider = Own(_looking(0.5))
    guider.set_conds(conditioning(GOOD), conditioning(BAD))
    guider.set_cfg(4.0)
    said = raises(SafetyError, lambda: _advanced(guider), "never saw")
    assert not looking_of(guider.model_patcher).runs
    return said


def a_steer_that_is_bypassed_gives_no_picture() -> str:
    """By another engine in the place of the UNet, with and without the options that tell of the pictures."""

    def engine(apply: Any, given: Any) -> Tensor:
        return given["input"] * 0.1

    def bare(apply: Any, given: Any) -> Tensor:
        return apply.__self__.apply_model(given["input"], given["timestep"], c_crossattn=given["c"]["c_crossattn"])

    for way in (engine, bare):
        model = _looking(ALL, "steer")
        model.set_model_unet_function_wrapper(way)
        said = raises(SafetyError, lambda m=model: _drawn(m), "was not steered")
    return said


def after_an_error_the_next_picture_is_right() -> None:
    model = _looking(_between())
    wanted, broken = _drawn(model), model.clone()

    def bomb(args: Any) -> Any:
        raise ValueError("bomb")

    broken.set_model_sampler_post_cfg_function(bomb)
    raises(ValueError, lambda: _drawn(broken), "bomb")
    same(_drawn(model), wanted)
    assert len(looking_of(model).runs) == 2


# --- the nodes


def the_nodes_tell_what_was_found_and_show_the_card() -> str:
    register_folder()
    guarded = LatentGuardNode.execute(demo()[0], _towers(), "stop", 0.5, threshold=_between())
    assert "withheld" in guarded[1] and "2%" in guarded[1] and "50%" in guarded[1], guarded[1]
    images = demo()[2].decode(_drawn(guarded[0]))
    gone = looking_of(guarded[0]).runs[-1].done.index("withheld")
    SafetyCheck.hidden = SimpleNamespace(extra_pnginfo={}, prompt=None, unique_id="7")
    widgets: dict[str, Any] = {"on_flag": "mark", "safe_model": guarded[0]}
    found = SafetyCheck.execute(images=images, detector="none", **widgets)
    assert found[1][gone] and not found[1][1 - gone], found[1]
    same(found[0][1 - gone], images[1 - gone])
    assert float(found[0][gone].std()) < float(found[0][1 - gone].std()) and not torch.equal(
        found[0][gone], images[gone]
    )
    told = SafetyCheck.hidden.extra_pnginfo["concept_steer_safety"]["7"]["latent_check"]
    assert told["done"][gone] == "withheld" and told["found"][gone] and told["step"] == 3 and told["steps"] == 4, told
    assert "flagged 1 of 2" in found[2] and "step 3 of 4" in found[2] and "not known" not in found[2], found[2]
    SafetyCheck.execute(images=images, detector="demo judges", **widgets)
    raises(SafetyError, lambda: SafetyCheck.execute(images=images[:1], detector="none", **widgets), "all pictures")
    fresh = LatentGuardNode.execute(demo()[0], _towers(), "stop", 0.5)[0]
    widgets["safe_model"] = fresh
    raises(SafetyError, lambda: SafetyCheck.execute(images=images, detector="none", **widgets), "drawn nothing")
    return found[2]


def own_texts_are_what_it_looks_for() -> str:
    own = guard_for(_towers(), "cats: a cat", 0.05)
    assert own.categories == ("cats",) and own.limits is None
    raises(ConceptSteerError, lambda: guard_for(_towers(), "cats a cat", 0.5), "not understood")
    said = []
    for text, flagged in (("a cat", True), ("a doctor", False)):
        model = look_at_pictures(demo()[0], _towers().patcher, own, LatentCheck())[0]
        _drawn(model, positive=conditioning(text), steps=8)
        look = looking_of(model).runs[-1]
        assert all(flag == flagged for flag in look.flagged), (text, look.verdicts)
        said.append(f"{text}: {[round(one.score, 3) for one in look.verdicts]}")
    return "; ".join(said)
