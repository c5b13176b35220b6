"""What is added to which rows of a ComfyUI batch; the same steers through the core give the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from concept_steer.errors import ConceptSteerError
from concept_steer.hosts.comfy_plan import KEY, PICTURES, ROWS, STEERS, Rows, plan_of, steered
from concept_steer.schedule import Schedule
from concept_steer.steering import Steer, apply
from concept_steer.vector import ConceptVector

FAMILY, C = "custom:8x16", 16


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector(*shape: int, seed: int = 0) -> ConceptVector:
    return ConceptVector(rand(*(shape or (C,)), seed=seed), FAMILY)


def options(steers=(), layout=(1, 0), **more):
    return {STEERS: tuple(steers), "cond_or_uncond": list(layout), **more}


def run(h, settings, latent=(16, 16), t=500.0):
    x = torch.zeros(h.shape[0], 4, *latent)
    plan = plan_of(settings, x, t, 2)
    return h if plan is None else steered(h, plan)


@pytest.mark.parametrize("operator", ["add", "remove", "gated"])
@pytest.mark.parametrize("shape", [(C,), (C, 4, 4), (C, 8, 8)])
@pytest.mark.parametrize("rows", ["cond", "uncond", "both"])
def test_the_plan_gives_what_the_core_gives(operator, shape, rows):
    h = rand(4, C, 4, 4, seed=9)
    steers = [Steer(vector(*shape, seed=1), 0.7, rows=rows, operator=operator), Steer(vector(seed=2), -1.1)]
    core = apply(h, steers, 500.0, [False, False, True, True])
    assert torch.allclose(run(h, options(steers)), core, atol=1e-6)


@pytest.mark.parametrize("layout", [(1, 0), (0, 1), (0,), (1,), (1, 0, 0), (0, 0, 1)])
@pytest.mark.parametrize("pictures", [1, 3])
def test_only_the_prompt_chunks_change_in_every_layout(layout, pictures):
    h = rand(len(layout) * pictures, C, 4, 4)
    v = vector()
    out = run(h, options([Steer(v)], layout))
    for number, kind in enumerate(layout):
        part = slice(number * pictures, (number + 1) * pictures)
        wanted = h[part] + v.tensor.view(1, -1, 1, 1) if kind == 0 else h[part]
        assert torch.equal(out[part], wanted)


def guider(**lists):
    return SimpleNamespace(conds=lists)


def test_the_guider_says_which_rows_are_prompts_where_the_index_does_not():
    conds = {"positive": [{"uuid": "p"}], "middle": [{"uuid": "m"}], "negative": [{"uuid": "n"}]}
    rows = Rows.of(guider(**conds), torch.zeros(1, 4, 16, 16))
    h, v = rand(3, C, 4, 4), vector()
    out = run(h, options([Steer(v)], (2, 1, 0), **{ROWS: rows, "uuids": ["p", "m", "n"]}))
    assert torch.equal(out[:2], h[:2] + v.tensor.view(1, -1, 1, 1))
    assert torch.equal(out[2], h[2])


def test_the_empty_prompt_of_perp_neg_is_no_prompt():
    conds = {"positive": [{"uuid": "p"}], "empty_negative_prompt": [{"uuid": "e"}], "negative": [{"uuid": "n"}]}
    rows = Rows.of(guider(**conds), torch.zeros(1, 4, 16, 16))
    assert [rows.by_uuid[name].kind for name in "pen"] == ["cond", "uncond", "uncond"]


def test_a_conditioning_in_both_lists_is_told_by_its_index():
    rows = Rows.of(guider(positive=[{"uuid": "a"}], negative=[{"uuid": "a"}]), torch.zeros(1, 4, 16, 16))
    h, v = rand(2, C, 4, 4), vector()
    out = run(h, options([Steer(v)], (1, 0), **{ROWS: rows, "uuids": ["a", "a"]}))
    assert torch.equal(out[0], h[0]) and not torch.equal(out[1], h[1])


def test_an_areas_copy_in_another_list_gets_an_id_of_its_own_and_no_vector():
    """ComfyUI copies the conditioning of an area, with id and vector, to make the other side's part of that area."""
    steer = Steer(vector())
    given = {"uuid": "a", KEY: (steer,)}
    copy, other = dict(given), {"uuid": "n"}
    one = guider(positive=[given], negative=[other, copy])
    one.original_conds = {"positive": [given], "negative": [other]}
    rows = Rows.of(one, torch.zeros(1, 4, 16, 16))
    assert given == {"uuid": "a", KEY: (steer,)} and copy["uuid"] not in ("a", "n")
    assert Rows.of(one, torch.zeros(1, 4, 16, 16)) == rows  # once is enough
    h = rand(2, C, 4, 4)
    for layout in ((1, 0), (0, 2)):  # DualCFG's index 0 is the negative
        settings = options([Steer(vector(seed=1))], layout, **{ROWS: rows, "uuids": [copy["uuid"], "a"]})
        out = run(h, settings)
        both = vector().tensor + vector(seed=1).tensor
        assert torch.equal(out[0], h[0])
        assert torch.allclose(out[1], h[1] + both.view(-1, 1, 1), atol=1e-6)


def test_a_conditioning_that_the_guider_does_not_know_is_no_prompt():
    """The older PerpNeg node runs its empty prompt by itself, as index 0."""
    rows = Rows.of(guider(positive=[{"uuid": "p"}], negative=[{"uuid": "n"}]), torch.zeros(1, 4, 16, 16))
    h, settings = rand(1, C, 4, 4), options([Steer(vector())], (0,))
    assert torch.equal(run(h, {**settings, ROWS: rows, "uuids": ["e"]}), h)
    assert not torch.equal(run(h, {**settings, ROWS: rows, "uuids": ["p"]}), h)


def test_a_prompt_with_its_own_steer_changes_alone_even_on_the_negative_side():
    steer = Steer(vector())
    conds = {"positive": [{"uuid": "p"}], "negative": [{"uuid": "n", KEY: (steer,)}]}
    rows = Rows.of(guider(**conds), torch.zeros(1, 4, 16, 16))
    h = rand(2, C, 4, 4)
    out = run(h, options((), (1, 0), **{ROWS: rows, "uuids": ["n", "p"]}))
    assert torch.equal(out[0], h[0] + steer.vector.tensor.view(-1, 1, 1)) and torch.equal(out[1], h[1])


def test_each_picture_of_a_batch_may_have_its_own_steers():
    steers = [Steer(vector(seed=i)) for i in range(2)]
    h = rand(6, C, 4, 4)
    out = run(h, options((), (1, 0), **{PICTURES: ((steers[0],), (), (steers[1],))}))
    added = out - h
    assert not added[:3].any() and not added[4].any()
    assert torch.equal(out[3], h[3] + steers[0].vector.tensor.view(-1, 1, 1))
    assert torch.equal(out[5], h[5] + steers[1].vector.tensor.view(-1, 1, 1))


def test_steers_for_another_number_of_pictures_are_an_error():
    with pytest.raises(ConceptSteerError, match="3 pictures have steers of their own, but the batch has 1"):
        run(rand(2, C, 4, 4), options((), (1, 0), **{PICTURES: ((), (), ())}))


def test_a_batch_that_the_layout_does_not_divide_is_an_error():
    with pytest.raises(ConceptSteerError, match="3 rows for 2 conditionings"):
        run(rand(3, C, 4, 4), options([Steer(vector())]))


def test_an_area_sees_its_own_part_of_the_mask():
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1  # the right half
    left, right = {"uuid": "l", "area": (16, 8, 0, 0)}, {"uuid": "r", "area": (16, 8, 0, 8)}
    rows = Rows.of(guider(positive=[left, right]), torch.zeros(1, 4, 16, 16))
    h, v = rand(2, C, 4, 2), vector()
    settings = options([Steer(v, mask=mask)], (0, 0), **{ROWS: rows, "uuids": ["l", "r"]})
    out = run(h, settings, latent=(16, 8))
    assert torch.allclose(out[0], h[0], atol=1e-6)
    assert torch.allclose(out[1], h[1] + v.tensor.view(-1, 1, 1), atol=1e-6)


@pytest.mark.parametrize("settings", [(0.0, Schedule()), (1.0, Schedule(0.8, 1.0))])
def test_nothing_to_do_is_no_plan_at_all(settings):
    strength, schedule = settings
    steer = Steer(vector(), strength, schedule)
    assert plan_of(options([steer]), torch.zeros(2, 4, 16, 16), 500.0, 2) is None


def test_another_size_of_h_than_foreseen_is_met():
    h, steer = rand(2, C, 7, 5), Steer(vector(C, 4, 4), mask=torch.ones(8, 8))
    assert run(h, options([steer])).shape == h.shape


def test_half_precision_is_rounded_once():
    h, steers = rand(2, C, 4, 4).half(), [Steer(vector(seed=i), 0.3) for i in range(4)]
    out = run(h, options(steers))
    exact = h[1].float() + sum(0.3 * s.vector.tensor for s in steers).view(-1, 1, 1)
    assert out.dtype == torch.float16 and torch.equal(out[1], exact.half())


def test_the_order_of_steers_changes_no_bit():
    h, steers = rand(2, C, 4, 4), [Steer(vector(seed=i), 0.1 * i + 0.3) for i in range(5)]
    assert torch.equal(run(h, options(steers)), run(h, options(steers[::-1])))
