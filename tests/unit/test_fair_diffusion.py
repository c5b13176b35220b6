from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_diffusers import bag_of_words, schedule, tiny_denoiser, tiny_sd

from concept_steer.denoiser import Cost
from concept_steer.errors import ConceptSteerError, SettingError
from concept_steer.guidance.fair_diffusion import Edit, SemanticGuidance, fair_diffusion
from concept_steer.hosts.diffusers import DiffusersDenoiser
from concept_steer.sampling import ddim_step, noise, sample, timesteps
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")

PROMPTS, SEEDS = ["a cat", "a dog", "a pilot"], [1, 2, 3]
CONCEPTS = {"gender": {"woman": "a woman", "man": "a man"}}


def edits(scale: float = 5.0, count: int = 3) -> list[list[Edit]]:
    return [[Edit("a woman", scale=scale), Edit("a man", away=True, scale=scale)]] * count


def drawn(guide=None, steps: int = 5, **kw):
    return sample(tiny_denoiser("sd"), PROMPTS, seeds=SEEDS, steps=steps, guide=guide, **kw)


def test_edits_of_scale_zero_are_plain_guidance_bit_for_bit_and_cost_nothing():
    denoiser = tiny_denoiser("sd")
    guided = sample(denoiser, PROMPTS, seeds=SEEDS, steps=3, guide=SemanticGuidance(edits(0.0)))
    assert torch.equal(guided, drawn(steps=3))
    assert denoiser.cost == Cost(18, 18, 0)


def test_a_warmup_that_never_ends_is_plain_guidance():
    plain = drawn()
    assert torch.equal(drawn(SemanticGuidance(edits(), warmup=50, momentum=0.0)), plain)
    torch.testing.assert_close(drawn(SemanticGuidance(edits(), warmup=50)), plain, rtol=1e-4, atol=1e-4)


def test_steps_of_the_warmup_are_plain_and_later_ones_are_not():
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "guided": []}
    drawn(keep=lambda step, t, x: seen["plain"].append(x))
    drawn(SemanticGuidance(edits(), warmup=20), keep=lambda step, t, x: seen["guided"].append(x))  # 2 of 5 steps
    for step in range(3):
        torch.testing.assert_close(seen["guided"][step], seen["plain"][step], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen["guided"][3], seen["plain"][3], atol=1e-3)


def test_the_split_into_batches_does_not_change_a_picture():
    mixed = [[Edit("a woman")], [Edit("a man", away=True)], [Edit("a woman", scale=2.0, threshold=0.5)]]
    whole = drawn(SemanticGuidance(mixed))
    torch.testing.assert_close(drawn(SemanticGuidance(mixed), batch=2), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn(SemanticGuidance(mixed), batch=1), whole, rtol=1e-3, atol=1e-3)


def test_each_edit_costs_one_more_row_a_step():
    denoiser = tiny_denoiser("sd")
    sample(denoiser, PROMPTS, seeds=SEEDS, steps=4, guide=SemanticGuidance(edits()))
    assert denoiser.cost.encoder_rows == denoiser.cost.decoder_rows == 4 * 3 * (2 + 2)
    denoiser = tiny_denoiser("sd")
    sample(denoiser, PROMPTS, seeds=SEEDS, steps=4, guide=SemanticGuidance(edits(), warmup=25, momentum=0.0))
    assert denoiser.cost.encoder_rows == 3 * (2 * 2 + 2 * 4)  # nothing to carry along: no further rows in warm-up


def test_the_same_as_the_pipeline_of_diffusers(tmp_path):
    """Their SEGA with our sampler's timesteps and steps: only the guidance is compared."""
    from diffusers import DDIMScheduler
    from diffusers.pipelines.deprecated.semantic_stable_diffusion.pipeline_semantic_stable_diffusion import (
        SemanticStableDiffusionPipeline,
    )

    pipe = tiny_sd(tmp_path)
    denoiser = DiffusersDenoiser(pipe)

    class OurSteps(DDIMScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.timesteps = torch.tensor(timesteps(denoiser.schedule, num_inference_steps))

        def step(self, output, t, sample, **kwargs):
            later = [float(v) for v in self.timesteps if v < t]
            moved = ddim_step(denoiser.schedule, sample, output, float(t), later[0] if later else None)
            return SimpleNamespace(prev_sample=moved)

    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    theirs = SemanticStableDiffusionPipeline(
        **parts, scheduler=OurSteps.from_config(pipe.scheduler.config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    x = noise(4, (4, 8, 8))[None]
    their_latents = theirs(
        "a cat",
        latents=x.clone(),
        num_inference_steps=6,
        guidance_scale=4.0,
        editing_prompt=["a woman", "a man"],
        reverse_editing_direction=[False, True],
        edit_guidance_scale=[6.0, 6.0],
        edit_warmup_steps=[2, 2],
        edit_threshold=[0.8, 0.8],
        edit_momentum_scale=0.3,
        edit_mom_beta=0.6,
        output_type="latent",
    ).images
    pair = [Edit("a woman", scale=6.0, threshold=0.8), Edit("a man", True, 6.0, 0.8)]
    guide = SemanticGuidance([pair], warmup=2 * 50 / 6, momentum=0.3, beta=0.6)
    ours = sample(denoiser, ["a cat"], seeds=[0], steps=6, guidance=4.0, start_latents=x, guide=guide)
    torch.testing.assert_close(ours, their_latents, rtol=1e-3, atol=1e-4)
    plain = sample(denoiser, ["a cat"], seeds=[0], steps=6, guidance=4.0, start_latents=x)
    assert (ours - plain).abs().max() > 100 * (ours - their_latents).abs().max()


def test_only_the_strongest_tenth_of_each_channel_is_edited():
    run = SemanticGuidance([[Edit("a woman", scale=1.0)]], momentum=0.0, warmup=0).begin(range(1), 10, 1.0)
    uncond, extra = torch.zeros(1, 4, 10, 10), torch.randn(1, 1, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    changed = run.combine(0, 999.0, uncond, uncond, extra)
    assert (changed != 0).sum(dim=(0, 2, 3)).tolist() == [10] * 4
    assert changed[changed != 0].abs().min() > 0
    assert torch.equal(changed[changed != 0], extra[0][changed != 0])


def test_steers_act_on_the_prompts_rows_and_not_on_the_edits():
    vector = ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), "custom:24x32")
    steer = Steer(vector, 5.0)
    seen = []

    class Watching:
        prompts = (["a woman"] * 3,)

        def begin(self, pictures, steps, guidance):
            return self

        def needs(self, step):
            return True

        def combine(self, step, t, uncond, cond, extra):
            seen.append((uncond, cond, extra))
            return cond

    drawn(Watching(), steps=1)
    drawn(Watching(), steps=1, steers=[steer])
    (uncond, cond, extra), (same_uncond, other_cond, same_extra) = seen
    torch.testing.assert_close(same_uncond, uncond, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_extra, extra, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other_cond, cond, atol=1e-3)
    assert extra.shape == (1, 3, 4, 8, 8)


def test_guidance_one_still_gives_a_guide_the_unconditional_prediction():
    denoiser = tiny_denoiser("sd")
    sample(denoiser, ["a cat"], seeds=[1], steps=2, guidance=1.0, guide=SemanticGuidance([[Edit("a woman")]]))
    assert denoiser.cost.encoder_rows == 2 * 3


def test_fair_diffusion_guides_each_picture_towards_its_own_value_and_away_from_the_others():
    guide = fair_diffusion([{"gender": "woman"}, {"gender": "man"}], CONCEPTS, scale=3.0)
    assert [(e.concept, e.away, e.scale) for e in guide.edits[0]] == [("a woman", False, 3.0), ("a man", True, 3.0)]
    assert [(e.concept, e.away) for e in guide.edits[1]] == [("a man", False), ("a woman", True)]
    with pytest.raises(SettingError, match="'child'"):
        fair_diffusion([{"gender": "child"}], CONCEPTS)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(SettingError, match="same number"):
        SemanticGuidance([[Edit("a")], [Edit("a"), Edit("b")]])
    with pytest.raises(SettingError, match="from 0 to 1"):
        Edit("a", threshold=1.0)
    with pytest.raises(SettingError, match="starts at 0"):
        Edit("a", scale=float("nan"))
    with pytest.raises(SettingError, match="warmup"):
        SemanticGuidance([[Edit("a")]], warmup=60)
    with pytest.raises(ConceptSteerError, match="there are 3"):
        drawn(SemanticGuidance(edits(count=2)))


def test_unet_predictions_are_what_the_guide_is_given():
    denoiser = tiny_denoiser("sd")
    x = torch.stack([noise(1, (4, 8, 8))])
    seen = {}

    class Watching:
        prompts = (["a woman"], ["a man"])

        def begin(self, pictures, steps, guidance):
            return self

        def needs(self, step):
            return True

        def combine(self, step, t, uncond, cond, extra):
            seen.update(uncond=uncond, cond=cond, extra=extra)
            return cond

    sample(denoiser, ["a cat"], seeds=[1], steps=1, guide=Watching())
    with torch.no_grad():
        alone = {text: denoiser.predict(x, 999.0, bag_of_words([text])) for text in ("", "a cat", "a woman", "a man")}
    torch.testing.assert_close(seen["uncond"], alone[""], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["cond"], alone["a cat"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["extra"][0], alone["a woman"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["extra"][1], alone["a man"], rtol=1e-4, atol=1e-5)
    assert schedule().prediction_type == "epsilon"
