from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer.schedule import Schedule
from concept_steer.steering import Steer, apply, check_steers, delta, total
from concept_steer.vector import ConceptVector

FAMILY = "custom:8x16"
C, H, W = 16, 4, 6
T = 500.0


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(*shape: int, seed: int = 0, **kw) -> ConceptVector:
    return ConceptVector(rand(*(shape or (C,)), seed=seed), FAMILY, title=f"v{seed}", **kw)


def half_mask() -> torch.Tensor:
    mask = torch.zeros(H, W)
    mask[:, : W // 2] = 1
    return mask


h = rand(4, C, H, W, seed=100)
EVERY = [True] * 4
MIXED = [False, True, False, True]
OPERATORS = ["add", "remove", "gated"]
STEERS = [
    Steer(make(seed=1), 0.7),
    Steer(make(C, H, W, seed=2), -1.3),
    Steer(make(C, 2, 3, seed=3), 0.1, rows="both", mask=half_mask()),
    Steer(make(seed=4), 1e-3, operator="remove"),
    Steer(make(seed=1), 0.7, Schedule(0, 0.9, 0.3)),
    Steer(make(seed=5), 3.0, operator="gated", threshold=0.5),
    Steer(make(seed=1), 0.7, mask=half_mask() / 3),
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_strength_zero_returns_the_very_same_tensor(operator):
    steer = Steer(make(), 0.0, operator=operator)
    assert delta(h, steer, T) is None and total(h, [steer], T) is None
    assert apply(h, [steer], T, EVERY) is h


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_step_outside_the_window_returns_the_very_same_tensor(operator):
    steer = Steer(make(), 1.0, Schedule(0.6, 0.8), operator=operator)
    assert apply(h, [steer], T, EVERY) is h
    assert apply(h, [steer], 300.0, EVERY) is not h


def test_no_steers_return_the_very_same_tensor():
    assert apply(h, [], T, EVERY) is h and total(h, [], T) is None


def test_a_steer_for_rows_that_are_not_there_returns_the_very_same_tensor():
    assert apply(h, [Steer(make(), rows="uncond")], T, EVERY) is h
    assert apply(h, [Steer(make(), rows="cond")], T, [False] * 4) is h


def test_nothing_that_acts_beside_something_that_does_not_changes_no_bit():
    quiet = [Steer(make(seed=9), 0.0), Steer(make(seed=8), 1.0, Schedule(0.9, 1.0))]
    assert torch.equal(apply(h, [STEERS[0], *quiet], T, MIXED), apply(h, STEERS[:1], T, MIXED))


@pytest.mark.parametrize("shape", [(C,), (C, H, W), (C, 2, 3), (C, 5, 9)])
def test_twice_the_vector_at_one_is_the_vector_at_two(shape):
    vector = make(*shape)
    assert torch.equal(apply(h, [Steer(vector * 2, 1.0)], T, EVERY), apply(h, [Steer(vector, 2.0)], T, EVERY))


def test_the_opposite_vector_is_a_negative_strength():
    vector = make()
    assert torch.equal(apply(h, [Steer(-vector)], T, EVERY), apply(h, [Steer(vector, -1.0)], T, EVERY))


def test_add_is_strength_times_ramp_times_vector():
    vector = make()
    steer = Steer(vector, 0.5, Schedule(0.0, 1.0, 0.5))
    assert torch.equal(delta(h, steer, 999 * 0.75), vector.tensor.view(1, C, 1, 1) * 0.25)


def test_the_order_of_the_steers_never_changes_a_bit():
    wanted = apply(h, STEERS, T, MIXED)
    for order in itertools.islice(itertools.permutations(STEERS), 0, 5040, 97):
        assert torch.equal(apply(h, order, T, MIXED), wanted)
    assert torch.equal(total(h, STEERS, T), total(h, STEERS[::-1], T))


def test_two_steers_do_what_the_sum_of_their_vectors_does():
    a, b = make(seed=1), make(C, H, W, seed=2)
    both = apply(h, [Steer(a), Steer(b)], T, EVERY)
    assert torch.equal(both, apply(h, [Steer(a + b)], T, EVERY))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("rows", ["cond", "uncond", "both"])
def test_only_the_addressed_rows_change_in_every_batch_layout(rows, flags, dtype):
    x = h[:3].to(dtype)
    result = apply(x, [Steer(make(), rows=rows)], T, flags)
    assert result.dtype == dtype
    for row, flag in enumerate(flags):
        addressed = rows == "both" or (rows == "cond") == flag
        assert torch.equal(result[row], x[row]) != addressed


def test_a_row_gets_the_same_numbers_in_every_batch():
    alone = torch.cat([apply(h[i : i + 1], STEERS, T, [MIXED[i]]) for i in range(4)])
    assert torch.equal(alone, apply(h, STEERS, T, MIXED))
    flipped = apply(h.flip(0), STEERS, T, MIXED[::-1]).flip(0)
    assert torch.equal(flipped, alone)


def test_cond_and_uncond_may_get_different_vectors():
    a, b = make(seed=1), make(seed=2)
    result = apply(h, [Steer(a, rows="cond"), Steer(b, rows="uncond")], T, MIXED)
    assert torch.equal(result[1], apply(h[1:2], [Steer(a)], T, [True])[0])
    assert torch.equal(result[0], apply(h[:1], [Steer(b, rows="both")], T, [True])[0])


def test_the_rows_may_be_named_by_a_tensor():
    assert torch.equal(apply(h, STEERS, T, torch.tensor(MIXED)), apply(h, STEERS, T, MIXED))


def test_a_layout_that_does_not_fit_the_batch_is_an_error():
    with pytest.raises(ConceptSteerError, match="4 rows, but 2 were named"):
        apply(h, STEERS, T, [True, False])


def test_h_is_never_changed_in_place():
    before = h.clone()
    for steer in STEERS:
        apply(h, [steer], T, EVERY)
        apply(h, [steer], T, MIXED)
    assert torch.equal(h, before)


def test_two_branches_do_not_leak_into_each_other():
    first = apply(h, STEERS[:1], T, EVERY)
    apply(h, STEERS, T, MIXED)
    apply(h[..., :2, :2], STEERS, 10.0, EVERY)
    assert torch.equal(apply(h, STEERS[:1], T, EVERY), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steer", STEERS, ids=range(len(STEERS)))
def test_a_delta_is_fp32_and_broadcasts_to_h(steer, dtype):
    result = delta(h.to(dtype), steer, T)
    assert result.dtype == torch.float32
    assert torch.broadcast_shapes(result.shape, h.shape) == h.shape


def test_half_precision_is_rounded_only_once():
    x, steers = h.half(), [Steer(make(seed=i)) for i in range(3)]
    exact = x.double() + sum(s.vector.tensor.double().view(1, C, 1, 1) for s in steers)
    assert torch.equal(apply(x, steers, T, EVERY), exact.half())


def test_a_flat_vector_fits_any_size_without_resizing():
    for size in [(1, 1), (3, 5), (16, 8)]:
        assert delta(rand(1, C, *size), Steer(make()), T).shape == (1, C, 1, 1)


def test_a_map_of_the_same_size_is_used_as_it_is():
    vector = make(C, H, W)
    assert torch.equal(delta(h, Steer(vector), T)[0], vector.tensor)


@pytest.mark.parametrize("size", [(8, 12), (2, 3), (5, 4), (1, 1)])
def test_a_map_of_another_size_is_resized_bilinear(size):
    vector = make(C, H, W)
    wanted = torch.nn.functional.interpolate(vector.tensor[None], size, mode="bilinear", align_corners=False)
    assert torch.equal(delta(rand(2, C, *size), Steer(vector), T), wanted)


def test_a_constant_map_stays_constant_at_every_size():
    vector = ConceptVector(rand(C)[:, None, None].expand(C, 8, 8), FAMILY)
    result = delta(rand(1, C, 5, 11), Steer(vector), T)
    assert torch.allclose(result, vector.tensor[None, :, :1, :1].expand_as(result), atol=1e-6)


def test_a_per_timestep_vector_gives_the_nearest_step():
    vector = make(2, C, timesteps=(900, 100))
    assert torch.equal(delta(h, Steer(vector), 700)[0, :, 0, 0], vector.tensor[0])
    assert torch.equal(delta(h, Steer(vector), 3)[0, :, 0, 0], vector.tensor[1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_outside_the_mask_nothing_changes(operator):
    result = apply(h, [Steer(make(), 2.0, mask=half_mask(), operator=operator)], T, EVERY)
    assert torch.equal(result[..., W // 2 :], h[..., W // 2 :])
    free = apply(h, [Steer(make(), 2.0, operator=operator)], T, EVERY)
    assert torch.equal(result[..., : W // 2], free[..., : W // 2])


def test_a_mask_of_ones_is_no_mask_and_a_mask_may_have_a_leading_one():
    assert torch.equal(delta(h, Steer(make(C, H, W), mask=torch.ones(1, 64, 96)), T), delta(h, Steer(make(C, H, W)), T))


def test_a_large_mask_is_shrunk_without_losing_small_regions():
    mask = torch.zeros(512, 512)
    mask[10:20, 10:20] = 1  # smaller than one of the 8 x 8 positions, and between the pixels that plain bilinear reads
    resized = Steer(make(), mask=mask).mask_for(rand(1, C, 8, 8))
    assert 0 < resized[0, 0, 0, 0] < 1 and resized[0, 0, 4:].max() == 0


def test_a_mask_is_resized_once_per_size_and_never_changes_the_next_size():
    steer = Steer(make(), mask=half_mask())
    assert steer.mask_for(h) is steer.mask_for(h.clone())
    assert steer.mask_for(rand(1, C, 8, 8)).shape == (1, 1, 8, 8) and steer.mask_for(h).shape == (1, 1, H, W)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3, 3), torch.ones(3), torch.ones(1, 1, 3, 3), torch.ones(0, 3), [[1.0]]]
)
def test_a_mask_of_the_wrong_shape_is_an_error(mask):
    with pytest.raises(ConceptSteerError, match=r"mask of 'v0'.*\(H, W\)"):
        Steer(make(), mask=mask)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_mask_with_values_out_of_range_is_an_error(value):
    with pytest.raises(ConceptSteerError, match=r"from 0 .* to 1"):
        Steer(make(), mask=torch.full((3, 3), value))


@pytest.mark.parametrize("shape", [(C,), (C, H, W)])
def test_remove_takes_the_whole_positive_projection_away_and_nothing_else(shape):
    vector = make(*shape)
    v = torch.nn.functional.normalize(vector.tensor.view(1, C, *(shape[1:] or (1, 1))), dim=1)
    result = apply(h, [Steer(vector, operator="remove")], T, EVERY)
    before, after = (h * v).sum(1), (result * v).sum(1)
    assert torch.allclose(after, before.clamp_max(0), atol=1e-5)
    assert torch.allclose(result - after[:, None] * v, h - before[:, None] * v, atol=1e-5)


def test_remove_does_not_depend_on_the_length_of_the_vector():
    a, b = (apply(h, [Steer(make() * k, operator="remove")], T, EVERY) for k in (1, 8))
    assert torch.allclose(a, b, atol=1e-6)


def test_gated_acts_only_where_the_concept_is_present():
    vector = make()
    v = torch.nn.functional.normalize(vector.tensor, dim=0).view(1, C, 1, 1)
    present = (h * v).sum(1, keepdim=True) > 0.5
    result = apply(h, [Steer(vector, operator="gated", threshold=0.5)], T, EVERY)
    added = apply(h, [Steer(vector)], T, EVERY)
    assert present.any() and not present.all()
    assert torch.equal(result, torch.where(present, added, h))


@pytest.mark.parametrize("operator", ["remove", "gated"])
def test_a_zero_vector_removes_and_gates_nothing(operator):
    assert torch.equal(apply(h, [Steer(make() * 0, operator=operator)], T, EVERY), h)


@pytest.mark.parametrize("steer", STEERS, ids=range(len(STEERS)))
@pytest.mark.parametrize("flags", [EVERY, MIXED], ids=["every", "mixed"])
def test_steering_is_differentiable_with_respect_to_h(steer, flags):
    x = h.double().requires_grad_()
    apply(x, [steer], T, flags).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    if steer.operator == "add":
        assert torch.equal(x.grad, torch.ones_like(x))


def test_the_gradient_of_remove_is_the_projection():
    vector = make()
    x = (h[:1] + 10 * vector.tensor.view(1, C, 1, 1)).requires_grad_()  # the concept is present everywhere
    v = torch.nn.functional.normalize(vector.tensor, dim=0)
    (grad,) = torch.autograd.grad(apply(x, [Steer(vector, operator="remove")], T, [True])[0, 0, 0, 0], x)
    assert torch.allclose(grad[0, :, 0, 0], torch.eye(C)[0] - v[0] * v, atol=1e-6)


def test_what_was_kept_in_inference_mode_can_be_used_for_learning_later():
    with torch.inference_mode():
        steers = [Steer(make(C, 2, 3), operator="remove", mask=half_mask()), Steer(make(seed=1), mask=torch.ones(9, 9))]
        apply(h, steers, T, EVERY)
    x = h.clone().requires_grad_()
    apply(x, steers, T, EVERY).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_vector_is_not_copied_on_its_own_device_and_copied_once_to_another():
    vector = make(C, H, W)
    assert vector.at(T, "cpu") is vector.tensor
    assert vector.at(T, "meta") is vector.at(None, torch.device("meta"))


def test_another_number_of_channels_names_the_family_and_both_numbers():
    with pytest.raises(FamilyMismatch, match=r"'v0' has 16 channels.*text width 8.*32"):
        delta(rand(1, 32, 4, 4), Steer(make()), T)


@pytest.mark.parametrize("bad", [rand(C, 4, 4), torch.zeros(1, C, 4, 4, dtype=torch.int32)])
def test_something_that_cannot_be_h_is_an_error(bad):
    with pytest.raises(ConceptSteerError, match=r"\(B, C, H, W\)"):
        delta(bad, Steer(make()), T)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strength": math.nan}, "strength of 'v0'"),
        ({"strength": math.inf}, "finite"),
        ({"strength": "1"}, "finite"),
        ({"threshold": math.nan}, "threshold"),
        ({"rows": "all"}, "rows.*cond, uncond, both"),
        ({"operator": "multiply"}, "operator.*add, remove, gated"),
    ],
)
def test_settings_out_of_range_are_errors_in_words(values, words):
    with pytest.raises(ValueError, match=words) as caught:
        Steer(make(), **values)
    assert isinstance(caught.value, ConceptSteerError)


def test_an_unknown_time_is_an_error_and_never_silently_unsteered():
    with pytest.raises(ConceptSteerError, match="not a number"):
        apply(h, [Steer(make())], math.nan, EVERY)


def test_the_wrong_family_raises_naming_the_vector_and_both_families():
    steer = Steer(ConceptVector(torch.ones(1280), "sd1", title="woman"))
    check_steers([steer], "sd1", 1280)
    with pytest.raises(FamilyMismatch, match=r"'woman' was made for Stable Diffusion 1.x.*SDXL"):
        check_steers([steer], "sdxl", 1280)


def test_a_steer_is_immutable_and_survives_the_hosts_deep_copies():
    steer = STEERS[2]
    with pytest.raises(AttributeError):
        steer.strength = 3.0
    assert copy.deepcopy({"patches": [steer]})["patches"][0] is steer and copy.copy(steer) is steer


def test_changing_the_callers_mask_does_not_change_the_steer():
    mask = half_mask()
    steer = Steer(make(), mask=mask)
    mask.fill_(0)
    assert delta(h, steer, T).abs().sum() > 0
