"""The published recipe, on tiny real UNets (latents 8 x 8) and on a model that knows its answer."""

from __future__ import annotations

import pytest
import torch
from tiny_diffusers import LAYOUTS, bag_of_words, schedule, tiny_denoiser, tiny_unet

from concept_steer.denoiser import Conditioning
from concept_steer.errors import LearnError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.learn import learn_self_discovery
from concept_steer.learn.self_discovery import _Recipe
from concept_steer.sampling import sample

pytest.importorskip("diffusers")
from test_learn_pictures import Painter

PAIRS = [("a pilot", "a woman pilot"), ("a cook", "a woman cook")]
SMALL = {"pictures": 6, "picture_steps": 2, "epochs": 3, "batch": 4}


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


def latents(count: int, colour: torch.Tensor, seed: int = 0) -> torch.Tensor:
    noise = 0.2 * torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return colour.view(1, 4, 1, 1) + noise


def test_it_finds_what_the_neutral_prompt_does_not_say_about_the_pictures():
    """The painter expects one colour, the pictures have another: c has to name the difference, and only that."""
    painter, colour = Painter(), torch.tensor([0.8, -0.3, -0.2, 0.1])
    settings = {"latents": latents(16, colour), "epochs": 40, "rate": 0.02, "spatial": False}
    result = learn_self_discovery(painter, [("a cat", "my cat")], **settings)
    found = painter.colour(result.vector)
    torch.testing.assert_close(found, colour - Painter.BELIEF, rtol=0, atol=0.12)
    assert result.vector.title == "my cat"
    assert sum(result.losses[-20:]) < 0.7 * sum(result.losses[:20])


def test_the_loss_is_the_mean_square_error_of_the_named_noise_and_its_gradient_is_exact(denoiser):
    """Against the whole UNet differentiated in one piece, encoder included."""
    x0 = latents(3, torch.zeros(4))
    recipe = _Recipe(denoiser, x0, torch.tensor([0, 1, 0]), denoiser.encode_text([a for a, _ in PAIRS]))
    pictures, c = torch.tensor([2, 0, 1]), torch.full((32, 2, 2), 0.3, requires_grad=True)
    loss = recipe.loss(c, pictures, seed=7)
    (gradient,) = torch.autograd.grad(loss, c)
    generator = torch.Generator().manual_seed(7)
    t = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    x = denoiser.schedule.add_noise(x0[pictures], noise, t)
    embeds = denoiser.encode_text([PAIRS[i][0] for i in (0, 0, 1)]).embeds
    handle = denoiser.unet.mid_block.register_forward_hook(lambda m, a, out: out + c)
    try:
        whole = (denoiser.unet(x, t, encoder_hidden_states=embeds).sample - noise).square().mean()
        (wanted,) = torch.autograd.grad(whole, c)
    finally:
        handle.remove()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, wanted)


def test_times_are_drawn_evenly_and_noises_are_fresh_in_every_step(denoiser):
    seen = []
    recipe = denoiser.to_h

    def to_h(x, t, cond):
        if isinstance(t, torch.Tensor):
            seen.append((t, x))
        return recipe(x, t, cond)

    denoiser.to_h = to_h
    try:
        learn_self_discovery(denoiser, PAIRS, pictures=8, picture_steps=1, epochs=60, batch=8)
    finally:
        del denoiser.to_h
    times = torch.cat([t for t, _ in seen[1:]]).double()  # the first is for the calibration
    assert len(times) == 480
    assert 0 <= times.min() < 20 and 980 < times.max() <= 999
    assert abs(times.mean() - 499.5) < 4 * 1000 / (12 * 480) ** 0.5
    assert len({float(x[0, 0, 0, 0]) for _, x in seen}) == len(seen)


def test_the_pictures_are_those_of_the_positive_prompts_in_turn(denoiser, monkeypatch):
    from concept_steer.learn import self_discovery

    asked = []

    def spy(model, prompts, **options):
        asked.append((list(prompts), options["steps"], options["guidance"], options["negative"]))
        return sample(model, prompts, **options)

    monkeypatch.setattr(self_discovery, "sample", spy)
    learn_self_discovery(denoiser, PAIRS, **SMALL, guidance=3.0, negative="a hat")
    assert [prompt for prompts, *_ in asked for prompt in prompts] == ["a woman pilot", "a woman cook"] * 3
    assert {tuple(rest) for _, *rest in asked} == {(2, 3.0, "a hat")}


def test_the_cost_of_pictures_and_training_is_counted(denoiser):
    cached, steps = [], []
    result = learn_self_discovery(
        denoiser, PAIRS, **SMALL, caching=lambda *a: cached.append(a), progress=lambda *a: steps.append(a[:2])
    )
    drawing, training, calibration = 6 * 2 * 2, 6 * 3, 4 / 2
    assert result.unet_rows == drawing + training + calibration
    assert result.backward_rows == training
    assert cached[-1] == (4, 4) and [done for done, _ in cached] == [1, 2, 3, 4]
    assert steps == [(i, 6) for i in range(1, 7)]
    assert (result.separation, result.explained, result.held_out) == (None, None, [])
    assert "learned by self_discovery, finished after 6 steps" in result.summary()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [False, True])
def test_every_layout_gives_a_map_or_a_channel_vector(layout, spatial):
    encode = bag_of_words if layout != "sdxl" else with_pooled
    model = DiffusersDenoiser(Components(tiny_unet(layout), schedule(), encode))
    result = learn_self_discovery(model, PAIRS, **SMALL, spatial=spatial)
    assert result.vector.tensor.shape == ((32, 2, 2) if spatial else (32,))
    info = result.vector.info
    assert [info[key] for key in ("method", "pictures", "steps")] == ["self_discovery", "6", "6"]


def with_pooled(prompts) -> Conditioning:
    cond = bag_of_words(prompts)
    return Conditioning(cond.embeds, cond.embeds[:, 0, :12])


def test_a_v_prediction_model_is_asked_for_v():
    model = DiffusersDenoiser(Components(tiny_unet("mid only"), schedule("v_prediction"), bag_of_words))
    recipe = _Recipe(model, latents(2, torch.ones(4)), torch.zeros(2, dtype=torch.long), model.encode_text(["a"]))
    _, target = recipe.noised(torch.tensor([0, 1]), seed=3)
    generator = torch.Generator().manual_seed(3)
    t, noise = torch.randint(1000, (2,), generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    x = model.schedule.add_noise(recipe.x0, noise, t)
    torch.testing.assert_close(model.schedule.to_epsilon(x, target, t), noise, rtol=1e-3, atol=1e-4)
    assert learn_self_discovery(model, PAIRS, **SMALL).losses


def test_the_same_seed_gives_the_same_vector_and_neighbouring_seeds_share_no_noise(denoiser):
    a, b, other = (learn_self_discovery(denoiser, PAIRS, **SMALL, seed=seed).vector for seed in (3, 3, 4))
    assert torch.equal(a.tensor, b.tensor) and a != other
    one, two = (
        set(torch.randint(2**48, (1000,), generator=torch.Generator().manual_seed(seed)).tolist()) for seed in (3, 4)
    )
    assert not one & two


def test_stopping_keeps_what_was_learned_and_before_the_first_step_is_an_error(denoiser):
    steps = []
    result = learn_self_discovery(
        denoiser, PAIRS, **SMALL, progress=lambda *a: steps.append(a), stop=lambda: len(steps) == 3
    )
    assert result.stopped == "stopped by request after 3 of 6 steps, what was learned so far kept"
    assert len(result.losses) == 3 and bool(result.vector.tensor.any())
    with pytest.raises(LearnError, match="before its first step"):
        learn_self_discovery(denoiser, PAIRS, **SMALL, stop=lambda: True)


def test_nan_stops_learning_with_the_last_good_vector():
    model = tiny_denoiser("mid only")
    seen = []

    def spoil(step, total, loss, vector):
        seen.append(vector)
        if step == 4:
            model.unet.conv_out.register_forward_hook(lambda m, a, out: out * float("nan"))

    result = learn_self_discovery(model, PAIRS, **SMALL, progress=spoil)
    assert result.stopped == "stopped at step 5 of 6 because of NaN, last good vector kept"
    assert result.vector == seen[-1] and len(result.losses) == 4
    with pytest.raises(LearnError, match="not finite"):
        learn_self_discovery(model, PAIRS, **SMALL)
    with pytest.raises(LearnError, match="before anything was learned"):
        learn_self_discovery(model, PAIRS, latents=latents(2, torch.zeros(4)))


def test_a_negative_prompt_alone_may_make_the_difference(denoiser):
    same = [("a pilot", "a pilot")]
    assert learn_self_discovery(denoiser, same, **SMALL, negative="blood").vector.info["negative"] == "blood"
    with pytest.raises(LearnError, match="Both prompts of a pair"):
        learn_self_discovery(denoiser, same, **SMALL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "start at 1"),
        ({"rate": 0.0}, "rate above 0"),
        ({"negative": "blood", "guidance": 1}, "at guidance 1 it changes nothing"),
        ({"negative": "blood", "latents": torch.zeros(2, 4, 8, 8)}, "not drawn"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "expected scaled latents"),
        ({"latents": torch.zeros(0, 4, 8, 8)}, "at least one"),
        ({"latents": torch.full((2, 4, 8, 8), float("nan"))}, "not finite"),
    ],
)
def test_settings_out_of_range_are_refused(denoiser, options, said):
    with pytest.raises(LearnError, match=said):
        learn_self_discovery(denoiser, PAIRS, **options)
