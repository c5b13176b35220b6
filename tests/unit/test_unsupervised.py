"""Directions found without a concept: principal components, the decoder's singular vectors, and their names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_diffusers import LAYOUTS, bag_of_words, schedule, text, tiny_denoiser, tiny_unet

from concept_steer import ConceptVector
from concept_steer.analysis.discovery import discover
from concept_steer.analysis.naming import WORDS, fill, nearest, prompt_directions
from concept_steer.analysis.strips import Strips, contact_sheet
from concept_steer.cli.discover import METHODS, file_name
from concept_steer.denoiser import Conditioning
from concept_steer.errors import LearnError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.learn.found import FoundDirection, named
from concept_steer.learn.jacobian import Jacobian, plain_attention
from concept_steer.learn.readings import readings
from concept_steer.learn.unsupervised import jacobian_directions, principal_directions

pytest.importorskip("diffusers")
FAMILY = "custom:24x32"
PCA = {"count": 3, "seeds": 8, "timesteps": (0.0, 0.5), "steps": 2, "guidance": 2.0}
JACOBIAN = {"count": 2, "seeds": 2, "steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


def h_of(denoiser, prompts, seeds, moments, steps=2, guidance=2.0):
    """h (T, n, C, H, W) as the methods read it."""
    with torch.no_grad():
        found = readings(denoiser, prompts, seeds, moments, steps=steps, guidance=guidance, batch=16)
        return torch.stack([read.state.h for read in found])


def full_jacobian(denoiser, state, t, spatial, mask=None):
    """d x0_hat / d c as a matrix, column by column from finite differences in double precision's stead: autograd."""
    shape = state.h.shape[1:] if spatial else state.h.shape[1:2]

    def x0(c):
        h = state.h + (c if spatial else c.view(-1, 1, 1))
        x0 = denoiser.schedule.to_x0(torch.zeros(1, 4, 8, 8), denoiser.from_h(state.with_h(h)), t)
        return (x0 if mask is None else x0 * mask).flatten()

    with plain_attention(), denoiser.frozen():
        return torch.autograd.functional.jacobian(x0, torch.zeros(shape)).flatten(1)


def test_a_reading_passes_through_its_moments_and_stops_at_the_last(denoiser):
    before = denoiser.cost.snapshot()
    with torch.no_grad():
        found = list(readings(denoiser, ["a", "b"], [0, 1], [0.0, 0.3, 0.5], steps=4, guidance=3.0, batch=2))
    assert [read.t for read in found] == [999.0, 699.0, 500.0]
    spent = denoiser.cost.since(before)
    assert (spent.encoder_rows, spent.decoder_rows) == (3 * 4 + 2, 3 * 4)  # 0, .25, .3 with two rows each, .5 with one


def test_a_batch_split_changes_no_reading(denoiser):
    def all_of(batch):
        with torch.no_grad():
            return [
                read.state.h
                for read in readings(denoiser, ["a", "b", "c"], [0, 1, 2], [0.5], steps=2, guidance=2.0, batch=batch)
            ]

    torch.testing.assert_close(torch.cat(all_of(1)), torch.cat(all_of(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moments", [[], [0.5, 0.5], [0.5, 0.2], [1.5]])
def test_moments_that_are_no_ascending_shares_are_refused(denoiser, moments):
    with pytest.raises(LearnError, match="ascending"):
        list(readings(denoiser, ["a"], [0], moments, steps=2, guidance=1.0, batch=1))


def test_strength_one_of_a_principal_direction_is_so_many_standard_deviations_of_h(denoiser):
    found = principal_directions(denoiser, ["a cook"], **PCA, deviations=3.0)
    h = h_of(denoiser, ["a cook"] * 8, range(8), (0.0, 0.5)).mean((3, 4))
    centred = h - h.mean(1, keepdim=True)
    for direction in found:
        c = direction.vector.tensor
        along = (centred @ (c / c.norm())).square().sum() / (2 * 7)
        assert c.norm() == pytest.approx(3 * float(along.sqrt()), rel=1e-3)
        assert c[c.abs().argmax()] > 0
        assert direction.value == pytest.approx(float(along * 14 / centred.square().sum()), rel=1e-3)
    assert found[0].value > found[1].value > found[2].value


def test_no_direction_has_more_variance_than_the_first(denoiser):
    first = principal_directions(denoiser, ["a cook"], **PCA)[0].vector.tensor
    h = h_of(denoiser, ["a cook"] * 8, range(8), (0.0, 0.5)).mean((3, 4))
    centred = (h - h.mean(1, keepdim=True)).flatten(0, 1)
    others = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    spread = (centred @ torch.nn.functional.normalize(torch.cat([first[None], others]), dim=1).T).square().sum(0)
    assert spread[0] > spread[1:].max()


@pytest.mark.parametrize("within", [True, False])
def test_what_the_prompts_differ_in_is_left_out_unless_asked_for(denoiser, within):
    prompts = ["a cook", "a pilot"]
    found = principal_directions(denoiser, prompts, **PCA, within_prompts=within)
    h = h_of(denoiser, prompts * 4, range(8), (0.0, 0.5)).mean((3, 4))
    cooks, pilots = h[:, ::2], h[:, 1::2]
    groups = [cooks, pilots] if within else [h]
    centred = torch.cat([group - group.mean(1, keepdim=True) for group in groups], 1)
    _, values, vectors = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    assert [one.value for one in found] == pytest.approx((values[:3] ** 2 / (values**2).sum()).tolist(), rel=1e-3)
    assert abs(float(torch.cosine_similarity(found[0].vector.tensor, vectors[0], dim=0))) > 0.999


def test_per_timestep_vectors_have_a_direction_for_each_reading(denoiser):
    found = principal_directions(denoiser, ["a cook"], **PCA, per_timestep=True)
    assert all(one.vector.timesteps == (999.0, 500.0) for one in found)
    h = h_of(denoiser, ["a cook"] * 8, range(8), (0.0, 0.5)).mean((3, 4))
    centred = h - h.mean(1, keepdim=True)
    for one in found:  # the same seeds lie on the same side at both times
        early, late = (centred[i] @ one.vector.tensor[i] for i in (0, 1))
        assert float((early * late).sum()) > 0


def test_maps_are_found_too_and_the_same_seed_finds_the_same(denoiser):
    one, again = (principal_directions(denoiser, ["a cook"], **PCA, spatial=True) for _ in range(2))
    assert one[0].vector.tensor.shape == (32, 2, 2)
    assert [a.vector for a in one] == [b.vector for b in again]


def test_reading_that_is_stopped_uses_the_seeds_it_has(denoiser):
    asked = iter([False, False, True])
    found = principal_directions(denoiser, ["a cook"], **{**PCA, "seeds": 12}, batch=4, stop=lambda: next(asked, True))
    assert found[0].vector.info["seeds"] == "8"
    with pytest.raises(LearnError, match="stopped before"):
        principal_directions(denoiser, ["a cook"], **PCA, stop=lambda: True)


def test_too_few_seeds_for_so_many_directions_are_refused(denoiser):
    with pytest.raises(LearnError, match="more seeds"):
        principal_directions(denoiser, ["a", "b", "c", "d"], count=5, seeds=8, timesteps=(0.0,))


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("layout", ["sd", "mid only"])
def test_jacobian_directions_are_the_singular_vectors_of_the_decoder(layout, spatial):
    denoiser = tiny_denoiser(layout)
    found = jacobian_directions(denoiser, ["a cook"], **{**JACOBIAN, "seeds": 1}, spatial=spatial)
    with torch.no_grad():
        (read,) = readings(denoiser, ["a cook"], [0], [0.5], steps=2, guidance=2.0, batch=4)
    _, values, vectors = torch.linalg.svd(full_jacobian(denoiser, read.state, read.t, spatial))
    for i, direction in enumerate(found):
        assert direction.converged
        assert direction.value == pytest.approx(float(values[i]), rel=1e-3)
        cosine = torch.cosine_similarity(direction.vector.tensor.flatten(), vectors[i], dim=0)
        assert abs(float(cosine)) > 0.999


def test_several_seeds_give_the_singular_vectors_of_their_stacked_jacobians_whatever_the_batch(denoiser):
    found = {batch: jacobian_directions(denoiser, ["a cook"], **JACOBIAN, batch=batch) for batch in (1, 2)}
    with torch.no_grad():
        (read,) = readings(denoiser, ["a cook"] * 2, [0, 1], [0.5], steps=2, guidance=2.0, batch=2)
    stacked = torch.cat([full_jacobian(denoiser, read.state[i : i + 1], read.t, False) for i in (0, 1)])
    _, values, vectors = torch.linalg.svd(stacked / 2**0.5)
    for directions in found.values():
        assert [d.value for d in directions] == pytest.approx(values[:2].tolist(), rel=1e-3)
        assert abs(float(torch.cosine_similarity(directions[0].vector.tensor, vectors[0], dim=0))) > 0.999


def test_a_mask_counts_only_what_changes_there(denoiser):
    mask = torch.zeros(8, 8)
    mask[:, :2] = 1
    found = jacobian_directions(denoiser, ["a cook"], **{**JACOBIAN, "seeds": 1}, mask=mask, spatial=True)
    with torch.no_grad():
        (read,) = readings(denoiser, ["a cook"], [0], [0.5], steps=2, guidance=2.0, batch=4)
    _, values, vectors = torch.linalg.svd(full_jacobian(denoiser, read.state, read.t, True, mask))
    assert found[0].value == pytest.approx(float(values[0]), rel=1e-3)
    assert abs(float(torch.cosine_similarity(found[0].vector.tensor.flatten(), vectors[0], dim=0))) > 0.999


@pytest.mark.parametrize("mask", [torch.zeros(8, 8), torch.full((8, 8), 2.0), torch.ones(1, 8, 8)])
def test_a_mask_that_cannot_be_is_refused(denoiser, mask):
    with pytest.raises(LearnError, match="mask"):
        jacobian_directions(denoiser, ["a cook"], **JACOBIAN, mask=mask)


def test_too_few_iterations_are_reported_as_not_converged(denoiser):
    found = jacobian_directions(denoiser, ["a cook"], **JACOBIAN, iterations=2)
    assert not found[1].converged and found[1].iterations == 2
    assert "not converged" in found[1].summary()


def test_an_iteration_that_is_stopped_gives_what_it_has(denoiser):
    found = jacobian_directions(
        denoiser, ["a cook"], **JACOBIAN, tolerance=0, stop=iter([False] + [True] * 99).__next__
    )
    assert len(found) == 2 and found[0].iterations == 2


def test_strength_one_of_a_jacobian_direction_is_a_share_of_h(denoiser):
    one, spatial = (
        jacobian_directions(denoiser, ["a cook"], **JACOBIAN, spatial=spatial, share_of_h=0.5)[0].vector
        for spatial in (False, True)
    )
    h = h_of(denoiser, ["a cook"] * 2, [0, 1], [0.5])
    wanted = 0.5 * float(h.square().mean().sqrt())
    assert float(one.tensor.square().mean().sqrt()) == pytest.approx(wanted, rel=1e-3)
    assert float(spatial.tensor.square().mean().sqrt()) == pytest.approx(wanted, rel=1e-3)


def test_attention_kernels_are_as_before_after_the_jacobian(denoiser):
    state = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    with pytest.raises(ZeroDivisionError), plain_attention():
        assert not torch.backends.cuda.flash_sdp_enabled()
        raise ZeroDivisionError
    assert state == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


def test_a_decoder_without_second_derivative_is_explained(denoiser):
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    class Wrapped:
        cost, schedule, latent_shape = denoiser.cost, denoiser.schedule, denoiser.latent_shape

        def from_h(self, state):
            return Fused.apply(denoiser.from_h(state))

    with torch.no_grad():
        (read,) = readings(denoiser, ["a cook"], [0], [0.5], steps=2, guidance=2.0, batch=1)
    with pytest.raises(LearnError, match="second derivative"), denoiser.frozen():
        Jacobian(Wrapped(), [read.state], read.t, None, False).squared(torch.randn(32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_prediction_type_gives_both_kinds(layout):
    def pooled(prompts):
        return Conditioning(bag_of_words(prompts).embeds, text(len(prompts), "sdxl").pooled)

    encode = pooled if layout == "sdxl" else bag_of_words
    model = DiffusersDenoiser(Components(tiny_unet(layout), schedule("v_prediction"), encode))
    assert len(principal_directions(model, ["a"], **PCA)) == 3
    assert len(jacobian_directions(model, ["a"], **{**JACOBIAN, "seeds": 1}, iterations=4)) == 2


def test_both_work_inside_inference_mode_and_leave_no_gradient(denoiser):
    with torch.inference_mode():
        jacobian_directions(denoiser, ["a"], **JACOBIAN, iterations=3)
        principal_directions(denoiser, ["a"], **PCA)
    assert all(p.grad is None and p.requires_grad for p in denoiser.unet.parameters())


# --- names


def test_a_prompts_direction_is_the_mean_change_of_h_from_the_same_noise(denoiser):
    table = prompt_directions(denoiser, ["a woman cook"], "a cook", seeds=3, timesteps=(0.0,))
    change = h_of(denoiser, ["a woman cook"] * 3, range(3), [0.0]) - h_of(denoiser, ["a cook"] * 3, range(3), [0.0])
    torch.testing.assert_close(table["a woman cook"].tensor, change[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_names_cost_the_encoder_half_only_at_the_first_moment(denoiser):
    before = denoiser.cost.snapshot()
    prompt_directions(denoiser, ["a", "b"], "c", seeds=2, timesteps=(0.0,))
    spent = denoiser.cost.since(before)
    assert (spent.encoder_rows, spent.decoder_rows) == (2 + 2 * 2, 0)


def test_a_prompts_own_direction_is_nearest_to_it_and_its_opposite_has_the_negative_cosine(denoiser):
    table = prompt_directions(denoiser, {"woman": "a woman cook", "old": "an old cook", "red": "a red cook"}, "a cook")
    assert nearest(table["old"], table, 1, centred=False)[0] == ("old", pytest.approx(1.0))
    assert nearest(-table["old"], table, 1, centred=False)[0] == ("old", pytest.approx(-1.0))
    assert nearest(table["old"], table, 1)[0][0] == "old"
    assert len(nearest(table["old"], table, 2)) == 2
    assert nearest(table["old"], {}, 2) == []


def test_the_prompt_that_is_the_neutral_one_is_refused(denoiser):
    with pytest.raises(LearnError, match="neutral"):
        prompt_directions(denoiser, ["a cook"], "a cook")


def test_words_become_names_and_prompts():
    assert fill(["{} at night", "a woman", "{}, smiling", "{}", "{} with dark skin"], "a cook") == {
        "night": "a cook at night",
        "woman": "a woman",
        "smiling": "a cook, smiling",
        "dark skin": "a cook with dark skin",
    }
    assert len(fill(WORDS, "a cook")) == len(WORDS)  # no two of the same name


def test_a_direction_is_turned_to_its_nearest_name_and_named_by_it():
    vector = ConceptVector(torch.randn(32), FAMILY, title="pca 2")
    direction = named(FoundDirection(vector, "pca", 2, 0.1), [("smiling", -0.5), ("old", 0.25)])
    assert direction.vector == -vector
    assert direction.vector.title == "pca 2 smiling"
    assert direction.names == (("smiling", 0.5), ("old", -0.25))
    assert file_name(direction) == "pca-2-smiling"
    assert file_name(replace(direction, names=(("Über / den\\Wolken: *?", 1.0),))) == "pca-2-ber-den-wolken"
    assert file_name(replace(direction, names=())) == "pca-2"
    json.dumps(direction.report())


@pytest.mark.parametrize("method", METHODS)
def test_discovery_names_every_direction(denoiser, method):
    options = PCA if method == "pca" else JACOBIAN
    found = discover(denoiser, ["a cook"], method=method, words=["{} woman", "{} old", "{} red"], **options)
    assert all(len(one.names) == 3 and one.names[0][1] > 0 for one in found)
    assert found[0].vector.info["names"].startswith(found[0].names[0][0])


def test_the_word_list_of_the_embedded_model_makes_different_prompts():
    from concept_steer.demo.words import NEUTRAL, naming_words

    named_prompts = fill(naming_words(), NEUTRAL)
    assert len(named_prompts) == len(naming_words()) and {"woman", "dark skin", "blue background"} <= set(named_prompts)


# --- strips


def test_a_strip_draws_the_plain_column_once_and_keeps_it(denoiser, monkeypatch):
    drawn = []
    monkeypatch.setattr(denoiser, "decode", lambda x: drawn.append(len(x)) or x[:, :3].clamp(-1, 1))
    vector = ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), FAMILY)
    strips = Strips(denoiser, ["a", "b"], [1, 2], strengths=(-1, 0, 1), steps=2, guidance=2.0)
    first, again = strips.drawn(vector), strips.drawn(-vector)
    assert drawn == [6, 4]
    assert first[0][1].tobytes() == again[0][1].tobytes()
    assert first[1][0].tobytes() == again[1][2].tobytes() != first[1][1].tobytes()
    sheet = contact_sheet([first[0], again[0]], ["one", "two"], strips.strengths, "all")
    assert sheet.width == strips.picture(first, "one").width
