"""The shipped model: size, layout, an exact way to diffusers and back, and pictures that show what is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers")

from concept_steer.demo import architecture, convert, judges, model
from concept_steer.demo.job import Studio
from concept_steer.errors import ConceptSteerError


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


def test_the_file_is_fp16_in_ldm_layout_and_no_larger_than_24_megabytes():
    state, metadata = model.read()
    assert model.MODEL_FILE.stat().st_size <= 24_000_000
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for key in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.5.0.in_layers.2.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ):
        assert key in state, key
    assert len(json.loads(metadata["tokenizer.vocab"])) == len(
        state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    )


def test_the_judges_take_no_more_than_3_megabytes():
    assert judges.JUDGES_FILE.stat().st_size <= 3_000_000


def test_to_diffusers_and_back_gives_every_tensor_bit_for_bit():
    state, _ = model.read()
    loaded = model.load(dtype=torch.float16)
    unet, vae, picture = (m.state_dict() for m in (loaded.unet, loaded.vae, loaded.picture_tower))
    parts = convert.from_ldm(state, list(unet), list(vae))
    back = convert.to_ldm(unet, vae, parts["text"], picture)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_diffusers_folder_of_it_draws_the_very_same_picture(tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    folder = model.to_diffusers(tmp_path / "demo")
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    pictures = [
        p("a doctor", generator=torch.Generator().manual_seed(1), **settings).images for p in (model.pipeline(), pipe)
    ]
    assert (pictures[0] == pictures[1]).all()


def test_unpacked_for_a_second_stage_and_packed_again_it_is_the_same_file(tmp_path: Path):
    model.unpack(tmp_path)
    _, metadata = model.read()
    packed = model.pack(tmp_path, tmp_path / "again.safetensors", metadata["modelspec.title"], {})
    before, after = model.read()[0], model.read(packed)[0]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_twin_is_packed_and_loaded_in_its_own_layout(tmp_path: Path):
    model.unpack(tmp_path)
    twin = architecture.make_unet("sd").half().float().state_dict()
    torch.save({"model": twin, "ema": twin, "step": 0}, tmp_path / "unet.pt")
    packed = model.pack(tmp_path, tmp_path / "twin.safetensors", "twin", {}, "sd")
    loaded = model.load(packed).unet.state_dict()
    assert loaded.keys() == twin.keys() and all(torch.equal(loaded[key], twin[key]) for key in twin)


def test_another_file_is_refused_by_name(tmp_path: Path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other, {"modelspec.architecture": "stable-diffusion-v1"})
    with pytest.raises(ConceptSteerError, match=r"other\.safetensors is not the embedded model.*stable-diffusion-v1"):
        model.read(other)
    with pytest.raises(ConceptSteerError, match="missing"):
        model.read(tmp_path / "nothing.safetensors")


def test_a_prompt_that_names_a_gender_is_followed(studio: Studio):
    roles = ("doctor", "firefighter", "cook", "artist")
    shares = [
        studio.judges(studio.draw([f"a {gender} {role}" for role in roles] * 4, range(16))).probabilities["gender"][
            :, 0
        ]
        for gender in ("woman", "man")
    ]
    assert shares[0].mean() > 0.75 and shares[1].mean() < 0.25


def test_prompts_that_name_a_role_are_followed(studio: Studio):
    roles = ["doctor", "firefighter", "police officer", "farmer"] * 4
    found = studio.judges(studio.draw([f"a {role}" for role in roles], range(16))).labels("role")
    assert sum(a == b for a, b in zip(found, roles, strict=True)) >= 13


def test_the_picture_tower_finds_the_caption_of_a_picture(studio: Studio):
    """Zero-shot on generated latents: the shipped small Latent-CLIP tells kinds of pictures apart."""
    prompts = ["a pizza", "a firefighter", "a happy face", "a car"]
    latents = torch.cat([studio.denoiser.encode_pictures(studio.draw([p] * 3, range(3))) for p in prompts])
    loaded = model.load()
    tokens = loaded.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    text = loaded.text_projection(loaded.text_encoder(**tokens).pooler_output)
    picture = loaded.picture_tower(pixel_values=latents).image_embeds
    scores = torch.nn.functional.normalize(picture, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    right = scores.argmax(1) == torch.arange(4).repeat_interleave(3)
    assert right.float().mean() >= 0.75


def test_judges_of_another_world_are_refused(tmp_path: Path):
    from safetensors.torch import save_file

    with safe_open(str(judges.JUDGES_FILE), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    path = tmp_path / "judges.safetensors"
    save_file(state, path, {"judges.classes": json.dumps({"gender": ["a", "b"]})})
    with pytest.raises(ConceptSteerError, match="other classes"):
        judges.Judges(path)
