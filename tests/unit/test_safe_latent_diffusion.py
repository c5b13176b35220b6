from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tiny_diffusers import bag_of_words, schedule, tiny_denoiser, tiny_unet

from concept_steer.denoiser import Cost
from concept_steer.errors import ConceptSteerError, SettingError
from concept_steer.guidance.safe_latent_diffusion import (
    PRESETS,
    SafeLatentDiffusion,
    SafetyState,
    guided,
    next_momentum,
    safety_scale,
    step_of,
)
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.sampling import ddim_step, encode_rows, noise, sample, timesteps
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")

PROMPTS, SEEDS = ["a fight", "a party", "a doctor"], [1, 2, 3]
TEXT = "weapons, blood, alcohol"
TOLERANCE = 1e-4  # of latents up to 4, between this and the published pipeline


def settings(**changes) -> SafeLatentDiffusion:
    return SafeLatentDiffusion.preset("medium", text=TEXT, **changes)


def drawn(guide=None, steps: int = 6, denoiser=None, **kw):
    return sample(denoiser or tiny_denoiser("sd"), PROMPTS, seeds=SEEDS, steps=steps, guide=guide, **kw)


def predictions(seed: int = 0, rows: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 5, 3, generator=generator) for _ in range(3)]


# --- the published algorithm


@cache
def pipeline():
    from concept_steer.demo import model

    return model.pipeline()


@cache
def demo() -> DiffusersDenoiser:
    return DiffusersDenoiser(pipeline())


def published(prompts, x, guide: SafeLatentDiffusion, steps: int, guidance: float, first: int = 0):
    """The latents of diffusers' own pipeline on the same weights and the same sampler, from step `first` on."""
    safe = pytest.importorskip(
        "diffusers.pipelines.deprecated.stable_diffusion_safe.pipeline_stable_diffusion_safe",
        reason="this diffusers has no StableDiffusionPipelineSafe to compare with",
    )
    from diffusers import DDIMScheduler

    pipe, denoiser = pipeline(), demo()

    class OurSteps(DDIMScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.timesteps = torch.tensor(timesteps(denoiser.schedule, steps)[first:])

        def step(self, output, t, sample, **kwargs):
            later = [float(v) for v in self.timesteps if v < t]
            moved = ddim_step(denoiser.schedule, sample, output, float(t), later[0] if later else None)
            return SimpleNamespace(prev_sample=moved)

    class Latents(safe.StableDiffusionPipelineSafe):
        """Their loop, up to where it would draw."""

        def decode_latents(self, latents):
            self.found = latents
            return super().decode_latents(latents)

    theirs = Latents(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=pipe.unet,
        scheduler=OurSteps.from_config(pipe.scheduler.config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    theirs._safety_text_concept = guide.text
    theirs.set_progress_bar_config(disable=True)
    theirs(
        list(prompts),
        latents=x.clone(),
        num_inference_steps=steps - first,
        guidance_scale=guidance,
        output_type="np",
        sld_warmup_steps=max(0, round(guide.warmup * steps / 50) - first),
        sld_guidance_scale=guide.scale,
        sld_threshold=guide.threshold,
        sld_momentum_scale=guide.momentum,
        sld_mom_beta=guide.beta,
    )
    return theirs.found


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_latents_as_the_published_pipeline(name, record_property):
    """On the embedded model. The warm-up of both is the same whole step of 12."""
    steps, prompts = 12, ["a fight", "a party"]
    whole = round(PRESETS[name].warmup * steps / 50)
    guide = SafeLatentDiffusion.preset(name, text=TEXT, warmup=whole * 50 / steps)
    x = torch.stack([noise(seed, demo().latent_shape) for seed in (1, 2)])
    theirs = published(prompts, x, guide, steps, 5.0)
    given = {"seeds": [0, 0], "steps": steps, "guidance": 5.0, "start_latents": x}
    ours = sample(demo(), prompts, guide=guide, **given)
    worst, effect = float((ours - theirs).abs().max()), float((ours - sample(demo(), prompts, **given)).abs().max())
    record_property("measured", f"{worst:.2g}")
    print(f"{name}: max difference {worst:.2g}; the method moves latents by up to {effect:.2g}")
    assert worst < TOLERANCE
    assert effect > 1000 * worst


def test_the_same_latents_from_a_later_step_on():
    """As image to image does; the warm-up is counted from the noise, so less of it is left."""
    steps, first, prompts = 10, 3, ["a fight"]
    guide = SafeLatentDiffusion.preset("strong", text=TEXT, warmup=25)  # 5 of 10 steps, 2 of the 7 that are left
    x = noise(5, demo().latent_shape)[None]
    theirs = published(prompts, x, guide, steps, 4.0, first)
    run, times = guide.begin(range(1), steps, 4.0), timesteps(demo().schedule, steps)
    ours = x
    for step in range(first, steps):
        prediction = _one(run, step, times[step], ours, prompts)
        ours = ddim_step(demo().schedule, ours, prediction, times[step], _next(times, step))
    assert (ours - theirs).abs().max() < TOLERANCE


@torch.no_grad()
def _one(run, step: int, t: float, x, prompts):
    cond = encode_rows(demo(), ["", *prompts, TEXT])
    uncond, text, safety = demo().predict(x.repeat(3, 1, 1, 1), t, cond).chunk(3)
    return run.combine(step, t, uncond, text, safety[None])


def _next(times, step: int):
    return times[step + 1] if step + 1 < len(times) else None


def test_the_presets_are_the_papers_and_at_50_steps_begin_at_its_steps():
    table = {name: (p.scale, p.threshold, p.momentum, p.beta) for name, p in PRESETS.items()}
    assert table == {
        "weak": (200, 0.0, 0.0, 0.0),
        "medium": (1000, 0.01, 0.3, 0.4),
        "strong": (2000, 0.025, 0.5, 0.7),
        "max": (5000, 1.0, 0.5, 0.7),
    }
    first = {name: [p.acts_at(step, 50) for step in range(50)].index(True) for name, p in PRESETS.items()}
    assert first == {"weak": 15, "medium": 10, "strong": 7, "max": 0}
    first = {name: [p.acts_at(step, 20) for step in range(20)].index(True) for name, p in PRESETS.items()}
    assert first == {"weak": 6, "medium": 4, "strong": 3, "max": 0}


def test_only_elements_that_lean_towards_the_text_are_scaled():
    prompt = torch.tensor([-1.0, -0.0005, 0.0, 0.0005, 1.0])
    found = safety_scale(prompt, torch.zeros(5), scale=1000.0, threshold=0.0004)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0]))
    assert safety_scale(prompt, torch.zeros(5), 1000.0, 2.0).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.5, 1.0])


def test_momentum_is_a_running_mean_of_gamma_and_starts_at_zero():
    state = SafetyState(settings(momentum=0.5, beta=0.75, every=1))
    nu = torch.zeros(2, 4, 5, 3)
    for step in range(6):
        uncond, prompt, safety = predictions(step)
        plain = SafetyState(settings(momentum=0.0)).gamma(step, uncond, prompt, safety)
        gamma = state.gamma(step, uncond, prompt, safety)
        torch.testing.assert_close(gamma, plain + 0.5 * nu)
        nu = next_momentum(nu, gamma, 0.75)
    assert nu.abs().max() > 0


# --- what it leaves alone, and what it costs


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"warmup": 50.0}])
def test_switched_off_it_is_plain_guidance_bit_for_bit_and_costs_nothing(change):
    denoiser = tiny_denoiser("sd")
    assert torch.equal(drawn(settings(**change), denoiser=denoiser), drawn())
    assert denoiser.cost == Cost(36, 36, 0)


def test_a_prompt_that_is_the_safety_text_itself_stays_as_it_is():
    """phi is 0 there: nothing is safer than what the prompt already avoids to differ from."""
    given = {"seeds": [1], "steps": 4}
    guided_latents = sample(tiny_denoiser("sd"), [TEXT], guide=settings(warmup=0), **given)
    torch.testing.assert_close(guided_latents, sample(tiny_denoiser("sd"), [TEXT], **given), rtol=1e-2, atol=1e-2)


def test_warmup_without_momentum_predicts_no_third_row():
    denoiser = tiny_denoiser("sd")
    drawn(SafeLatentDiffusion.preset("weak", text=TEXT), steps=10, denoiser=denoiser)
    assert denoiser.cost.encoder_rows == 3 * (3 * 2 + 7 * 3)
    denoiser = tiny_denoiser("sd")
    drawn(settings(), steps=10, denoiser=denoiser)
    assert denoiser.cost.encoder_rows == 3 * 10 * 3  # the momentum runs from the first step on
    denoiser = tiny_denoiser("sd")
    drawn(settings(beta=1.0), steps=10, denoiser=denoiser)
    assert denoiser.cost.encoder_rows == 3 * (2 * 2 + 8 * 3)  # a momentum that stays 0


@pytest.mark.parametrize(("every", "third"), [(2, 5), (3, 4), (4, 3), (20, 1)])
def test_a_held_direction_saves_rows(every, third):
    denoiser = tiny_denoiser("sd")
    held = drawn(settings(every=every), steps=10, denoiser=denoiser)
    assert denoiser.cost.encoder_rows == 3 * (2 * 10 + third)
    assert not torch.allclose(held, drawn(steps=10), atol=1e-3)


def test_a_held_direction_is_the_last_predicted_one():
    state = SafetyState(settings(momentum=0.0, every=2))
    uncond, prompt, safety = predictions()
    assert state.wants(0, True)
    first = state.gamma(0, uncond, prompt, safety)
    assert not state.wants(1, True)
    assert torch.equal(state.gamma(1, *predictions(1)[:2], None), first)
    assert state.wants(2, True)
    assert not torch.equal(state.gamma(2, *predictions(2)), first)


def test_the_warmup_is_plain_and_the_steps_after_it_are_not():
    seen: dict[str, list] = {"plain": [], "safe": []}
    drawn(keep=lambda step, t, x: seen["plain"].append(x))
    drawn(settings(warmup=25), keep=lambda step, t, x: seen["safe"].append(x))  # 3 of 6 steps
    for step in range(4):
        torch.testing.assert_close(seen["safe"][step], seen["plain"][step], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen["safe"][4], seen["plain"][4], atol=1e-3)


def test_batches_and_calls_share_no_momentum():
    whole = drawn(settings())
    guide = settings()
    torch.testing.assert_close(drawn(guide, batch=1), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn(guide, batch=2), whole, rtol=1e-3, atol=1e-3)


def test_guidance_one_takes_gamma_out_of_the_prompts_prediction():
    uncond, prompt, safety = predictions()
    run = settings(warmup=0).begin(range(2), 10, 1.0)
    found = run.combine(0, 999.0, uncond, prompt, safety[None])
    gamma = SafetyState(settings(warmup=0)).gamma(0, uncond, prompt, safety)
    torch.testing.assert_close(found, prompt - gamma)
    assert torch.equal(found, guided(uncond, prompt, gamma, 1.0))
    denoiser = tiny_denoiser("sd")
    safe = drawn(settings(), denoiser=denoiser, guidance=1.0)
    assert denoiser.cost.encoder_rows == 6 * 3 * 3
    assert not torch.allclose(safe, drawn(guidance=1.0), atol=1e-3)


def test_steers_act_on_the_prompt_and_not_on_the_safety_text():
    vector = ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), "custom:24x32")
    seen = []

    class Watching(SafeLatentDiffusion):
        def begin(self, pictures, steps, guidance):
            run = super().begin(pictures, steps, guidance)
            plain = run.combine

            def combine(step, t, uncond, cond, extra):
                seen.append((cond, extra))
                return plain(step, t, uncond, cond, extra)

            run.combine = combine
            return run

    guide = Watching(text=TEXT)
    drawn(guide, steps=1)
    drawn(guide, steps=1, steers=[Steer(vector, 5.0, rows="both")])
    (cond, extra), (other_cond, same_extra) = seen
    torch.testing.assert_close(same_extra, extra, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other_cond, cond, atol=1e-3)


def test_a_model_that_predicts_v_gives_the_same_pictures_as_one_that_predicts_noise():
    """The thresholds are made for noise, so predictions of v are brought there and back."""
    plain = tiny_denoiser("sd")

    class Velocity(DiffusersDenoiser):
        def predict(self, x, t, cond, steers=(), is_cond=None):
            epsilon = super().predict(x, t, cond, steers, is_cond).float()
            alpha, sigma = self.schedule.signal(t, epsilon)
            return (epsilon - sigma * x) / alpha

    velocity = Velocity(Components(tiny_unet("sd"), schedule("v_prediction"), bag_of_words))
    expected, found = drawn(settings(), denoiser=plain), drawn(settings(), denoiser=velocity)
    assert not torch.allclose(found, drawn(denoiser=velocity), atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


# --- samplers that call the model more than once a step


def test_an_evaluation_belongs_to_the_step_that_began_at_or_above_its_sigma():
    sigmas = [14.6, 10.0, 5.0, 1.0, 0.0]
    assert step_of(sigmas, 14.6) == (0, True)
    assert step_of(sigmas, 10.0 * (1 + 5e-5)) == (1, True)
    assert step_of(sigmas, 7.0) == (1, False)
    assert step_of(sigmas, 0.03) == (3, False)
    assert step_of(sigmas, 20.0) == (0, False)


def test_a_corrector_does_not_advance_the_momentum_twice():
    """Heun: step 0, a look at step 1, step 1 itself, a look at step 2, ...: the looks leave no trace."""
    heun, euler = SafetyState(settings()), SafetyState(settings())
    for step in range(6):
        if step:
            heun.gamma(step, *predictions(100 + step))  # the corrector of the step before
        assert torch.equal(heun.gamma(step, *predictions(step)), euler.gamma(step, *predictions(step)))


def test_a_midpoint_uses_its_steps_momentum_and_leaves_it():
    midpoints, euler = SafetyState(settings()), SafetyState(settings())
    for step in range(6):
        mine, theirs = (state.gamma(step, *predictions(step)) for state in (midpoints, euler))
        assert torch.equal(mine, theirs)
        assert torch.equal(midpoints.gamma(step, *predictions(step), keep=False), mine)


def test_a_look_two_steps_ahead_leaves_no_trace_either():
    ahead, euler = SafetyState(settings()), SafetyState(settings())
    for step in range(6):
        assert torch.equal(ahead.gamma(step, *predictions(step)), euler.gamma(step, *predictions(step)))
        for look in (step + 1, step + 2):
            ahead.gamma(look, *predictions(50 + look))


# --- what cannot be


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"warmup": 51}, {"warmup": -1}, {"scale": -1}, {"momentum": 1.0}, {"beta": 1.5}):
        with pytest.raises(SettingError, match="found"):
            settings(**wrong)
    with pytest.raises(SettingError, match="finite"):
        settings(scale=float("nan"))
    with pytest.raises(SettingError, match="whole number"):
        settings(every=0)
    with pytest.raises(SettingError, match="empty"):
        SafeLatentDiffusion(text=" ")
    with pytest.raises(SettingError, match="weak, medium, strong, max"):
        SafeLatentDiffusion.preset("gentle")


def test_a_batch_that_changes_within_a_run_is_refused():
    state = SafetyState(settings())
    state.gamma(0, *predictions(rows=2))
    with pytest.raises(ConceptSteerError, match="one batch and one run"):
        state.gamma(1, *predictions(rows=3))
    with pytest.raises(ConceptSteerError, match="no direction"):
        SafetyState(settings()).gamma(0, *predictions()[:2], None)
