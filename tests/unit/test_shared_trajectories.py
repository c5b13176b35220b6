"""What concepts share is computed once, and changes no concept's numbers; learning alone is as it ever was."""

from __future__ import annotations

import pytest
import torch
from tiny_diffusers import tiny_denoiser

from concept_steer.denoiser import Conditioning
from concept_steer.errors import LearnError
from concept_steer.learn import learn_score
from concept_steer.learn.result import encode, rows
from concept_steer.learn.trajectories import SharedNeutral, build_cache
from concept_steer.sampling import ddim_step, noise, timesteps

pytest.importorskip("diffusers")
WOMAN = [("a pilot", "a woman pilot"), ("a cook", "a woman cook"), ("a judge", "a woman judge")]
OLD = [(neutral, f"{neutral} old") for neutral, _ in WOMAN]
PLAN = {"trajectories": 10, "sample_steps": 3, "guidance": 5.0, "seed": 3, "batch": 8}
HOOKS = {"holdout": 0.25, "stop": None, "caching": None}
SMALL = {"steps": 10, "batch": 8, "trajectories": 10, "sample_steps": 3, "seed": 3}


@pytest.fixture
def denoiser():
    return tiny_denoiser("sd")


@torch.no_grad()
def cached(denoiser, pairs, shared=None, **changes):
    return build_cache(denoiser, pairs, **{**HOOKS, **PLAN, **changes}, shared=shared)


def same(one, two) -> bool:
    names = ("neutral", "positive", "positive_h", "bucket", "held_out")
    equal = [torch.equal(getattr(one, name), getattr(two, name)) for name in names]
    states = [torch.equal(a.h, b.h) for a, b in zip(one.states, two.states, strict=True)]
    skips = [torch.equal(a.skips[0], b.skips[0]) for a, b in zip(one.states, two.states, strict=True)]
    return all([*equal, *states, *skips])


@torch.no_grad()
def written_out(denoiser, pairs):
    """(h, neutral, positive) of all items in order, by the recipe in plain words: three prompts in one batch."""
    encoded = encode(denoiser, ["", *(prompt for pair in pairs for prompt in pair)])
    times = timesteps(denoiser.schedule, PLAN["sample_steps"])
    numbers = list(range(PLAN["trajectories"]))
    found = []
    for first in range(0, len(numbers), PLAN["batch"] // 3):
        mine = numbers[first : first + PLAN["batch"] // 3]
        x = torch.stack([noise(PLAN["seed"] + i, denoiser.latent_shape) for i in mine])
        for step, t in enumerate(times):
            texts = [rows(encoded, [pairs[i // 2 % len(pairs)][side] for i in mine]) for side in (0, 1)]
            last = t == times[-1]
            cond = Conditioning.cat(texts if last else [*texts, encoded[""].expand(len(mine))])
            state = denoiser.to_h(x.repeat(len(cond) // len(mine), 1, 1, 1), t, cond)
            neutral, positive, *empty = denoiser.from_h(state).split(len(mine))
            found.append((state.h[: len(mine)], neutral, positive))
            if not last:
                driver = torch.stack([(neutral, positive)[i % 2][n] for n, i in enumerate(mine)])
                prediction = empty[0] + PLAN["guidance"] * (driver - empty[0])
                x = ddim_step(denoiser.schedule, x, prediction, t, times[step + 1])
    return [torch.cat(column) for column in zip(*found, strict=True)]


def test_without_sharing_every_bit_is_that_of_the_plain_recipe(denoiser):
    h, neutral, positive = written_out(denoiser, WOMAN)
    cache = cached(denoiser, WOMAN)
    assert torch.equal(cache.neutral_h(), h)
    assert torch.equal(cache.neutral, neutral)
    assert torch.equal(cache.positive, positive)


def test_sharing_gives_the_same_items_in_the_same_order_up_to_rounding(denoiser):
    alone, shared = cached(denoiser, WOMAN), cached(denoiser, WOMAN, SharedNeutral(denoiser))
    assert torch.equal(alone.bucket, shared.bucket)
    assert torch.equal(alone.held_out, shared.held_out)
    for name in ("neutral", "positive", "positive_h"):
        torch.testing.assert_close(getattr(shared, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.neutral_h(), alone.neutral_h(), rtol=1e-4, atol=1e-5)


def test_a_concept_gets_the_same_bits_whoever_shares_with_it(denoiser):
    shared = SharedNeutral(denoiser)
    cached(denoiser, WOMAN, shared)
    assert same(cached(denoiser, OLD, shared), cached(denoiser, OLD, SharedNeutral(denoiser)))
    assert not same(cached(denoiser, OLD, shared), cached(denoiser, WOMAN, shared))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_the_rows_saved_are_those_that_learning_alone_costs_more(denoiser, guidance):
    def cost(pairs, shared):
        before = denoiser.cost.snapshot()
        cached(denoiser, pairs, shared, guidance=guidance)
        return denoiser.cost.since(before).unet_rows

    shared = SharedNeutral(denoiser)
    alone = cost(OLD, None)
    assert cost(WOMAN, shared) == alone  # the first pays for all
    assert shared.saved_rows == 0
    assert cost(OLD, shared) == alone - shared.saved_rows
    empty = guidance != 1
    assert shared.saved_rows == 5 * (3 + 2 * empty) + 5 * (1 + empty)  # neutral trajectories, the others' first step


def test_other_settings_or_neutral_prompts_share_nothing(denoiser):
    shared = SharedNeutral(denoiser)
    cached(denoiser, WOMAN, shared)
    cached(denoiser, OLD, shared, seed=4)
    cached(denoiser, OLD, shared, seed=4, guidance=3.0)
    cached(denoiser, OLD[:2], shared, seed=4, guidance=3.0)
    assert shared.saved_rows == 0
    assert same(cached(denoiser, OLD, shared), cached(denoiser, OLD, SharedNeutral(denoiser)))


def test_a_stop_half_way_leaves_nothing_half_made_behind(denoiser):
    shared = SharedNeutral(denoiser)
    asked = iter([False] * 4 + [True])
    with pytest.raises(LearnError, match="before its first step"):
        cached(denoiser, WOMAN, shared, stop=lambda: next(asked))
    assert same(cached(denoiser, WOMAN, shared), cached(denoiser, WOMAN, SharedNeutral(denoiser)))
    assert shared.saved_rows == 0


def test_progress_ends_at_its_total_with_and_without_sharing(denoiser):
    shared = SharedNeutral(denoiser)
    for given in (None, shared, shared):
        told: list[tuple[int, int]] = []
        cached(denoiser, WOMAN, given, caching=lambda done, total, told=told: told.append((done, total)))
        assert [done for done, _ in told] == list(range(1, len(told) + 1))
        assert {total for _, total in told} == {len(told)}


def test_another_model_is_refused(denoiser):
    with pytest.raises(LearnError, match="another one for this model"):
        cached(tiny_denoiser("sd"), WOMAN, SharedNeutral(denoiser))


def test_a_vector_learned_with_sharing_is_the_one_learned_alone_up_to_rounding(denoiser):
    alone = learn_score(denoiser, OLD, **SMALL)
    shared = SharedNeutral(denoiser)
    learn_score(denoiser, WOMAN, **SMALL, shared=shared)
    together = learn_score(denoiser, OLD, **SMALL, shared=shared)
    assert together.vector.cosine(alone.vector) > 0.9999
    assert together.vector.norm == pytest.approx(alone.vector.norm, rel=1e-3)
    assert together.unet_rows == alone.unet_rows - shared.saved_rows
