from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer.vector import ConceptVector

FAMILY = "custom:8x16"
C = 16


def make(*shape: int, seed: int = 0, **kw) -> ConceptVector:
    tensor = torch.randn(*(shape or (C,)), generator=torch.Generator().manual_seed(seed))
    return ConceptVector(tensor, **{"family": FAMILY, "title": f"v{seed}", **kw})


def per_timestep(*shape: int, seed: int = 0, steps=(900.0, 100.0)) -> ConceptVector:
    return make(len(steps), *shape, seed=seed, timesteps=steps)


ALL_SHAPES = [make(C), make(C, 3, 4), per_timestep(C), per_timestep(C, 3, 4)]


@pytest.mark.parametrize(
    ("vector", "spatial", "stepped"), list(zip(ALL_SHAPES, [0, 1, 0, 1], [0, 0, 1, 1], strict=True))
)
def test_the_four_shapes_are_told_apart(vector, spatial, stepped):
    assert (vector.channels, vector.spatial, vector.per_timestep) == (C, bool(spatial), bool(stepped))


def test_the_tensor_becomes_a_contiguous_fp32_copy_that_nobody_else_can_change():
    source = torch.randn(3, C, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    vector = ConceptVector(source, FAMILY)
    assert vector.tensor.dtype == torch.float32 and vector.tensor.is_contiguous() and not vector.tensor.requires_grad
    before = vector.tensor.clone()
    with torch.no_grad():
        source.zero_()
    assert torch.equal(vector.tensor, before)


def test_a_vector_made_in_inference_mode_can_be_used_for_learning():
    with torch.inference_mode():
        vector = make(C) * 2
    assert not vector.tensor.is_inference()
    c = torch.nn.Parameter(vector.tensor.clone())
    (c * vector.tensor).sum().backward()
    assert torch.equal(c.grad, vector.tensor)


@pytest.mark.parametrize("shape", [(), (0,), (1, C, 2, 2, 2), (C, 0, 4)])
def test_a_shape_that_cannot_be_is_refused(shape):
    with pytest.raises(ConceptSteerError, match="shape"):
        ConceptVector(torch.zeros(shape), FAMILY)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    tensor = torch.zeros(C)
    tensor[3] = bad
    with pytest.raises(ConceptSteerError, match=r"'woman' holds 1 values that are not finite"):
        ConceptVector(tensor, FAMILY, title="woman")


def test_whole_numbers_are_refused():
    with pytest.raises(ConceptSteerError, match="floating point"):
        ConceptVector(torch.zeros(C, dtype=torch.int32), FAMILY)


def test_channels_that_do_not_fit_the_family_are_refused():
    with pytest.raises(FamilyMismatch, match=r"must have 1280 channels.*16"):
        ConceptVector(torch.zeros(C), "sd1")


def test_an_unknown_family_is_refused():
    with pytest.raises(ConceptSteerError, match="not known"):
        ConceptVector(torch.zeros(C), "sd99")


@pytest.mark.parametrize("steps", [(), (1.0,), (1.0, 1.0), (1.0, 1000.0), (-1.0, 5.0), (math.nan, 5.0)])
def test_timesteps_must_be_as_many_as_rows_different_and_in_range(steps):
    with pytest.raises(ConceptSteerError, match="2 different timesteps"):
        make(2, C, timesteps=steps)


def test_a_constant_vector_takes_no_timesteps():
    with pytest.raises(ConceptSteerError, match="0 different timesteps"):
        make(C, timesteps=(5.0,))


@pytest.mark.parametrize("info", [{"family": "sd1"}, {"": "x"}, {3: "x"}, {"effect": {"a": 1}}])
def test_info_with_a_reserved_key_or_a_value_that_is_no_text_is_refused(info):
    with pytest.raises(ConceptSteerError, match="info"):
        make(C, info=info)


def test_numbers_in_info_become_texts_and_none_takes_an_entry_away():
    vector = make(C).with_info(seed=3, calibration=0.5, author="me")
    assert dict(vector.info) == {"seed": "3", "calibration": "0.5", "author": "me"}
    assert dict(vector.with_info(author=None).info) == {"seed": "3", "calibration": "0.5"}


def test_a_vector_cannot_be_changed():
    vector = make(C, info={"seed": "1"})
    with pytest.raises(AttributeError):
        vector.title = "other"
    with pytest.raises(TypeError):
        vector.info["seed"] = "2"


def test_copies_are_the_vector_itself_and_pickling_keeps_everything():
    vector = per_timestep(C, 3, 4).with_info(seed=1)
    assert copy.copy(vector) is vector and copy.deepcopy(vector) is vector
    again = pickle.loads(pickle.dumps(vector))
    assert again == vector and again.title == vector.title and dict(again.info) == dict(vector.info)


@pytest.mark.parametrize(("timestep", "row"), [(999, 0), (600, 0), (400, 1), (0, 1)])
def test_at_gives_the_nearest_stored_timestep(timestep, row):
    vector = per_timestep(C, 3, 4)
    assert torch.equal(vector.at(timestep), vector.tensor[row])


def test_at_of_a_constant_vector_needs_no_timestep():
    assert torch.equal(make(C).at(None), make(C).at(123))


@pytest.mark.parametrize("timestep", [None, math.nan])
def test_at_of_a_per_timestep_vector_needs_one(timestep):
    with pytest.raises(ConceptSteerError, match=r"'v0'.*timestep"):
        per_timestep(C).at(timestep)


def test_norm_is_the_euclidean_norm():
    assert ConceptVector(torch.full((C,), 2.0), FAMILY).norm == pytest.approx(8.0)


@pytest.mark.parametrize("vector", ALL_SHAPES, ids=lambda v: str(tuple(v.tensor.shape)))
def test_the_algebra_holds(vector):
    assert vector + vector == vector * 2 == 2 * vector
    assert vector * 4 / 4 == vector
    opposite = -vector
    assert -opposite == vector and (-opposite).title == vector.title
    assert vector - vector == vector * 0 == vector * -0.0
    assert vector * 0 + vector == vector


def test_addition_commutes_for_all_mixtures_of_shapes():
    others = [make(C, seed=1), make(C, 3, 4, seed=2), per_timestep(C, seed=3), per_timestep(C, 3, 4, seed=4)]
    for a in ALL_SHAPES:
        for b in others:
            assert a + b == b + a
            assert (a + b).spatial == (a.spatial or b.spatial) and (a + b).per_timestep == (
                a.per_timestep or b.per_timestep
            )


def test_a_flat_vector_is_spread_over_the_map():
    flat, spatial = make(C, seed=1), make(C, 3, 4, seed=2)
    assert torch.equal((flat + spatial).tensor, flat.tensor[:, None, None] + spatial.tensor)


def test_different_families_cannot_be_added_and_both_are_named():
    other = ConceptVector(torch.zeros(1280), "sd1", title="woman")
    for operation in (lambda: make(C) + other, lambda: make(C).cosine(other), lambda: make(C).orthogonal_to(other)):
        with pytest.raises(FamilyMismatch, match=r"text width 8.*'woman'.*Stable Diffusion 1.x"):
            operation()


def test_different_timesteps_cannot_be_added():
    with pytest.raises(ConceptSteerError, match="different timesteps"):
        per_timestep(C) + per_timestep(C, steps=(800.0, 100.0))


def test_different_map_sizes_cannot_be_added():
    with pytest.raises(ConceptSteerError, match=r"different map sizes.*side by side"):
        make(C, 3, 4) + make(C, 4, 4)


def test_different_sites_cannot_be_added():
    with pytest.raises(ConceptSteerError, match=r"'mid'.*'up.1'"):
        make(C) + make(C, site="up.1")


def test_vectors_do_not_mix_with_numbers_or_multiply_each_other():
    for operation in (lambda: make(C) + 1, lambda: make(C) - 1, lambda: make(C) * make(C), lambda: make(C) * True):
        with pytest.raises(TypeError):
            operation()
    assert make(C) != 1


def test_division_by_zero_and_overflow_are_errors_in_words():
    with pytest.raises(ConceptSteerError, match="divided by zero"):
        make(C) / 0
    with pytest.raises(ConceptSteerError, match="not finite"):
        make(C) * 1e300


def test_equality_looks_at_what_a_vector_does_not_at_its_texts():
    a = make(C)
    b = a.with_title("other").with_info(author="me")
    assert a == b and hash(a) == hash(b) and a.fingerprint == b.fingerprint
    different = [make(C, seed=1), make(C, site="up.1"), ConceptVector(a.tensor, "custom:9x16")]
    assert all(a != d and a.fingerprint != d.fingerprint for d in different)
    assert per_timestep(C) != per_timestep(C, steps=(901.0, 100.0))


def test_shapes_with_the_same_numbers_have_different_fingerprints():
    tensor = torch.arange(C * 1.0)
    assert ConceptVector(tensor, FAMILY) != ConceptVector(tensor[:, None, None], FAMILY)


def test_a_fingerprint_never_changes_between_versions():
    vector = ConceptVector(torch.arange(2.0), "custom:1x2")
    assert vector.fingerprint == "83c3e175d956a452c5c3137f64fc1aa0309cef7edbf0b37a1e41f2bb6dbef839"


def test_a_measured_effect_is_not_carried_into_another_vector():
    a = make(C, info={"effect": "{}", "calibration": "0.5", "seed": "1"})
    for result in (a * 2, -a, a / 2, a + a, a.orthogonal_to(make(C, seed=1))):
        assert "effect" not in result.info and result.info["calibration"] == "0.5"
    assert "seed" not in (a + a.with_info(seed=2)).info


def test_cosine_is_one_with_itself_minus_one_with_the_opposite_and_zero_with_nothing():
    for vector in ALL_SHAPES:
        assert vector.cosine(vector) == pytest.approx(1) and vector.cosine(-3 * vector) == pytest.approx(-1)
        assert vector.cosine(vector * 0) == 0.0
    a, b = torch.zeros(C), torch.zeros(C)
    a[0], b[0], b[1] = 1.0, 1.0, 1.0
    assert ConceptVector(a, FAMILY).cosine(ConceptVector(b, FAMILY)) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("vector", ALL_SHAPES, ids=lambda v: str(tuple(v.tensor.shape)))
def test_orthogonal_to_leaves_nothing_along_any_of_the_others(vector):
    others = [make(C, seed=11), make(C, seed=12), make(C, 3, 4, seed=13)]
    result = vector.orthogonal_to(*others)
    assert result.spatial and all(abs(result.cosine(o)) < 1e-6 for o in others)


def test_orthogonal_to_works_timestep_by_timestep():
    a, b = per_timestep(C, seed=1), per_timestep(C, seed=2)
    result = a.orthogonal_to(b)
    assert ((result.tensor * b.tensor).sum(1).abs() < 1e-5).all()


def test_orthogonal_to_endures_others_that_repeat_each_other_or_are_zero():
    a, b = make(C), make(C, seed=1)
    result = a.orthogonal_to(b, b * 3, b * 0, b + make(C, seed=2) * 1e-4)
    assert abs(result.cosine(b)) < 1e-6 and result.norm > 0


def test_orthogonal_to_nothing_changes_nothing():
    assert make(C).orthogonal_to() == make(C)
    assert make(C).orthogonal_to(make(C, seed=1) * 0) == make(C)


def test_orthogonal_to_the_same_direction_says_that_nothing_is_left():
    with pytest.raises(ConceptSteerError, match=r"Nothing of 'v0' is left.*'v0'"):
        make(C).orthogonal_to(make(C) * -2)
