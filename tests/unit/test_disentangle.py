"""Vectors that are kept apart from other concepts, and vectors that differ between groups of timesteps."""

from __future__ import annotations

import pytest
import torch
from test_learn import PAIRS, SMALL
from tiny_diffusers import schedule, tiny_denoiser

from concept_steer.errors import FamilyMismatch, LearnError
from concept_steer.learn import learn_difference, learn_score
from concept_steer.learn.calibration import amplitude
from concept_steer.learn.disentangle import others_of
from concept_steer.learn.timestep_groups import groups_of
from concept_steer.learn.trajectories import build_cache
from concept_steer.sampling import timesteps
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
FAMILY = "custom:24x32"


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


def other(seed: int, *shape: int, **options) -> ConceptVector:
    tensor = torch.randn(*(shape or (32,)), generator=torch.Generator().manual_seed(seed))
    return ConceptVector(tensor, FAMILY, title=f"other {seed}", **options)


@pytest.fixture(scope="module")
def near(denoiser):
    """Another concept that shares much with the one to be learned."""
    own = learn_difference(denoiser, PAIRS, seeds=4).vector
    return [own / own.norm + other(1) / other(1).norm, other(2)]


@pytest.mark.parametrize("spatial", [False, True])
def test_a_difference_is_exactly_orthogonal_to_the_others(denoiser, near, spatial):
    plain = learn_difference(denoiser, PAIRS, seeds=4, spatial=spatial)
    assert abs(plain.vector.cosine(near[0])) > 0.3
    apart = learn_difference(denoiser, PAIRS, seeds=4, spatial=spatial, against=near)
    assert max(abs(apart.vector.cosine(one)) for one in near) < 1e-6
    assert apart.vector.tensor.shape == plain.vector.tensor.shape
    assert apart.vector.info["orthogonal_to"].count(" | ") == 1
    assert apart.unet_rows == plain.unet_rows


def test_without_ridge_it_is_gram_schmidt(denoiser, near):
    plain = learn_difference(denoiser, PAIRS, seeds=4).vector
    apart = learn_difference(denoiser, PAIRS, seeds=4, against=near).vector
    torch.testing.assert_close(apart.tensor, plain.orthogonal_to(*near).tensor)


def test_ridge_keeps_a_part_of_the_others(denoiser):
    """Of a single other one ridge / (1 + ridge) stays."""
    c, one = other(3).tensor, other(4)
    unit = one.tensor / one.tensor.norm()
    for ridge in (0.0, 0.25, 1.0):
        left = others_of([one], denoiser, (32,), ridge)(c)
        assert float(left @ unit) == pytest.approx(float(c @ unit) * ridge / (1 + ridge), abs=1e-5)
    several = [other(5), other(6)]
    a = torch.stack([v.tensor / v.tensor.norm() for v in several]).double()
    wanted = c.double() - a.T @ torch.linalg.solve(a @ a.T + 0.5 * torch.eye(2), a @ c.double())
    torch.testing.assert_close(others_of(several, denoiser, (32,), 0.5)(c), wanted.float())
    result = learn_difference(denoiser, PAIRS, seeds=2, against=several, ridge=0.5).vector
    assert result.info["ridge"] == "0.5"


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_score_vector_stays_orthogonal_in_every_step(denoiser, near, spatial, groups):
    seen = []
    result = learn_score(
        denoiser,
        PAIRS,
        **SMALL,
        against=near,
        spatial=spatial,
        timestep_groups=groups,
        progress=lambda *a: seen.append(a[3]),
    )
    for vector in [*seen, result.vector]:
        rows = vector.tensor if groups > 1 else vector.tensor[None]
        for row in rows:
            assert max(abs(ConceptVector(row, FAMILY).cosine(one)) for one in near) < 1e-5
    assert result.explained > 0


def test_others_of_every_shape_are_taken_out(denoiser):
    steps = other(7, 2, 32, timesteps=(900.0, 100.0))
    maps = other(8, 32, 4, 4)
    flat = others_of([steps, maps], denoiser, (32,))(other(9).tensor)
    assert abs(ConceptVector(flat, FAMILY).cosine(steps)) < 1e-6
    assert abs(float(flat @ maps.tensor.mean((1, 2)))) < 1e-4
    spatial = others_of([steps, maps], denoiser, (32, 2, 2))(other(9, 32, 2, 2).tensor)
    assert spatial.shape == (32, 2, 2)
    assert abs(ConceptVector(spatial, FAMILY).cosine(steps)) < 1e-6
    equal = [other(7), other(7) * 2.0]  # no rank of their own
    torch.testing.assert_close(
        others_of(equal, denoiser, (32,))(flat), others_of(equal[:1], denoiser, (32,))(flat), rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_kept_apart_is_refused(denoiser):
    same = learn_difference(denoiser, PAIRS, seeds=2).vector.with_title("woman")
    with pytest.raises(LearnError, match="Nothing of the vector is left without 'woman'"):
        learn_difference(denoiser, PAIRS, seeds=2, against=[same])
    with pytest.raises(FamilyMismatch):
        learn_score(denoiser, PAIRS, **SMALL, against=[ConceptVector(torch.ones(1280), "sd1")])
    with pytest.raises(LearnError, match="ridge"):
        learn_difference(denoiser, PAIRS, seeds=2, against=[same], ridge=-1.0)


def test_groups_of_timesteps_reach_a_lower_loss_than_one_vector(denoiser):
    settings = {"steps": 60, "batch": 12, "trajectories": 12, "sample_steps": 3, "patience": 99, "preservation": 0.0}
    one, three = (learn_score(denoiser, PAIRS, **settings, timestep_groups=k, start="zero") for k in (1, 3))
    assert sum(three.losses[-10:]) < sum(one.losses[-10:])
    assert three.vector.tensor.shape == (3, 32)
    assert three.vector.per_timestep and not one.vector.per_timestep
    assert three.separation > 0.7
    assert three.unet_rows == one.unet_rows


def test_one_group_is_what_it_was_before_there_were_groups(denoiser):
    a, b = (learn_score(denoiser, PAIRS, **SMALL, **options) for options in ({}, {"timestep_groups": 1}))
    assert torch.equal(a.vector.tensor, b.vector.tensor) and a.losses == b.losses


@pytest.mark.parametrize(("steps", "count"), [(6, 2), (6, 3), (6, 4), (6, 5), (6, 6), (7, 3), (20, 7)])
def test_every_step_finds_the_vector_of_its_group(steps, count):
    groups = groups_of(schedule(), steps, count)
    sizes = torch.bincount(groups.of_step)
    assert len(sizes) == count and sizes.max() - sizes.min() <= 1
    vector = ConceptVector(torch.arange(count).float()[:, None].expand(count, 32), FAMILY, timesteps=groups.middles)
    found = [int(vector.at(t)[0]) for t in timesteps(schedule(), steps)]
    assert found == groups.of_step.tolist()


@pytest.mark.parametrize("count", [0, 3])
def test_more_groups_than_steps_are_refused(denoiser, count):
    with pytest.raises(LearnError, match=f"timestep_groups is {count}.*sample_steps, 2"):
        learn_score(denoiser, PAIRS, **SMALL, timestep_groups=count)


def test_a_stack_of_equal_vectors_has_the_length_of_one(denoiser):
    options = {"trajectories": 4, "sample_steps": 2, "guidance": 1.0, "holdout": 0.5, "seed": 0, "batch": 6}
    with torch.no_grad(), denoiser.frozen():
        cache = build_cache(denoiser, PAIRS, stop=None, caching=None, **options)
        index = list(range(len(cache.states)))
        c = (cache.positive_h - cache.neutral_h()).mean((0, 2, 3))
        weight = torch.ones(len(index))
        alone = amplitude(denoiser, cache, c, weight, index, 4)
        stack = amplitude(denoiser, cache, c.expand(2, -1), weight, index, 4, cache.bucket)
    assert stack == pytest.approx(alone)
