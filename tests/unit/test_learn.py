from __future__ import annotations

import json

import pytest
import torch
from tiny_diffusers import LAYOUTS, bag_of_words, schedule, text, tiny_denoiser, tiny_unet

from concept_steer.denoiser import Conditioning
from concept_steer.errors import FamilyMismatch, LearnError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.learn import learn_difference, learn_score
from concept_steer.learn.result import auc
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
PAIRS = [("a pilot", "a woman pilot"), ("a cook", "a woman cook")]
SMALL = {"steps": 12, "batch": 4, "trajectories": 8, "sample_steps": 2, "map_below": 0.0}


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


@pytest.fixture(scope="module")
def learned(denoiser):
    return learn_score(
        denoiser, PAIRS, steps=40, batch=8, trajectories=24, sample_steps=3, start="zero", patience=99, map_below=0.0
    )


def test_the_held_out_loss_falls_below_the_start(learned):
    assert learned.held_out[0] == pytest.approx(1.0, abs=1e-4)  # no vector at all explains nothing
    assert min(learned.held_out) < 0.8
    assert learned.explained == pytest.approx(1 - min(learned.held_out))
    assert learned.separation > 0.7
    assert len(learned.losses) == 40
    assert learned.stopped == "finished after 40 steps"


def test_the_vector_moves_the_prediction_towards_the_positive_prompt_elsewhere(denoiser, learned):
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(99))
    rows = [denoiser.encode_text([p]).expand(6) for p in ("a pilot", "a woman pilot")]
    with torch.no_grad():
        neutral, positive = (denoiser.predict(x, 600, cond) for cond in rows)
        state = denoiser.to_h(x, 600, rows[0])
        steered = denoiser.from_h(state.with_h(state.h + learned.vector.tensor.view(1, -1, 1, 1)))
    assert (steered - positive).square().mean() < 0.9 * (neutral - positive).square().mean()


def test_metadata_and_report_say_how_it_was_made(denoiser, learned):
    info = learned.vector.info
    assert info["prompt_neutral"] == "a pilot | a cook"
    assert info["prompt_positive"] == "a woman pilot | a woman cook"
    assert (info["method"], info["steps"], info["seed"]) == ("score", "40", "0")
    assert info["checkpoint_hash"] == denoiser.checkpoint_hash
    assert float(info["calibration"]) > 0
    assert learned.vector.family == "custom:24x32"
    assert learned.vector.title == "a woman pilot"
    json.dumps(learned.report())
    assert "UNet rows forward" in learned.summary()


def test_the_cost_is_counted(denoiser):
    result = learn_score(denoiser, PAIRS, **SMALL, start="zero", patience=99)
    items, held = 8 * 2, 2 * 2  # 4 couples, one of them held out
    rows = 8 * (3 + 2)  # three rows at the first step, two at the last
    calibration = items - held
    decoder = rows + 12 * 4 + held * len(result.held_out) + calibration
    assert (result.unet_rows, result.backward_rows) == ((rows + decoder) / 2, 12 * 4)
    assert items == 16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [False, True])
def test_every_layout_learns_channel_vectors_and_maps(layout, spatial):
    encode = bag_of_words if layout != "sdxl" else with_pooled
    model = DiffusersDenoiser(Components(tiny_unet(layout), schedule(), encode))
    shape = (32, 2, 2) if spatial else (32,)
    simple = learn_difference(model, PAIRS, seeds=2, spatial=spatial)
    assert simple.vector.tensor.shape == shape
    result = learn_score(model, PAIRS[:1], **SMALL, spatial=spatial, start=simple.vector)
    assert result.vector.tensor.shape == shape
    assert result.explained is not None


def with_pooled(prompts) -> Conditioning:
    cond = bag_of_words(prompts)
    return Conditioning(cond.embeds, cond.embeds[:, 0, :12])


def test_learning_leaves_every_weight_and_flag_as_it_was(denoiser):
    unet = denoiser.unet
    unet.train()
    unet.conv_out.weight.requires_grad_(False)
    try:
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        wanted = [p.requires_grad for p in unet.parameters()]
        learn_difference(denoiser, PAIRS, seeds=2)
        learn_score(denoiser, PAIRS, **SMALL)
        assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
        assert [p.requires_grad for p in unet.parameters()] == wanted
        assert all(p.grad is None for p in unet.parameters())
        assert unet.training
        assert torch.is_grad_enabled()
    finally:
        unet.eval()
        unet.conv_out.weight.requires_grad_(True)


def test_flags_come_back_after_an_exception_too(denoiser):
    def fail(*args):
        raise KeyError("interrupted")

    with pytest.raises(KeyError):
        learn_score(denoiser, PAIRS, **SMALL, progress=fail)
    assert all(p.requires_grad for p in denoiser.unet.parameters())


def test_only_the_decoder_half_is_in_the_graph(denoiser):
    encoder, decoder = [], []
    hooks = [
        block.register_forward_hook(lambda m, a, out: encoder.append(out[0].requires_grad))
        for block in denoiser.unet.down_blocks
    ]
    hooks.append(denoiser.unet.mid_block.register_forward_hook(lambda m, a, out: encoder.append(out.requires_grad)))
    for block in denoiser.unet.up_blocks:
        hooks.append(block.register_forward_hook(lambda m, a, out: decoder.append(out.requires_grad)))
    backward = []
    hooks += [b.register_full_backward_hook(lambda m, i, o: backward.append(m)) for b in denoiser.unet.down_blocks]
    try:
        learn_score(denoiser, PAIRS, **SMALL)
    finally:
        for hook in hooks:
            hook.remove()
    assert encoder and not any(encoder)
    assert any(decoder)
    assert not backward


def test_no_encoder_row_is_computed_while_learning(denoiser):
    seen = []
    learn_score(denoiser, PAIRS, **SMALL, patience=99, progress=lambda *a: seen.append(denoiser.cost.encoder_rows))
    assert len(seen) == 12 and len(set(seen)) == 1


def test_learning_works_for_callers_in_inference_mode(denoiser):
    outside = learn_score(denoiser, PAIRS, **SMALL)
    with torch.inference_mode():
        inside = learn_score(denoiser, PAIRS, **SMALL)
        simple = learn_difference(denoiser, PAIRS, seeds=2)
    assert torch.equal(inside.vector.tensor, outside.vector.tensor)
    assert not inside.vector.tensor.is_inference() and not simple.vector.tensor.is_inference()


def test_prompts_encoded_in_inference_mode_are_usable():
    def encode(prompts):
        with torch.inference_mode():
            return bag_of_words(prompts)

    model = DiffusersDenoiser(Components(tiny_unet("sd"), schedule(), encode))
    assert learn_score(model, PAIRS, **SMALL).losses


def test_weights_made_in_inference_mode_are_refused_in_words():
    with torch.inference_mode():
        model = tiny_denoiser("sd")
    with pytest.raises(LearnError, match="Load the model outside"):
        learn_score(model, PAIRS, **SMALL)


def test_stopping_keeps_the_best_so_far(denoiser):
    count = iter(range(1000))
    cached = []
    result = learn_score(
        denoiser,
        PAIRS,
        **{**SMALL, "steps": 500},
        caching=lambda done, total: cached.append((done, total)),
        stop=lambda: len(cached) > 0 and cached[-1][0] == cached[-1][1] and next(count) >= 5,
    )
    assert len(result.losses) == 5
    assert result.stopped.startswith("stopped by request after 5 of 500")
    assert result.explained == pytest.approx(1 - min(result.held_out))
    assert cached[-1][0] == cached[-1][1] == len(cached)


def test_stopping_before_anything_was_learned_is_an_error(denoiser):
    with pytest.raises(LearnError, match="before its first step"):
        learn_score(denoiser, PAIRS, **SMALL, stop=lambda: True)


@pytest.mark.parametrize(("steps", "spoiled", "named"), [(12, 8, 8), (40, 6, 7)])  # at a check, between two checks
def test_nan_stops_learning_with_the_last_good_vector(steps, spoiled, named):
    model = tiny_denoiser("mid only")
    settings = {**SMALL, "steps": steps, "start": "zero", "patience": 99}
    healthy = learn_score(model, PAIRS, **settings)
    hook = []

    def spoil(step, total, loss, vector):
        if step == spoiled:
            hook.append(model.unet.conv_out.register_forward_hook(lambda m, a, out: out * float("nan")))

    result = learn_score(model, PAIRS, **settings, progress=spoil)
    hook[0].remove()
    assert result.stopped.startswith(f"stopped at step {named} of {steps} because of NaN")
    assert result.losses == healthy.losses[:spoiled]
    assert result.held_out == healthy.held_out[: len(result.held_out)]
    assert torch.isfinite(result.vector.tensor).all()
    assert result.explained is not None and result.explained > 0


def test_a_model_that_gives_nan_from_the_start_is_named():
    model = tiny_denoiser("mid only")
    with torch.no_grad():
        model.unet.conv_in.weight.fill_(float("nan"))
    for learn in (lambda: learn_score(model, PAIRS, **SMALL), lambda: learn_difference(model, PAIRS, seeds=2)):
        with pytest.raises(LearnError, match="not finite"):
            learn()


def test_patience_ends_learning_that_no_longer_gets_better(denoiser):
    result = learn_score(denoiser, PAIRS, **{**SMALL, "steps": 200}, rate=100.0, patience=2)
    assert "no longer got better" in result.stopped
    assert len(result.losses) < 200


def test_the_same_seed_gives_the_same_vector(denoiser):
    a, b = (learn_score(denoiser, PAIRS, **SMALL, seed=3) for _ in range(2))
    other = learn_score(denoiser, PAIRS, **SMALL, seed=4)
    assert torch.equal(a.vector.tensor, b.vector.tensor)
    assert a.vector != other.vector


def test_large_states_kept_in_half_precision_change_little(denoiser, monkeypatch):
    from concept_steer.learn import items

    full = learn_score(denoiser, PAIRS, **SMALL)
    monkeypatch.setattr(items, "LARGE_STATE", 0)
    half = learn_score(denoiser, PAIRS, **SMALL)
    assert full.vector.cosine(half.vector) > 0.99
    assert half.explained == pytest.approx(full.explained, abs=0.02)


def test_v_prediction_models_are_learned_from_too():
    model = DiffusersDenoiser(Components(tiny_unet("mid only"), schedule("v_prediction"), bag_of_words))
    assert learn_score(model, PAIRS, **SMALL).explained > 0


def test_the_difference_is_the_mean_change_of_h(denoiser):
    result = learn_difference(denoiser, PAIRS[:1], seeds=3, seed=5, timesteps=(0.0,))
    from concept_steer.sampling import noise

    x = torch.stack([noise(seed, (4, 8, 8)) for seed in (5, 6, 7)])
    with torch.no_grad():
        low, high = (denoiser.to_h(x, 999, denoiser.encode_text([p]).expand(3)).h for p in PAIRS[0])
    torch.testing.assert_close(result.vector.tensor, (high - low).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert result.method == "difference" and result.explained is None


def test_the_difference_separates_and_costs_what_it_says(denoiser):
    seen = []
    result = learn_difference(
        denoiser, PAIRS, seeds=4, batch=3, progress=lambda done, total: seen.append((done, total))
    )
    assert result.separation > 0.7
    assert result.unet_rows == 8 * 5.5 and result.backward_rows == 0
    assert seen[-1] == (12, 12)
    assert learn_difference(denoiser, PAIRS, seeds=1).separation is None


def test_the_difference_does_not_depend_on_the_batch_size(denoiser):
    a, b = (learn_difference(denoiser, PAIRS, seeds=4, batch=batch).vector.tensor for batch in (2, 8))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learn", [learn_difference, learn_score])
def test_pairs_without_meaning_are_refused(learn, denoiser):
    with pytest.raises(LearnError, match="at least one pair"):
        learn(denoiser, [])
    with pytest.raises(LearnError, match="Both prompts of a pair are 'a cat'"):
        learn(denoiser, [("a cat", "a cat")])


def test_prompts_that_make_no_difference_are_refused():
    model = DiffusersDenoiser(Components(tiny_unet("sd"), schedule(), lambda prompts: text(1).expand(len(prompts))))
    with pytest.raises(LearnError, match="changes nothing"):
        learn_score(model, PAIRS, **SMALL)
    with pytest.raises(LearnError, match="Nothing was learned"):
        learn_difference(model, PAIRS, seeds=2)


def test_settings_out_of_range_and_foreign_starts_are_refused(denoiser):
    with pytest.raises(LearnError, match="holdout"):
        learn_score(denoiser, PAIRS, holdout=0.0)
    with pytest.raises(LearnError, match="ascending"):
        learn_difference(denoiser, PAIRS, timesteps=(0.5, 0.2))
    with pytest.raises(LearnError, match="one seed"):
        learn_difference(denoiser, PAIRS, seeds=0)
    with pytest.raises(FamilyMismatch):
        learn_score(denoiser, PAIRS, start=ConceptVector(torch.ones(1280), "sd1"))
    steps = ConceptVector(torch.ones(2, 32), "custom:24x32", timesteps=(0.0, 500.0))
    with pytest.raises(LearnError, match="per timestep"):
        learn_score(denoiser, PAIRS, start=steps)


def test_auc_is_the_share_of_ordered_couples():
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert auc(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5
    assert auc(torch.tensor([0.0]), torch.tensor([1.0])) == 0.0


@pytest.mark.parametrize("factor", [0.8, 2.0])
def test_calibration_lengthens_a_vector_until_it_goes_as_far_as_the_prompt(denoiser, factor: float):
    from dataclasses import replace

    from concept_steer.learn.calibration import amplitude
    from concept_steer.learn.trajectories import build_cache

    options = {"trajectories": 4, "sample_steps": 2, "guidance": 1.0, "holdout": 0.5, "seed": 0, "batch": 6}
    with torch.no_grad(), denoiser.frozen():
        cache = build_cache(denoiser, PAIRS, stop=None, caching=None, **options)
        index = list(range(len(cache.states)))
        c = (cache.positive_h - cache.neutral_h()).mean(0)
        state = cache.state(index, denoiser)
        moved = denoiser.from_h(state.with_h(state.h + c)) - cache.neutral
        prompt = replace(cache, positive=cache.neutral + factor * moved)  # a prompt that does just that much
        found = amplitude(denoiser, prompt, c, torch.ones(len(index)), index, 4)
        opposite = replace(cache, positive=cache.neutral - moved)
        assert found == pytest.approx(factor, rel=1e-3)
        assert amplitude(denoiser, opposite, c, torch.ones(len(index)), index, 4) == 1.0
