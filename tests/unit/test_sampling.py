from __future__ import annotations

import pytest
import torch
from tiny_diffusers import bag_of_words, schedule, tiny_denoiser, tiny_unet

from concept_steer.denoiser import Cost
from concept_steer.errors import ConceptSteerError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.sampling import ddim_step, noise, sample, timesteps
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")


def steer(seed=0, strength=5.0, **kw) -> Steer:
    return Steer(
        ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(seed)), "custom:24x32"), strength, **kw
    )


def test_noise_depends_on_the_seed_alone():
    assert torch.equal(noise(3, (4, 8, 8)), noise(3, (4, 8, 8)))
    assert not torch.equal(noise(3, (4, 8, 8)), noise(4, (4, 8, 8)))
    state = torch.random.get_rng_state()
    noise(5, (4, 8, 8))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_timesteps_start_at_pure_noise_and_leave_zero_out():
    assert timesteps(schedule(), 4) == [999, 749, 500, 250]
    assert timesteps(schedule(), 1) == [999]
    with pytest.raises(ValueError, match="at least one"):
        timesteps(schedule(), 0)


def test_a_step_to_the_end_is_the_clean_estimate():
    x, eps = noise(0, (1, 4, 8, 8)), noise(1, (1, 4, 8, 8))
    noises = schedule()
    torch.testing.assert_close(ddim_step(noises, x, eps, 500, None), noises.to_x0(x, eps, 500))


def test_sampling_is_ddim_with_guidance_as_in_diffusers():
    from diffusers import DDIMScheduler

    denoiser = tiny_denoiser("sd")
    reference = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    reference.set_timesteps(4)
    times = timesteps(denoiser.schedule, 4)
    x = noise(7, (1, 4, 8, 8))
    free, cond = bag_of_words([""]).embeds, bag_of_words(["a cat"]).embeds
    with torch.no_grad():
        for i, t in enumerate(times):
            eps = denoiser.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([free, cond])).sample
            eps = eps[:1] + 3.0 * (eps[1:] - eps[:1])
            a = reference.alphas_cumprod[int(t)]
            b = reference.alphas_cumprod[int(times[i + 1])] if i < 3 else torch.tensor(1.0)
            x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    ours = sample(denoiser, ["a cat"], seeds=[7], steps=4, guidance=3.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_split_into_batches_does_not_change_a_picture():
    denoiser = tiny_denoiser("sd")
    prompts, seeds = ["a cat", "a dog", "a pilot", "a cat", "a dog"], [1, 2, 3, 4, 1]
    started: dict[int, list[torch.Tensor]] = {}
    results = {}
    for batch in (1, 2, 5):
        keep = started.setdefault(batch, [])
        results[batch] = sample(
            denoiser,
            prompts,
            seeds=seeds,
            steps=3,
            batch=batch,
            keep=lambda s, t, x, k=keep: k.append(x) if s == 0 else None,
        )
    assert torch.equal(torch.cat(started[1]), torch.cat(started[5]))
    assert torch.equal(torch.cat(started[2]), torch.cat(started[5]))
    torch.testing.assert_close(results[1], results[5], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[2], results[5], rtol=1e-3, atol=1e-3)


def test_each_picture_may_have_its_own_vectors_in_one_batch():
    denoiser = tiny_denoiser("sd")
    a, b = steer(1), steer(2)
    prompts, seeds = ["a cat"] * 4, [1, 1, 1, 1]
    mixed = sample(denoiser, prompts, seeds=seeds, steps=3, steers=[[a], [], [b], [a, b]])
    for i, steers in enumerate(([a], [], [b], [a, b])):
        alone = sample(denoiser, prompts, seeds=seeds, steps=3, steers=steers)
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)


def test_strength_zero_gives_the_same_picture_bit_for_bit():
    denoiser = tiny_denoiser("sd")
    plain = sample(denoiser, ["a cat", "a dog"], seeds=[1, 2], steps=3)
    assert torch.equal(sample(denoiser, ["a cat", "a dog"], seeds=[1, 2], steps=3, steers=[steer(strength=0.0)]), plain)
    assert torch.equal(sample(denoiser, ["a cat", "a dog"], seeds=[1, 2], steps=3, steers=[[], []]), plain)


def test_uncond_rows_are_steered_only_when_asked():
    denoiser = tiny_denoiser("sd")
    kinds = {
        rows: sample(denoiser, ["a cat"], seeds=[1], steps=2, steers=[steer(rows=rows)])
        for rows in ("cond", "uncond", "both")
    }
    assert not torch.allclose(kinds["cond"], kinds["uncond"], atol=1e-3)
    assert not torch.allclose(kinds["cond"], kinds["both"], atol=1e-3)


def test_guidance_one_costs_half_and_is_the_plain_prediction():
    denoiser = tiny_denoiser("sd")
    sample(denoiser, ["a cat"] * 3, seeds=[1, 2, 3], steps=2, guidance=1.0)
    assert denoiser.cost == Cost(6, 6, 0)
    sample(denoiser, ["a cat"] * 3, seeds=[1, 2, 3], steps=2, guidance=2.0)
    assert denoiser.cost == Cost(18, 18, 0)


def test_progress_counts_every_step_and_start_latents_set_the_size():
    denoiser = tiny_denoiser("sd")
    seen = []
    start = torch.stack([noise(1, (4, 12, 10)), noise(2, (4, 12, 10)), noise(3, (4, 12, 10))])
    out = sample(
        denoiser,
        ["a"] * 3,
        seeds=[0] * 3,
        steps=2,
        batch=2,
        start_latents=start,
        progress=lambda i, n: seen.append((i, n)),
    )
    assert out.shape == (3, 4, 12, 10)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_numbers_that_do_not_fit_are_refused():
    denoiser = tiny_denoiser("sd")
    with pytest.raises(ConceptSteerError, match="2 prompts but 1 seeds"):
        sample(denoiser, ["a", "b"], seeds=[1])
    with pytest.raises(ConceptSteerError, match="2 prompts but 1 starting"):
        sample(denoiser, ["a", "b"], seeds=[1, 2], start_latents=torch.zeros(1, 4, 8, 8))
    assert sample(denoiser, [], seeds=[]).shape == (0, 4, 8, 8)


def test_v_prediction_models_sample_too():
    denoiser = DiffusersDenoiser(Components(tiny_unet("sd"), schedule("v_prediction"), bag_of_words))
    assert torch.isfinite(sample(denoiser, ["a cat"], seeds=[1], steps=3)).all()
