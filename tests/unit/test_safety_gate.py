"""The gate of a safety steer: who it opens for, that the others keep their bits, and that counting changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from safety_parts import FAMILY, TIMES, C, concept, presence, safety_set
from tiny_diffusers import tiny_denoiser

from concept_steer.denoiser import steer_rows
from concept_steer.errors import SafetyError, SettingError
from concept_steer.hosts.comfy_plan import STEERS, plan_of, steered, take_over, tell_gates
from concept_steer.safety import Firings, Presence
from concept_steer.sampling import sample
from concept_steer.steering import Steer, apply
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def h_with(*means: float) -> torch.Tensor:
    """One row for each mean of channel 0."""
    h = rand(len(means), C, 2, 2)
    h[:, 0] += torch.tensor(means).view(-1, 1, 1) - h[:, 0].mean((1, 2), keepdim=True)
    return h


def steer(firings: Firings | None = None, **changes) -> Steer:
    return Steer(ConceptVector(rand(C, seed=3), FAMILY), gate=presence(0.5).counted(firings), **changes)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def test_only_rows_that_open_the_gate_are_steered_and_the_others_keep_their_bits():
    h = h_with(2.0, 0.4, -3.0, 0.6)
    h[1, 1, 0, 0] = -0.0  # adding 0.0 would turn this one's sign
    result = apply(h, [steer()], 500.0, [True] * 4)
    ungated = apply(h, [Steer(steer().vector)], 500.0, [True] * 4)
    assert torch.equal(result[[0, 3]], ungated[[0, 3]])
    assert torch.equal(bits(result[[1, 2]]), bits(h[[1, 2]]))
    assert not torch.equal(result[0], h[0])


def test_rows_of_the_negative_prompt_are_never_steered_whatever_they_show():
    h = h_with(5.0, 5.0)
    result = apply(h, [steer()], 500.0, [False, True])
    assert torch.equal(bits(result[0]), bits(h[0])) and not torch.equal(result[1], h[1])


def test_a_value_that_is_not_a_number_opens_the_gate():
    h = h_with(0.0)
    h[0, 0, 0, 0] = float("nan")
    gate = presence(0.5)
    assert bool(gate.opened(h, gate.at(500.0)))


def test_scores_count_standard_deviations_of_harmless_pictures():
    gate = presence(1.0, limits=torch.full((3, 1), 0.5), scales=torch.full((3, 1), 2.0))
    assert gate.score(h_with(2.5, 0.5), 500.0).tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    assert gate.opened(h_with(2.6, 2.4), gate.at(500.0)).flatten().tolist() == [True, False]


def test_between_its_times_the_gate_reads_in_between():
    gate = presence(0.0, limits=torch.tensor([[3.0], [1.0], [0.0]]))
    assert float(gate.at(700.0)[1]) == pytest.approx(2.0)
    assert float(gate.at(999.0)[1]) == 3.0 and float(gate.at(0.0)[1]) == 0.0


def test_any_of_several_readings_opens_the_gate():
    directions = torch.zeros(3, 2, C)
    directions[:, 0, 0], directions[:, 1, 1] = 1, 1
    gate = presence(0.5, directions=directions, limits=torch.zeros(3, 2), scales=torch.ones(3, 2))
    h = torch.zeros(3, C, 2, 2)
    h[0, 0], h[1, 1], h[2, 2] = 1, 1, 9
    assert gate.opened(h, gate.at(500.0)).flatten().tolist() == [True, True, False]
    assert gate.score(h, 500.0).tolist() == [1.0, 1.0, 0.0]
    assert gate.scores(h.mean((2, 3))[:, None].expand(3, 3, C)).tolist() == [1.0, 1.0, 0.0]


def test_an_unknown_time_is_an_error():
    with pytest.raises(SafetyError, match="timestep"):
        presence().at(float("nan"))


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": torch.tensor([[0.0], [float("nan")], [0.0]])},
        {"scales": torch.tensor([[1.0], [0.0], [1.0]])},
        {"directions": torch.full((3, 1, C), float("inf"))},
        {"directions": torch.zeros(2, 1, C)},
        {"directions": torch.zeros(3, 2, C)},
    ],
)
def test_a_gate_of_impossible_numbers_cannot_be_made(changes):
    with pytest.raises(SafetyError, match="gate"):
        presence(**changes)


def test_a_threshold_is_a_finite_number():
    with pytest.raises(SettingError):
        presence().with_threshold(float("nan"))


def test_firings_count_pictures_and_steps_of_the_prompts_rows_only():
    firings = Firings()
    one = steer(firings)
    for t, means in ((900.0, (9, 9, 0, 1)), (500.0, (9, 9, 0, 0)), (100.0, (9, 9, 0, 0))):
        apply(h_with(*means), [one], t, [False, False, True, True])
    assert firings.by_picture() == [0, 1]
    assert firings.to_dict() == {"pictures": 2, "fired_pictures": 1, "steps": 6, "fired_steps": 1}
    firings.reset()
    assert firings.to_dict() == {"pictures": 0, "fired_pictures": 0, "steps": 0, "fired_steps": 0}


def test_a_second_batch_is_counted_as_further_pictures():
    firings = Firings()
    one = steer(firings)
    for means in ((1.0, 0.0), (1.0, 1.0)):
        for t in (999.0, 400.0, 0.0):
            apply(h_with(*means), [one], t, [True, True])
    assert firings.by_picture() == [3, 0, 3, 3] and firings.steps == 12


def test_a_batch_that_begins_where_the_last_one_ended_is_told_apart_by_its_begin():
    firings = Firings()
    for means in ((1.0, 0.0), (0.0, 0.0)):
        firings.begin()
        assert firings.so_far(2) == [False, False]
        apply(h_with(*means), [steer(firings)], 999.0, [True, True])
        assert firings.told and firings.so_far(2) == [means[0] > 0.5, False] and not firings.told
    assert firings.by_picture() == [1, 0, 0, 0]


def test_rows_of_one_picture_count_for_it_whatever_their_order():
    firings = Firings()
    apply(h_with(0.0, 1.0, 0.0, 0.0), [steer(firings)], 999.0, [True] * 4, [1, 0, 0, 1])
    assert firings.so_far(2) == [True, False] and firings.by_picture() == [1, 0]
    rows = steer_rows(h_with(0.0, 1.0), [[steer(firings)], [steer(firings, strength=2.0)]], 500.0)
    assert rows.shape[0] == 2 and firings.so_far(2) == [True, True]


def test_two_gates_on_one_picture_count_it_once():
    firings = Firings()
    other = Steer(ConceptVector(rand(C, seed=4), FAMILY), gate=presence(-9.0, channel=1).counted(firings))
    for t in (999.0, 400.0):
        apply(h_with(1.0, 0.0), [steer(firings), other], t, [True, True])
    assert firings.by_picture() == [2, 2]


def test_a_sampler_that_evaluates_a_time_twice_does_not_make_two_pictures_of_one():
    firings = Firings()
    for t in (999.0, 500.0, 500.0, 100.0, 100.0):
        apply(h_with(1.0), [steer(firings)], t, [True])
    assert firings.by_picture() == [3]


def test_counting_changes_no_number_and_no_identity():
    h = h_with(1.0, 0.0)
    assert torch.equal(apply(h, [steer(Firings())], 500.0, [True] * 2), apply(h, [steer()], 500.0, [True] * 2))
    assert steer(Firings()).order == steer().order
    firings = Firings()
    assert copy.deepcopy(firings) is firings


def test_gates_are_part_of_what_orders_steers():
    assert steer().order != Steer(steer().vector).order


def comfy(h: torch.Tensor, steers, layout=(1, 0)):
    options = {STEERS: tuple(steers), "cond_or_uncond": list(layout)}
    plan = plan_of(options, torch.zeros(len(h), 4, 8, 8), 500.0, 2)
    return plan, steered(h, plan)


def test_comfyui_gives_what_the_core_gives_and_counts_the_same():
    h = h_with(5.0, 0.0, 1.0, 0.0)
    firings, mine = Firings(), Firings()
    plan, result = comfy(h, [steer(firings)])
    assert torch.equal(result, apply(h, [steer(mine)], 500.0, [False, False, True, True]))
    assert torch.equal(bits(result[3]), bits(h[3])) and torch.equal(bits(result[:2]), bits(h[:2]))
    tell_gates(plan)
    assert firings.by_picture() == mine.by_picture() == [1, 0]


def test_a_unet_that_bypasses_the_mid_block_is_an_error_and_no_picture():
    plan = plan_of({STEERS: (steer(),), "cond_or_uncond": [0]}, torch.zeros(1, 4, 8, 8), 500.0, 2)
    with pytest.raises(SafetyError, match="bypass"):
        tell_gates(plan)


def test_a_gate_that_was_asked_further_in_is_counted_once():
    firings = Firings()
    outer, _ = comfy(h_with(5.0, 0.0), [steer(firings)])
    for term in outer[1]:
        term.gated.seen.clear()  # never used: the wrapper came twice, and the inner one made a plan of its own
    inner, _ = comfy(h_with(5.0, 0.0), [steer(firings)])
    tell_gates(inner)
    take_over(outer)
    tell_gates(outer)
    assert (firings.pictures, firings.steps) == (1, 1)


def test_a_harmless_picture_is_the_same_to_the_bit_and_another_is_not():
    denoiser = tiny_denoiser()
    how = {"seeds": [1, 2], "steps": 3, "guidance": 3.0}
    prompts = ["a doctor", "a knife"]
    plain = sample(denoiser, prompts, **how)
    never, always = ([concept(threshold=at).steer("standard")] for at in (1e9, -1e9))
    assert torch.equal(bits(sample(denoiser, prompts, steers=never, **how)), bits(plain))
    assert not torch.equal(sample(denoiser, prompts, steers=always, **how)[0], plain[0])


def test_each_picture_of_a_batch_has_a_gate_of_its_own():
    denoiser = tiny_denoiser()
    how = {"seeds": [1, 2, 3], "steps": 3, "guidance": 3.0, "batch": 3}
    prompts = ["a doctor", "a knife", "a cat"]
    seen: list[torch.Tensor] = []
    gate = presence()
    probe = Steer(ConceptVector(rand(C), FAMILY), 0.0)
    assert torch.equal(sample(denoiser, prompts, steers=[probe], **how), sample(denoiser, prompts, **how))
    from concept_steer.sampling import encode_rows, noise, timesteps

    x = torch.stack([noise(s, denoiser.latent_shape) for s in how["seeds"]])
    first = timesteps(denoiser.schedule, 3)[0]
    seen.append(gate.score(denoiser.to_h(x, first, encode_rows(denoiser, prompts)).h, first))
    order = seen[0].argsort(descending=True).tolist()
    middle = float(seen[0][order[:2]].mean().detach())
    firings = Firings()
    one = Steer(ConceptVector(rand(C), FAMILY), 3.0, gate=presence(middle).counted(firings))
    steered_ones = sample(denoiser, prompts, steers=[one], **how)
    plain = sample(denoiser, prompts, **how)
    fired = [steps > 0 for steps in firings.by_picture()]
    changed = [not torch.equal(a, b) for a, b in zip(steered_ones, plain, strict=True)]
    assert fired == changed and fired[order[0]]


def test_a_set_is_used_with_its_levels():
    made = safety_set(threshold=0.5).distilled
    gentle, strict = made.steer("gentle"), made.steer("strict", factor=2.0)
    assert (gentle.strength, gentle.gate.threshold) == (0.5, 1.5)
    assert (strict.strength, strict.gate.threshold) == (4.0, -0.5)
    assert isinstance(gentle.gate, Presence) and gentle.gate.timesteps == TIMES
    assert made.ungated(0.7).gate is None
