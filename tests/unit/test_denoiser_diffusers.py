from __future__ import annotations

import json

import pytest
import torch
from tiny_diffusers import LAYOUTS, bag_of_words, schedule, text, tiny_denoiser, tiny_sd, tiny_sdxl, tiny_unet

from concept_steer.denoiser import Conditioning, Cost, HState, NoiseSchedule, frozen, steer_rows, times_of_rows
from concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser, load_denoiser
from concept_steer.schedule import Schedule
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
FAMILY = "custom:24x32"


def vector(seed=0, shape=(32,), scale=1.0) -> ConceptVector:
    return ConceptVector(scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), FAMILY)


def latents(rows, height=8, width=8, seed=5):
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (16, 12), (7, 9), (10, 5)])
@torch.no_grad()
def test_the_two_halves_equal_the_whole_unet_bit_for_bit(layout, size):
    unet = tiny_unet(layout)
    denoiser = DiffusersDenoiser(Components(unet, schedule(), bag_of_words))
    x, cond = latents(3, *size), text(3, layout)
    for t in (999, 500.0, torch.tensor(3), torch.tensor([999, 40, 0])):
        ids = torch.tensor([[size[0] * 8, size[1] * 8, 0, 0, size[0] * 8, size[1] * 8]] * 3, dtype=torch.float32)
        added = {"text_embeds": cond.pooled, "time_ids": ids} if layout == "sdxl" else None
        whole = unet(x, t, encoder_hidden_states=cond.embeds, added_cond_kwargs=added).sample
        halves = denoiser.from_h(denoiser.to_h(x, t, cond))
        assert (whole - halves).abs().max().item() == 0.0
        assert torch.equal(denoiser.predict(x, t, cond), whole)


@torch.no_grad()
def test_given_size_conditions_are_used_instead_of_the_latents_size():
    denoiser = tiny_denoiser("sdxl")
    x, cond = latents(2), text(2, "sdxl")
    ids = torch.tensor([[512.0, 512.0, 64.0, 0.0, 512.0, 512.0]] * 2)
    other = Conditioning(cond.embeds, cond.pooled, {"time_ids": ids})
    added = {"text_embeds": cond.pooled, "time_ids": ids}
    whole = denoiser.unet(x, 7, encoder_hidden_states=cond.embeds, added_cond_kwargs=added).sample
    assert torch.equal(denoiser.predict(x, 7, other), whole)
    assert not torch.equal(denoiser.predict(x, 7, cond), whole)


@torch.no_grad()
def test_h_is_the_mid_blocks_output():
    denoiser = tiny_denoiser("sd")
    seen = []
    hook = denoiser.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    denoiser.predict(latents(2), 500, text(2))
    hook.remove()
    assert torch.equal(denoiser.to_h(latents(2), 500, text(2)).h, seen[0])
    assert denoiser.family == FAMILY
    assert denoiser.channels == 32
    assert denoiser.latent_shape == (4, 8, 8)


@torch.no_grad()
def test_states_are_cut_and_joined_by_rows():
    denoiser = tiny_denoiser("sd")
    state = denoiser.to_h(latents(4), torch.tensor([900, 500, 300, 1]), text(4))
    whole = denoiser.from_h(state)
    again = HState.cat([state[0:1], state[torch.tensor([1, 2])], state[3:4]])
    assert torch.equal(denoiser.from_h(again), whole)
    picked = denoiser.from_h(state[torch.tensor([2, 0])])
    torch.testing.assert_close(picked, whole[[2, 0]])
    assert len(state) == 4


def test_conditionings_of_different_kinds_do_not_mix():
    with pytest.raises(ConceptSteerError, match="different kinds"):
        Conditioning.cat([text(1), text(1, "sdxl")])
    with pytest.raises(ValueError, match="single"):
        text(2).expand(3)
    assert len(text(1, "sdxl").expand(5)) == 5


@torch.no_grad()
def test_steered_prediction_is_the_formula_for_the_text_rows_only():
    denoiser = tiny_denoiser("sd")
    x, cond, c = latents(4), text(4), vector()
    is_cond = [False, True, True, False]
    state = denoiser.to_h(x, 500, cond)
    h = state.h.clone()
    h[1:3] += 0.7 * c.tensor.view(1, -1, 1, 1)
    steered = denoiser.predict(x, 500, cond, [Steer(c, 0.7)], is_cond)
    assert torch.equal(steered, denoiser.from_h(state.with_h(h)))
    plain = denoiser.predict(x, 500, cond)
    assert torch.equal(steered[[0, 3]], plain[[0, 3]])
    assert not torch.equal(steered[1], plain[1])


@torch.no_grad()
def test_steers_that_do_nothing_leave_every_bit():
    denoiser = tiny_denoiser("sd")
    x, cond = latents(2), text(2)
    plain = denoiser.predict(x, 500, cond)
    early = Schedule(0.0, 0.2)
    for steers in ([Steer(vector(), 0.0)], [Steer(vector(), 3.0, early)], [Steer(vector(), 1.0, rows="uncond")]):
        assert torch.equal(denoiser.predict(x, 500, cond, steers), plain)


@torch.no_grad()
def test_rows_may_carry_their_own_steers_and_timesteps():
    a, b = Steer(vector(1), 0.5), Steer(vector(2), 2.0, Schedule(0.0, 0.5))
    h = torch.randn(4, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 900.0, 100.0, 100.0])
    out = steer_rows(h, [[a], [b], [a, b], []], t)
    add_a, add_b = (s.strength * s.vector.tensor.view(-1, 1, 1) for s in (a, b))
    assert torch.equal(out[0], h[0] + add_a)
    assert torch.equal(out[1], h[1] + add_b)
    assert torch.equal(out[2], h[2] + add_a)  # b has ended by then
    assert torch.equal(out[3], h[3])
    assert steer_rows(h, [[], [], [], []], t) is h
    assert steer_rows(h, [b], 100.0) is h
    with pytest.raises(ConceptSteerError, match="3 rows"):
        steer_rows(h, [[a]] * 3, t)
    with pytest.raises(ConceptSteerError, match="timesteps"):
        times_of_rows(torch.tensor([1.0, 2.0]), 4)


def test_a_vector_of_another_family_is_refused_naming_both():
    denoiser = tiny_denoiser("sd")
    with pytest.raises(FamilyMismatch, match=r"Stable Diffusion 1.*custom:24x32"):
        denoiser.predict(latents(1), 5, text(1), [Steer(ConceptVector(torch.ones(1280), "sd1"))])


@torch.no_grad()
def test_cost_counts_the_halves():
    denoiser = tiny_denoiser("sd")
    before = denoiser.cost.snapshot()
    state = denoiser.to_h(latents(3), 5, text(3))
    denoiser.from_h(state[0:1])
    denoiser.predict(latents(2), 5, text(2))
    spent = denoiser.cost.since(before)
    assert spent == Cost(5, 3, 0)
    assert spent.unet_rows == 4.0
    assert before == Cost()


def test_freezing_restores_gradients_and_training_mode():
    unet = tiny_unet("sd").train()
    unet.conv_in.weight.requires_grad_(False)
    unet.mid_block.eval()
    wanted = [p.requires_grad for p in unet.parameters()]
    modes = [m.training for m in unet.modules()]
    with pytest.raises(KeyError), frozen(unet):
        assert not any(p.requires_grad for p in unet.parameters())
        assert not any(m.training for m in unet.modules())
        raise KeyError
    assert [p.requires_grad for p in unet.parameters()] == wanted
    assert [m.training for m in unet.modules()] == modes


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_noise_schedule_inverts_itself(kind):
    noises = schedule(kind)
    x0, eps = latents(3, seed=1), latents(3, seed=2)
    t = torch.tensor([999, 500, 3])
    x_t = noises.add_noise(x0, eps, t)
    alpha, sigma = noises.signal(t, x0)
    prediction = eps if kind == "epsilon" else alpha * eps - sigma * x0
    torch.testing.assert_close(noises.to_x0(x_t, prediction, t), x0, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(noises.to_epsilon(x_t, prediction, t), eps, atol=2e-5, rtol=1e-4)
    assert torch.equal(noises.add_noise(x0, eps, None), x0)


def test_unknown_predictions_and_layouts_are_refused_in_words():
    with pytest.raises(ConceptSteerError, match="epsilon and v_prediction"):
        NoiseSchedule(torch.ones(10), "sample")
    with pytest.raises(ConceptSteerError, match="inpainting"):
        DiffusersDenoiser(Components(tiny_unet("sd", in_channels=9), schedule(), bag_of_words))
    unet = tiny_unet("sd")
    unet.mid_block = None
    with pytest.raises(ConceptSteerError, match="no mid block"):
        DiffusersDenoiser(Components(unet, schedule(), bag_of_words))
    with pytest.raises(ConceptSteerError, match="UNet2DConditionModel, found int"):
        DiffusersDenoiser(Components(3, schedule(), bag_of_words))
    with pytest.raises(ConceptSteerError, match="put together without"):
        tiny_denoiser().decode(latents(1))


def test_the_checkpoint_hash_follows_the_weights():
    first, same, other = tiny_denoiser(seed=0), tiny_denoiser(seed=0), tiny_denoiser(seed=1)
    assert first.checkpoint_hash == same.checkpoint_hash != other.checkpoint_hash
    assert len(first.checkpoint_hash) == 64


@torch.no_grad()
def test_a_pipeline_gives_text_pictures_and_schedule(tmp_path):
    pipe = tiny_sd(tmp_path)
    denoiser = DiffusersDenoiser(pipe)
    cond = denoiser.encode_text(["a cat", "a dog"])
    assert cond.embeds.shape == (2, 16, 24)
    assert cond.pooled is None
    assert not torch.equal(cond.embeds[0], cond.embeds[1])
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    z = denoiser.encode_pictures(pixels)
    expected = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert torch.equal(z, expected)
    assert torch.equal(denoiser.decode(z), pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample)
    torch.testing.assert_close(denoiser.schedule.alphas_cumprod.float(), pipe.scheduler.alphas_cumprod)


@torch.no_grad()
def test_an_sdxl_pipeline_gives_pooled_prompts(tmp_path):
    denoiser = DiffusersDenoiser(tiny_sdxl(tmp_path))
    cond = denoiser.encode_text(["a cat", "a dog", ""])
    assert cond.embeds.shape == (3, 16, 24)
    assert cond.pooled is not None and cond.pooled.shape == (3, 12)
    assert denoiser.predict(latents(3), 5, cond).shape == (3, 4, 8, 8)


def test_pipelines_without_what_is_needed_are_refused(tmp_path):
    with pytest.raises(ConceptSteerError, match="object has no unet"):
        DiffusersDenoiser(object())
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny_sd(tmp_path)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConceptSteerError, match="alphas_cumprod"):
        DiffusersDenoiser(pipe)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@torch.no_grad()
def test_a_saved_folder_is_loaded_again(make, tmp_path):
    pipe = make(tmp_path)
    pipe.save_pretrained(str(tmp_path / "model"))
    denoiser = load_denoiser(tmp_path / "model")
    first = DiffusersDenoiser(pipe)
    assert denoiser.checkpoint_hash == first.checkpoint_hash
    assert torch.equal(denoiser.encode_text(["a cat"]).embeds, first.encode_text(["a cat"]).embeds)


def test_what_cannot_be_loaded_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ConceptSteerError, match=r"nowhere does not exist.*model_index"):
        load_denoiser(tmp_path / "nowhere")
    with pytest.raises(ConceptSteerError, match="cannot be read"):
        load_denoiser(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    with pytest.raises(ConceptSteerError, match="FluxPipeline"):
        load_denoiser(tmp_path)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}),
        encoding="utf-8",
    )
    with pytest.raises(ConceptSteerError, match="could not be loaded"):
        load_denoiser(tmp_path)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"PK")
    with pytest.raises(ConceptSteerError, match="another kind of file"):
        load_denoiser(pickle)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    with pytest.raises(ConceptSteerError, match="not a readable safetensors"):
        load_denoiser(broken)
    from safetensors.torch import save_file

    save_file({"lora_up.weight": torch.ones(2)}, str(tmp_path / "lora.safetensors"))
    with pytest.raises(ConceptSteerError, match="not a full checkpoint"):
        load_denoiser(tmp_path / "lora.safetensors")


def test_a_single_file_without_configs_says_what_is_needed(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "small.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3)}, str(file))
    with pytest.raises(ConceptSteerError, match="config files"):
        load_denoiser(file)
