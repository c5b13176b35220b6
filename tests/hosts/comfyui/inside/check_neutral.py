"""Steering a MODEL keeps its promises: neutral settings, sums, order, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import torch
from bench import CELLS, demo, different, raises, same, sample, vector
from comfy.model_management import InterruptProcessingException
from concept_steer_pack.concept_steer.hosts.comfy import steer_model, steer_pictures, steers_of
from concept_steer_pack.concept_steer.hosts.comfy_conditioning import steer_conditioning
from concept_steer_pack.concept_steer.schedule import Schedule
from concept_steer_pack.concept_steer.steering import Steer
from concept_steer_pack.nodes.steer import ConceptSteer, ConceptSteerPrompt

SETTINGS: dict[str, Any] = {"start": 0.0, "end": 1.0, "fade": 0.0, "operator": "add"}


def strength_0_gives_the_very_model() -> None:
    model = demo()[0]
    assert steer_model(model, [Steer(vector(), 0.0), Steer(vector(1), 0.0)]) is model
    assert steer_model(model, []) is model
    node = ConceptSteer.execute(model=model, vector=vector(), strength=0.0, rows="prompt", **SETTINGS)
    assert node[0] is model


def strength_0_gives_the_very_conditioning() -> None:
    text = [[torch.zeros(1, 77, 128), {}]]
    assert steer_conditioning(text, [Steer(vector(), 0.0)]) is text
    assert ConceptSteerPrompt.execute(conditioning=text, vector=vector(), strength=0.0, **SETTINGS)[0] is text


def outside_the_window_every_bit_stays() -> None:
    model = demo()[0]
    steered = steer_model(model, [Steer(vector(), 1.0, Schedule(0.4, 0.41))])
    assert steered is not model
    same(sample(steered), sample(model))


def a_window_ends_where_it_says() -> str:
    """Two windows side by side act as one over both, and each alone acts in its own half only."""
    model, v = demo()[0], vector()
    first, second = Steer(v, 1.0, Schedule(0.0, 0.5)), Steer(v, 1.0, Schedule(0.5, 1.0))
    whole = sample(steer_model(model, [Steer(v)]))
    same(sample(steer_model(model, [first, second])), whole)
    different(sample(steer_model(model, [first])), whole)
    return different(sample(steer_model(model, [second])), whole)


def the_window_is_in_percent_of_sigma_whatever_the_number_of_steps() -> None:
    model = demo()[0]
    sampling = model.get_model_object("model_sampling")
    from concept_steer_pack.concept_steer.hosts.comfy import timestep_of
    from concept_steer_pack.concept_steer.schedule import percent_of_timestep

    for percent in (0.0, 0.25, 0.5, 0.75, 1.0):
        sigma = torch.tensor(max(float(sampling.percent_to_sigma(percent)), float(sampling.sigma_min)))
        sigma = sigma.clamp(max=float(sampling.sigma_max))
        found = percent_of_timestep(timestep_of(sampling, sigma))
        assert abs(found - percent) < 2e-3, f"{percent} became {found}"


def twice_the_vector_at_1_is_the_vector_at_2() -> None:
    model, v = demo()[0], vector()
    same(sample(steer_model(model, [Steer(v * 2)])), sample(steer_model(model, [Steer(v, 2.0)])))


def two_vectors_may_come_in_either_order() -> str:
    model, a, b = demo()[0], Steer(vector(1)), Steer(vector(2), 0.7)
    one = sample(steer_model(steer_model(model, [a]), [b]))
    same(sample(steer_model(steer_model(model, [b]), [a])), one)
    same(sample(steer_model(model, [a, b])), one)
    return different(sample(steer_model(model, [a])), one)


def one_vector_twice_counts_twice() -> None:
    model, s = demo()[0], Steer(vector(1))
    both = sample(steer_model(steer_model(model, [s]), [s]))
    worst = float((both - sample(steer_model(model, [Steer(vector(1), 2.0)]))).abs().max())
    assert worst < 1e-4, worst


def strength_acts() -> str:
    model = demo()[0]
    return different(sample(steer_model(model, [Steer(vector())])), sample(model))


def the_original_model_stays_unsteered() -> None:
    model = demo()[0]
    before = sample(model)
    sample(steer_model(model, [Steer(vector())]))
    same(sample(model), before)
    assert steers_of(model) == ()


def clones_of_clones_keep_their_steers() -> None:
    model, s = demo()[0], Steer(vector())
    steered = steer_model(model, [s])
    again = steered.clone().clone()
    assert steers_of(again) == (s,)
    same(sample(again), sample(steered))
    more = steer_model(again, [Steer(vector(1))])
    assert len(steers_of(steered)) == 1 and len(steers_of(more)) == 2


def a_deep_copy_of_the_options_keeps_steers_and_functions_the_same() -> None:
    steered = steer_model(demo()[0], [Steer(vector(), mask=torch.ones(4, 4))])
    copied = copy.deepcopy(steered.model_options["transformer_options"])
    kept = steered.model_options["transformer_options"]
    assert copied["concept_steer_steers"] == kept["concept_steer_steers"]
    assert copied["patches"] == kept["patches"]


def pictures_of_one_batch_have_steers_of_their_own() -> str:
    model, s = demo()[0], Steer(vector())
    plain, whole = sample(model), sample(steer_model(model, [s]))
    mixed = sample(steer_pictures(model, [[s], []]))
    same(mixed[0], whole[0])
    same(mixed[1], plain[1])
    return different(mixed[0], plain[0])


def after_an_error_inside_the_unet_the_next_picture_is_unsteered() -> None:
    model = demo()[0]
    before = sample(model)
    steered = steer_model(model, [Steer(vector())])
    wanted = sample(steered)
    broken, calls = steered.clone(), []

    def bomb(h: Any, hsp: Any, options: Any) -> Any:
        calls.append(1)
        if len(calls) > 8:
            raise ValueError("bomb")
        return h, hsp

    broken.set_model_output_block_patch(bomb)
    raises(ValueError, lambda: sample(broken), "bomb")
    same(sample(model), before)
    same(sample(steered), wanted)


def after_an_interrupt_the_next_picture_is_unsteered() -> None:
    model = demo()[0]
    before = sample(model)
    stopped, calls = steer_model(model, [Steer(vector())]).clone(), []

    def press(h: Any, hsp: Any, options: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            comfy.model_management.interrupt_current_processing(True)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return h, hsp

    stopped.set_model_output_block_patch(press)
    raises(InterruptProcessingException, lambda: sample(stopped))
    same(sample(model), before)


def a_broken_prompt_vector_leaves_no_trace_either() -> None:
    """A vector of another family on a CONDITIONING is found only when the sampler runs."""
    from bench import conditioning
    from concept_steer_pack.concept_steer.errors import FamilyMismatch

    model = demo()[0]
    before = sample(model)
    other = vector(0, 1280, "sd1")
    wrong = steer_conditioning(conditioning("a doctor"), [Steer(other)])
    raises(FamilyMismatch, lambda: sample(model, wrong), "Stable Diffusion 1.x (sd1)", "demo model (demo)")
    same(sample(model), before)


def vectors_made_in_inference_mode_and_maps_act_too() -> str:
    model = demo()[0]
    from concept_steer_pack.concept_steer.vector import ConceptVector

    spatial = ConceptVector(torch.randn(192, CELLS // 4, CELLS // 4) * 0.5, "demo")
    steps = ConceptVector(torch.randn(2, 192) * 0.5, "demo", timesteps=(900.0, 100.0))
    plain = sample(model)
    different(sample(steer_model(model, [Steer(spatial)])), plain)
    return different(sample(steer_model(model, [Steer(steps)])), plain)


def remove_and_gated_act_and_stop_at_strength_0() -> str:
    model, v = demo()[0], vector(scale=2.0)
    plain = sample(model)
    different(sample(steer_model(model, [Steer(v, operator="remove")])), plain)
    return different(sample(steer_model(model, [Steer(v, operator="gated")])), plain)
