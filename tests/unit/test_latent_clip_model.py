"""Latent-CLIP's towers, tokenizer and files, on small random weights in the public checkpoints' layout."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from concept_steer.demo import model as demo_model
from concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer.latent_clip import (
    CONFIGS,
    SPACES,
    ClipConfig,
    ClipTokenizer,
    LatentClipModel,
    convert,
    find_tokenizer,
    load_latent_clip,
    read_checkpoint,
    read_tokenizer,
    space,
    space_of,
)
from concept_steer.latent_clip.model import TowerSize

SMALL = ClipConfig(32, TowerSize(64, 2, 1), TowerSize(128, 2, 2), patch=4, size=16, vocabulary=2048)
PROMPTS = ["a woman doctor", "don't panic, it's 3d style!", "", "caf\u00e9 & cr\u00e8me (2 eggs)", "word " * 100]
RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
READS_SCALARS = RELEASE >= (2, 6)


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    about = demo_model.read()[1]
    return ClipTokenizer(json.loads(about["tokenizer.vocab"]), about["tokenizer.merges"].split("\n"))


@pytest.fixture(scope="module")
def small(tokenizer) -> LatentClipModel:
    torch.manual_seed(0)
    return LatentClipModel(SMALL, space("sdxl"), tokenizer).eval()


def public(state, **more):
    """A training checkpoint of OpenCLIP with these weights: prefixes, the VAE's encoder, numpy's numbers."""
    layout = {key.replace("visual.", "visual.latent_vit.", 1): value for key, value in state.items()}
    layout["visual.vae_encoder.conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    layout["visual.vae_quant_conv.bias"] = torch.zeros(8)
    state_dict = {f"module.{key}": value for key, value in layout.items()}
    groups = {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "step": np.int64(7), "betas": (0.9, 0.98)}]}
    return {"epoch": 34, "name": "latent-clip", "state_dict": state_dict, "optimizer": groups, **more}


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("public") / "epoch_34.pt"
    torch.save(public(small.state_dict()), path)
    return path


def latents(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(1))


# --- files

needs_scalars = pytest.mark.skipif(not READS_SCALARS, reason="this torch refuses numpy scalars, and says so")


@needs_scalars
def test_a_public_checkpoint_with_numpy_scalars_gives_the_same_vectors_once_converted(
    small, checkpoint, tokenizer, tmp_path
):
    made = convert(checkpoint, tmp_path / "clip.safetensors", tokenizer)
    loaded = load_latent_clip(tmp_path / "clip.safetensors")
    assert made.config == loaded.config == SMALL
    assert loaded.space == space("sdxl")
    assert loaded.scale == small.scale
    for one in (made, loaded):
        assert torch.equal(one.encode_latents(latents()), small.encode_latents(latents()))
        assert torch.equal(one.encode_text(PROMPTS), small.encode_text(PROMPTS))


@needs_scalars
def test_the_vae_and_the_optimizer_stay_outside_the_converted_file(small, checkpoint, tokenizer, tmp_path):
    convert(checkpoint, tmp_path / "clip.safetensors", tokenizer)
    assert safetensors.torch.load_file(tmp_path / "clip.safetensors").keys() == small.state_dict().keys()


def test_an_old_torch_is_told_what_to_do_about_numpy_scalars(checkpoint, monkeypatch):
    monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    with pytest.raises(ConceptSteerError, match=r"convert it where torch is 2\.6 or newer"):
        read_checkpoint(checkpoint)


class Wicked:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(small, tmp_path):
    others = {} if READS_SCALARS else {"optimizer": {}}
    stored = public(small.state_dict(), scaler=Wicked(tmp_path / "ran"), **others)
    torch.save(stored, tmp_path / "wicked.pt")
    with pytest.raises(ConceptSteerError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "wicked.pt")
    assert not (tmp_path / "ran").exists()


def test_allowing_numpy_scalars_ends_with_the_reading(checkpoint):
    allowed = getattr(torch.serialization, "get_safe_globals", list)  # in no fixed order
    before = set(allowed())
    if READS_SCALARS:
        read_checkpoint(checkpoint)
    assert set(allowed()) == before


def test_a_clip_for_pixels_is_named_as_such(small, tmp_path):
    torch.save({"state_dict": small.state_dict()}, tmp_path / "pixels.pt")
    with pytest.raises(ConceptSteerError, match="found a CLIP for pixels"):
        read_checkpoint(tmp_path / "pixels.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "epoch_34.pt").write_bytes(content)
    with pytest.raises(ConceptSteerError, match=r"epoch_34\.pt"):
        read_checkpoint(tmp_path / "epoch_34.pt")


def plain(small, tmp_path, change=lambda state: None):
    """A checkpoint without scalars, which every torch reads."""
    stored = public(small.state_dict(), optimizer={})
    change(stored["state_dict"])
    torch.save(stored, tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def test_a_checkpoint_that_lacks_weights_says_which(small, tokenizer, tmp_path):
    path = plain(small, tmp_path, lambda state: state.pop("module.visual.latent_vit.ln_pre.weight"))
    with pytest.raises(ConceptSteerError, match=r"visual\.ln_pre\.weight"):
        convert(path, tmp_path / "clip.safetensors", tokenizer)
    path = plain(small, tmp_path, lambda state: state.pop("module.text_projection"))
    with pytest.raises(ConceptSteerError, match="text_projection"):
        convert(path, tmp_path / "clip.safetensors", tokenizer)
    assert not (tmp_path / "clip.safetensors").exists()


def test_a_vocabulary_of_another_model_is_refused(small, tokenizer, tmp_path):
    more = ClipTokenizer({**tokenizer.vocabulary, "<more>": len(tokenizer)}, tokenizer.merges)
    with pytest.raises(ConceptSteerError, match="knows 2048 tokens, but the vocabulary has 2049"):
        convert(plain(small, tmp_path), tmp_path / "clip.safetensors", more)


def test_a_file_is_replaced_only_when_asked(small, tokenizer, tmp_path):
    out = tmp_path / "clip.safetensors"
    convert(plain(small, tmp_path), out, tokenizer)
    with pytest.raises(ConceptSteerError, match="exists already"):
        convert(tmp_path / "plain.pt", out, tokenizer)
    convert(tmp_path / "plain.pt", out, tokenizer, overwrite=True)


def test_what_is_no_converted_file_says_what_it_is(checkpoint, tmp_path):
    with pytest.raises(ConceptSteerError, match="convert it once"):
        load_latent_clip(checkpoint)
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConceptSteerError, match="not a latent CLIP of ours"):
        load_latent_clip(tmp_path / "other.safetensors")
    with pytest.raises(ConceptSteerError, match="not a file"):
        load_latent_clip(tmp_path / "none.safetensors")


# --- the model


def test_the_published_sizes_have_the_published_tokens_and_dimensions(tokenizer):
    found = {}
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            made = LatentClipModel(config, space("sdxl"), tokenizer)
        found[name] = (made.visual.positional_embedding.shape[0] - 1, made.text_projection.shape[1])
    assert found == {"Latent-ViT-B-8-512": (64, 512), "Latent-ViT-B-4-512-plus": (256, 640)}


def test_vectors_have_length_one_and_gradients_reach_the_latents(small):
    x = latents().requires_grad_()
    vectors = small.encode_latents(x)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    vectors[:, 0].sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_the_tower_sees_unscaled_latents_where_it_was_trained_on_those(small):
    x = latents()
    seen = torch.nn.functional.normalize(small.visual(x / 0.13025), dim=-1)
    assert torch.allclose(small.encode_latents(x), seen, atol=1e-6)


def test_larger_latents_are_averaged_and_smaller_ones_refused(small):
    x = latents()
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(small.encode_latents(large), small.encode_latents(x), atol=1e-5)
    with pytest.raises(ConceptSteerError, match="8 x 8 cells"):
        small.encode_latents(latents(size=8))


@pytest.mark.parametrize("shape", [(4, 16, 16), (1, 3, 16, 16), (1, 16, 16, 16), (1, 4, 0, 16)])
def test_latents_of_another_shape_are_refused(small, shape):
    with pytest.raises(ConceptSteerError, match="expected \\(B, 4, H, W\\)"):
        small.encode_latents(torch.zeros(shape))


def test_latents_that_are_not_finite_are_refused(small):
    with pytest.raises(ConceptSteerError, match="not finite"):
        small.encode_latents(torch.full((1, 4, 16, 16), float("nan")))


def test_both_towers_give_what_open_clip_gives(tokenizer, tmp_path):
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(
        32,
        {"image_size": 16, "patch_size": 4, "width": 64, "layers": 2},
        {"vocab_size": 2048, "width": 128, "heads": 2, "layers": 2},
    ).eval()
    theirs.visual.conv1 = torch.nn.Conv2d(4, 64, 4, 4, bias=False)
    torch.save(public(theirs.state_dict(), optimizer={}), tmp_path / "epoch_34.pt")
    ours = convert(tmp_path / "epoch_34.pt", tmp_path / "clip.safetensors", tokenizer)
    with torch.no_grad():
        picture = theirs.encode_image(latents() / 0.13025, normalize=True)
        text = theirs.encode_text(tokenizer(PROMPTS), normalize=True)
    assert ours.scale == pytest.approx(float(theirs.logit_scale.detach().exp()))
    assert torch.allclose(ours.encode_latents(latents()), picture, atol=1e-5)
    assert torch.allclose(ours.encode_text(PROMPTS), text, atol=1e-5)


# --- the tokenizer


def test_it_gives_the_ids_of_transformers_own_tokenizer(tokenizer, tmp_path):
    pytest.importorskip("transformers")
    from concept_steer.demo import tokenizer as demo_tokenizer

    theirs = demo_tokenizer.load(demo_model.write_tokenizer(demo_model.read()[1], tmp_path))
    mine = tokenizer(PROMPTS)
    for row, prompt in zip(mine.tolist(), PROMPTS, strict=True):
        ids = theirs(prompt, truncation=True, max_length=77)["input_ids"]
        assert row == ids + [0] * (77 - len(ids))


def test_it_gives_the_ids_of_open_clips_own_tokenizer():
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    prompts = [
        *PROMPTS,
        "A photo of THE Eiffel tower at 7:45 pm -- 50% off!!",
        "\u65e5\u672c\u8a9e \U0001f600 \u2019quoted\u2019",
    ]
    mine = find_tokenizer()
    assert len(mine) == 49408
    assert torch.equal(mine(prompts), open_clip.get_tokenizer("ViT-B-32")(prompts))


def test_a_folder_with_a_vocabulary_is_read(tokenizer, tmp_path):
    read = read_tokenizer(demo_model.write_tokenizer(demo_model.read()[1], tmp_path))
    assert read.vocabulary == tokenizer.vocabulary and read.merges == tokenizer.merges


def test_an_installed_packages_vocabulary_is_found_and_none_is_an_error_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("open_clip", "clip"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    with pytest.raises(ConceptSteerError, match="pip install open_clip_torch"):
        find_tokenizer()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    with gzip.open(tmp_path / "clip" / "bpe_simple_vocab_16e6.txt.gz", "wt") as file:
        file.write("header\na b\nab c</w>\n")
    found = find_tokenizer()
    assert found.encode("abc") == [513]
    assert len(found) == 512 + 2 + 1 + 2  # bytes, the two merges, the empty last line, start and end


@pytest.mark.parametrize("content", ["{}", "[]", "not json"])
def test_a_folder_with_something_else_is_refused(content, tmp_path):
    (tmp_path / "vocab.json").write_text(content)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ConceptSteerError, match="vocabulary"):
        read_tokenizer(tmp_path)


# --- latent spaces


def test_every_known_family_has_a_space_and_an_unlisted_one_is_an_error():
    assert [space_of(f).name for f in ("sd1", "sd2", "sdxl", "sdxl-refiner", "demo")] == [
        "sd1", "sd1", "sdxl", "sdxl", "demo",
    ]  # fmt: skip
    with pytest.raises(ConceptSteerError, match="custom:32x64"):
        space_of("custom:32x64")


def test_the_wrong_space_is_an_error_that_names_both():
    from concept_steer.latent_clip import check_space

    check_space(space("sd1"), space_of("sd2"), "model.safetensors")
    with pytest.raises(FamilyMismatch, match=r"model\.safetensors has latents of the VAE of SDXL .*Diffusion 1 and 2"):
        check_space(space("sd1"), space("sdxl"), "model.safetensors")
    with pytest.raises(FamilyMismatch, match=r"scaling 0\.2"):
        check_space(space("sd1"), replace(space("sd1"), scaling=0.2), "model.safetensors")


@pytest.mark.parametrize("name", SPACES)
def test_the_wrong_scale_is_noticed_and_the_right_one_kept(name):
    of, scaled = space(name), latents()
    assert torch.equal(of.scaled(scaled, True, "x"), scaled)
    assert torch.allclose(of.scaled(scaled / of.scaling, False, "x"), scaled, atol=1e-5)
    with pytest.raises(ConceptSteerError, match="look unscaled"):
        of.scaled(scaled / of.scaling, True, "x")
    with pytest.raises(ConceptSteerError, match="look scaled"):
        of.scaled(scaled, False, "x")
    with pytest.raises(ConceptSteerError, match="nothing has been drawn"):
        of.scaled(torch.zeros_like(scaled), False, "x")
