"""Noise optimisation (ReNO): what its gradient, its bookkeeping and its refusals promise, on a tiny real UNet."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusers import text, tiny_unet

from concept_steer.denoiser import NoiseSchedule
from concept_steer.errors import ConceptSteerError, SettingError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.latent_clip import Descent, Reward, gaussian, optimise_noise
from concept_steer.sampling import noise, sample

ALPHAS = torch.linspace(0.9999, 0.9, 1000).cumprod(0).clamp_min(0.005)
PROMPTS, SEEDS = ["one", "two", "three"], [1, 2, 3]
QUICK = Descent(iterations=6, rate=1.0)


def make(unet=None) -> DiffusersDenoiser:
    def encode(prompts):
        rows = [text(1, seed=len(prompt)).embeds for prompt in prompts]
        return type(text(1))(torch.cat(rows))

    widen = torch.nn.Upsample(scale_factor=8)
    parts = Components(
        unet or tiny_unet("mid only"), NoiseSchedule(ALPHAS), encode, decode=lambda x: widen(x[:, :3]).tanh()
    )
    return DiffusersDenoiser(parts)


@pytest.fixture(scope="module")
def denoiser():
    return make()


def bright(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, 0].mean((1, 2))


BRIGHT = Reward("bright", bright)


def run(denoiser, rewards=(BRIGHT,), **changes):
    given = {"seeds": SEEDS, "settings": QUICK, **changes}
    return optimise_noise(denoiser, PROMPTS, list(rewards), **given)


# --- what it does


def test_the_best_picture_of_each_is_better_than_its_start_and_is_what_its_noise_gives(denoiser):
    found = run(denoiser, batch=2)
    assert (found.values > found.before).all() and (found.at > 0).all()
    again = sample(denoiser, PROMPTS, seeds=SEEDS, steps=1, guidance=1, start_latents=found.noise)
    torch.testing.assert_close(found.latents, again, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.values, bright(again), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.values, found.history.max(0).values)


def test_one_iteration_gives_the_very_pictures_of_sampling(denoiser):
    for steps, guidance in ((1, 1.0), (3, 2.5)):
        found = run(denoiser, settings=Descent(iterations=1), steps=steps, guidance=guidance, batch=3)
        plain = sample(denoiser, PROMPTS, seeds=SEEDS, steps=steps, guidance=guidance, batch=3)
        assert torch.equal(found.latents, plain)
        assert torch.equal(found.noise, torch.stack([noise(seed, denoiser.latent_shape) for seed in SEEDS]))


def test_the_same_call_gives_the_same_bits(denoiser):
    one, other = run(denoiser, steps=2), run(denoiser, steps=2)
    assert torch.equal(one.noise, other.noise) and torch.equal(one.latents, other.latents)


def test_each_picture_has_its_own_optimum_whatever_shares_its_batch(denoiser):
    together, alone = run(denoiser, batch=3), run(denoiser, batch=1)
    torch.testing.assert_close(together.noise, alone.noise, rtol=1e-3, atol=1e-3)
    steep = [Reward("bright", bright), Reward("one only", lambda x: x[:, 1].mean((1, 2)) * torch.tensor([50.0, 0, 0]))]
    tilted = run(denoiser, steep, batch=3)
    torch.testing.assert_close(tilted.noise[1:], together.noise[1:], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(tilted.noise[0], together.noise[0], atol=1e-2)


def test_a_step_is_torchs_nesterov_on_the_clipped_gradient_of_reward_and_length():
    settings, shape = Descent(), (2, 4, 8, 8)
    start = torch.stack([noise(seed, shape[1:]) for seed in (5, 6)]) * 1.2
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * torch.tensor([1e-3, 1.0]).view(2, 1, 1, 1)
    rows = [start[i : i + 1].clone().requires_grad_(True) for i in range(2)]
    mine, velocity = start.clone(), torch.zeros(shape)
    for i, row in enumerate(rows):
        torch_sgd = torch.optim.SGD([row], lr=5.0, momentum=0.9, nesterov=True)
        for _ in range(3):
            torch_sgd.zero_grad()
            size, length = row.numel(), row.norm()
            loss = -(wanted[i] * row).sum() + 0.01 * (length.square() / 2 - (size - 1) * length.log())
            loss.backward()
            torch.nn.utils.clip_grad_norm_([row], 0.1)
            torch_sgd.step()
    for _ in range(3):
        mine, velocity = settings.step(mine, velocity, wanted)
    torch.testing.assert_close(mine, torch.cat(rows).detach(), rtol=1e-4, atol=1e-4)


def test_the_regulariser_brings_noise_back_to_a_gaussians_length(denoiser):
    far = 1.5 * torch.stack([noise(seed, denoiser.latent_shape) for seed in SEEDS])
    flat = Reward("flat", lambda x: 0 * x.sum((1, 2, 3)))
    z, velocity = far.clone(), torch.zeros_like(far)
    for _ in range(60):
        z, velocity = Descent(rate=1.0, regularisation=0.1).step(z, velocity, torch.zeros_like(far))
    assert (gaussian(z)["length"] - 1).abs().max() < 0.1 < (gaussian(far)["length"] - 1).abs().min()
    assert torch.isfinite(run(denoiser, [flat]).noise).all()


def test_rewards_add_up_with_their_weights_and_targets_go_to_their_pictures(denoiser):
    targets = torch.tensor([1.0, 2.0, 3.0])
    near = Reward("near", lambda x, wanted: wanted - x.mean((1, 2, 3)) * 0, weight=2.0, targets=targets)
    found = run(denoiser, [BRIGHT, near], batch=2)
    assert found.terms["near"].tolist() == [2.0, 4.0, 6.0]
    torch.testing.assert_close(found.values, found.terms["bright"] + found.terms["near"])
    torch.testing.assert_close(found.before, found.terms_before["bright"] + found.terms_before["near"])


def test_a_reward_on_pixels_sees_decoded_pictures_with_their_gradient(denoiser):
    seen = []

    def red(pixels):
        seen.append((tuple(pixels.shape), float(pixels.detach().abs().max())))
        return pixels[:, 0].mean((1, 2))

    found = run(denoiser, [Reward("red", red, pixels=True)])
    assert (found.values > found.before).all()
    assert all(shape == (3, 3, 64, 64) and peak <= 1 for shape, peak in seen)


# --- gradients through several steps


def gradient(denoiser, **changes) -> torch.Tensor:
    """Where one step leads, from which the gradient can be told."""
    settings = Descent(iterations=2, rate=1.0, momentum=0.0, clip=1e9, regularisation=0.0)
    after: list[torch.Tensor] = []
    watched = Reward("bright", lambda x: after.append(x.detach()) or bright(x))
    run(denoiser, [watched], settings=settings, batch=3, **changes)
    return after[-1]


def test_checkpointing_changes_memory_but_not_the_gradient(denoiser):
    torch.testing.assert_close(
        gradient(denoiser, steps=3, checkpointing=True), gradient(denoiser, steps=3, checkpointing=False)
    )


def test_truncated_gradients_pass_through_the_last_steps_only_and_still_improve(denoiser):
    calls: list[bool] = []
    whole = denoiser.predict

    class Counting:
        def __getattr__(self, name):
            return getattr(denoiser, name)

        def predict(self, x, *args):
            calls.append(torch.is_grad_enabled())
            return whole(x, *args)

    found = run(Counting(), settings=Descent(iterations=4, rate=1.0), steps=4, through=1, checkpointing=False)
    assert calls[:4] == [False, False, False, True]
    assert (found.values > found.before).all()


def test_the_gradient_through_all_steps_is_that_of_finite_differences(denoiser):
    from concept_steer.latent_clip.noise_drawing import Sampler
    from concept_steer.sampling import encode_rows, timesteps

    sampler = Sampler(
        denoiser, encode_rows(denoiser, ["one"]), None, 1.0, timesteps(denoiser.schedule, 2), [()], 2, True
    )
    row, z = torch.tensor([0]), noise(4, denoiser.latent_shape)[None]
    leaf = z.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(bright(sampler(leaf, row)).sum(), leaf)
    way = slope / slope.norm()
    with torch.no_grad():
        up, down = (bright(sampler(z + sign * 0.05 * way, row)) for sign in (1, -1))
    assert float((up - down) / 0.1) == pytest.approx(float(slope.norm()), rel=0.05)


# --- progress, stop and trouble


def test_progress_sees_every_iteration_and_latents_that_never_get_worse(denoiser):
    seen = []
    run(denoiser, batch=2, progress=lambda at: seen.append((at.done, at.total, at.pictures, at.best["value"].clone())))
    assert [done for done, *_ in seen] == [2 * (i + 1) for i in range(6)] + [12 + i + 1 for i in range(6)]
    assert {total for _, total, *_ in seen} == {18}
    assert {pictures for *_, pictures, _ in seen} == {range(0, 2), range(2, 3)}
    for (*_, one, before), (*_, other, after) in pairwise(seen):
        assert one != other or (after >= before).all()


def test_a_stop_keeps_the_best_of_the_pictures_that_were_reached(denoiser):
    left = iter([False] * 2 + [True])
    found = run(denoiser, batch=2, stop=lambda: next(left))
    assert len(found) == 2 and len(found.history) == 3
    assert "after 3 of 6" in found.stopped and "best so far" in found.summary()
    torch.testing.assert_close(found.values, found.history.max(0).values)


def test_a_picture_that_becomes_nan_keeps_its_last_good_noise_and_the_others_go_on(denoiser):
    calls = []

    def spoiled(latents, wanted):
        calls.append(len(latents))
        bad = torch.where((wanted == 1) & (len(calls) > 3), math.nan, 0.0)
        return bright(latents) + bad

    found = run(denoiser, [Reward("spoiled", spoiled, targets=torch.tensor([0.0, 1.0, 0.0]))], batch=3)
    assert calls == [3, 3, 3, 3, 2, 2] and found.spoiled == {1: 3}
    assert torch.isfinite(found.noise).all() and torch.isfinite(found.values).all()
    assert int(found.at[1]) <= 2 < int(found.at[0]) and found.values[1] > found.before[1]
    assert "NaN" in found.summary()


def test_a_model_that_draws_nan_from_the_start_is_an_error():
    unet = tiny_unet("mid only")
    with torch.no_grad():
        unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(ConceptSteerError, match="not finite"):
        run(make(unet))


def test_it_works_when_called_inside_inference_mode(denoiser):
    outside = run(denoiser)
    with torch.inference_mode():
        start = torch.stack([noise(seed, denoiser.latent_shape) for seed in SEEDS])
        reward = Reward("bright", lambda x, weight: bright(x) * weight, targets=torch.ones(3))
        inside = run(denoiser, [reward], start_noise=start)
    assert torch.equal(inside.noise, outside.noise)


def test_the_model_is_left_as_it_was(denoiser):
    before = {name: (p.requires_grad, p.detach().clone(), p.grad) for name, p in denoiser.unet.named_parameters()}
    run(denoiser)
    for name, parameter in denoiser.unet.named_parameters():
        wanted, value, grad = before[name]
        assert parameter.requires_grad == wanted and torch.equal(parameter, value) and parameter.grad is grad is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1]}, "one seed per picture"),
        ({"batch": 0}, "at least one picture"),
        ({"through": 2}, "through 1 to 1"),
        ({"rewards": []}, "no reward"),
        ({"rewards": [BRIGHT, BRIGHT]}, "same name"),
        ({"rewards": [Reward("sum", lambda x: x.sum())]}, "one number per picture"),
        ({"rewards": [Reward("hidden", lambda x: bright(x).detach())]}, "no_grad"),
        ({"rewards": [Reward("odd", bright, weight=math.nan)]}, "weight"),
        ({"rewards": [Reward("few", bright, targets=torch.ones(2))]}, "2 targets for 3"),
        ({"start_noise": torch.zeros(2, 4, 8, 8)}, "shape"),
    ],
)
def test_what_does_not_fit_is_an_error_in_words(denoiser, changes, words):
    with pytest.raises(SettingError, match=words):
        run(denoiser, **changes)


@pytest.mark.parametrize("changes", [{"iterations": 0}, {"rate": 0}, {"momentum": 1}, {"clip": 0}, {"rate": math.inf}])
def test_settings_out_of_their_range_are_errors_that_name_them(changes):
    with pytest.raises(SettingError, match=next(iter(changes))):
        Descent(**changes)


def test_pixels_need_a_decoder_that_passes_gradients(denoiser):
    class Bare:
        def __init__(self):
            self.cost, self.latent_shape = denoiser.cost, denoiser.latent_shape

    with pytest.raises(SettingError, match="decoder of Bare"):
        run(Bare(), [Reward("red", bright, pixels=True)])
