"""Geom-Erasing: places, captions, weights, the embedding's file, and prompts that know it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_steer.errors import LearnError, SettingError
from concept_steer.geom_erasing import LocationTokens, area_weights, covered, covered_cells, knowing, located_caption
from concept_steer.geom_erasing.reading import cropped
from concept_steer.hosts.diffusers import DiffusersDenoiser
from tests.unit.tiny_diffusers import tiny_sd, tiny_sdxl

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return DiffusersDenoiser(tiny_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return DiffusersDenoiser(tiny_sdxl(tmp_path_factory.mktemp("sdxl")))


def made(denoiser, name="no-watermark", bins=2, scale=1.0) -> LocationTokens:
    words = denoiser.text_reader().vectors_of("watermark")
    generator = torch.Generator().manual_seed(0)
    places = {k: scale * torch.randn(bins**2, v.shape[1], generator=generator) for k, v in words.items()}
    return LocationTokens(name, "watermark", bins, words, places)


def test_a_box_covers_the_places_it_touches_and_not_those_it_ends_at():
    assert covered([(0.0, 0.0, 0.5, 0.5)], 4) == [0, 1, 4, 5]
    assert covered([(0.5, 0.75, 1.0, 1.0)], 4) == [14, 15]
    assert covered([(0.49, 0.0, 0.51, 0.1)], 2) == [0, 1]
    assert covered([WHOLE], 3) == list(range(9))
    assert covered([], 4) == []


@pytest.mark.parametrize("box", [(0.5, 0.1, 0.5, 0.2), (0.6, 0.1, 0.5, 0.2), (1.2, 0, 1.5, 1), (math.nan, 0, 1, 1)])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(LearnError, match="shares of"):
        covered([box], 4)


@pytest.mark.parametrize("bins", [0, 9, 2.5, True])
def test_a_grid_that_does_not_fit_into_a_prompt_is_refused(bins):
    with pytest.raises(SettingError, match="1 to 8"):
        covered([WHOLE], bins)


def test_a_clean_picture_keeps_its_caption_and_another_is_told_the_thing_and_its_places():
    assert located_caption("a cat", "qr code", [], 2) == "a cat"
    told = located_caption("a cat", "qr code", [(0.0, 0.5, 1.0, 1.0)], 2)
    assert told == "a cat qr code <qr-code-2> <qr-code-3>"
    assert located_caption("", "text", [WHOLE], 1) == "text <text-0>"


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_the_weights_of_a_picture_are_those_of_the_paper_and_of_mean_one(alpha):
    cells = covered_cells([(0.0, 0.0, 0.25, 0.5)], 8, 8)
    weights = area_weights(cells, alpha)
    covered_count, total = int(cells.sum()), 64
    assert covered_count == 8
    assert weights[cells].unique().item() == pytest.approx(total / (covered_count + alpha * (total - covered_count)))
    assert weights[~cells].unique().item() == pytest.approx(weights[cells][0].item() * alpha)
    assert weights.mean().item() == pytest.approx(1.0)


def test_clean_and_wholly_covered_pictures_weigh_the_same_everywhere():
    batch = torch.stack([torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)])
    assert torch.equal(area_weights(batch, 0.3), torch.ones(2, 4, 4))


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5, math.nan])
def test_a_weight_out_of_its_range_is_refused(alpha):
    with pytest.raises(SettingError, match="alpha"):
        area_weights(torch.zeros(2, 2, dtype=torch.bool), alpha)


def test_boxes_follow_the_cut_to_the_middle_and_what_is_cut_away_is_gone():
    wide = cropped([(0.0, 0.0, 0.2, 1.0), (0.25, 0.5, 0.5, 1.0)], (200, 100), (64, 64))
    assert wide == [(0.0, 0.5, 0.5, 1.0)]
    assert cropped([(0.1, 0.2, 0.3, 0.4)], (64, 64), (128, 128))[0] == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_the_file_is_one_tensor_under_the_embeddings_name_and_reads_back_the_same(sd, tmp_path):
    tokens = made(sd)
    path = tokens.save(tmp_path / "no-watermark.safetensors")
    stored = load_file(path)
    assert list(stored) == ["no-watermark"] and torch.equal(stored["no-watermark"], tokens.rows["clip_l"])
    again = LocationTokens.load(path)
    assert (again.name, again.concept, again.bins) == (tokens.name, tokens.concept, tokens.bins)
    assert torch.equal(again.places["clip_l"], tokens.places["clip_l"])
    assert torch.equal(again.words["clip_l"], tokens.words["clip_l"])


def test_an_embedding_of_sdxl_has_both_text_encoders_and_reads_back(sdxl, tmp_path):
    tokens = made(sdxl)
    path = tokens.save(tmp_path / "xl.safetensors")
    assert set(load_file(path)) == {"clip_l", "clip_g"}
    again = LocationTokens.load(path)
    assert torch.equal(again.places["clip_g"], tokens.places["clip_g"])


def test_diffusers_reads_the_file_as_a_textual_inversion_and_encodes_the_same(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ti")
    pipe = tiny_sd(folder / "pipe")
    own = DiffusersDenoiser(pipe)
    tokens = made(own, bins=1)
    path = tokens.save(folder / "no-watermark.safetensors")
    mine = knowing(own, [tokens]).encode_text(["a cat no-watermark"]).embeds
    pipe.load_textual_inversion(str(path))
    theirs = pipe.encode_prompt("a cat no-watermark", "cpu", 1, False)[0]
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_prompt_without_learned_words_is_read_as_the_pipeline_reads_it(sd, sdxl):
    for denoiser in (sd, sdxl):
        plain = denoiser.encode_text(["a photo of a cat", ""])
        same = knowing(denoiser, [made(denoiser)]).encode_text(["a photo of a cat", ""])
        assert torch.allclose(plain.embeds, same.embeds, atol=1e-6)
        assert plain.pooled is None or torch.allclose(plain.pooled, same.pooled, atol=1e-6)


def test_gradients_reach_the_tokens_and_only_where_they_stand(sdxl):
    tokens = made(sdxl)
    places = {key: value.clone().requires_grad_(True) for key, value in tokens.places.items()}
    asked = LocationTokens(tokens.name, tokens.concept, tokens.bins, tokens.words, places)
    cond = sdxl.text_reader().encode(["a cat <watermark-1>", "a dog"], asked.vocabulary())
    (cond.embeds.square().sum() + cond.pooled.square().sum()).backward()
    for value in places.values():
        assert bool(value.grad[1].any()) and not bool(value.grad[[0, 2, 3]].any())


def test_a_prompt_that_is_too_long_loses_text_and_no_vector(sd):
    reader, tokens = sd.text_reader(), made(sd)
    asked = {k: v.clone().requires_grad_(True) for k, v in tokens.rows.items()}
    cond = reader.encode(["word " * 200 + "no-watermark"], {"no-watermark": asked})
    cond.embeds.square().sum().backward()
    assert bool(asked["clip_l"].grad.any(1).all())


def test_embeddings_that_fill_more_than_a_prompt_are_an_error(sd):
    tokens = made(sd, bins=8)
    with pytest.raises(LearnError, match="room for"):
        knowing(sd, [tokens]).encode_text(["no-watermark no-watermark"])


def test_a_name_is_only_read_as_a_whole_word(sd):
    knows = knowing(sd, [made(sd)])
    assert torch.equal(knows.encode_text(["no-watermarks"]).embeds, sd.encode_text(["no-watermarks"]).embeds)


def test_an_embedding_of_another_model_is_refused_by_name(sd, sdxl):
    with pytest.raises(LearnError, match="no-watermark"):
        knowing(sd, [made(sdxl)])
    words = {"clip_l": torch.zeros(1, 5)}
    with pytest.raises(LearnError, match="tokens of 5 numbers"):
        knowing(sd, [LocationTokens("other", "x", 1, words, {"clip_l": torch.zeros(1, 5)})])
    with pytest.raises(LearnError, match="same name"):
        knowing(sd, [made(sd), made(sd)])


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 80, ".hidden"])
def test_a_name_that_could_be_a_path_or_two_words_is_refused(sd, name):
    with pytest.raises(LearnError, match="name of an embedding"):
        made(sd, name=name)


def test_files_that_are_no_such_embedding_are_refused_and_named(sd, tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"emb_params": torch.zeros(2, 4)}, plain)
    about = {"geom_erasing.format": "1", "geom_erasing.name": "a", "geom_erasing.concept": "b"}
    cases = {
        "few.safetensors": ({"a": torch.zeros(3, 4)}, {**about, "geom_erasing.bins": "2"}),
        "two.safetensors": ({"a": torch.zeros(9, 4), "b": torch.zeros(9, 4)}, {**about, "geom_erasing.bins": "2"}),
        "bins.safetensors": ({"a": torch.zeros(9, 4)}, {**about, "geom_erasing.bins": "1000"}),
        "nan.safetensors": ({"a": torch.full((9, 4), math.nan)}, {**about, "geom_erasing.bins": "2"}),
    }
    for file, (tensors, told) in cases.items():
        save_file(tensors, tmp_path / file, {**told, "geom_erasing.info": json.dumps({})})
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04}q\x00.")
    for file in ["plain.safetensors", "pickle.safetensors", "missing.safetensors", *cases]:
        with pytest.raises((LearnError, SettingError), match=r"embedding|places"):
            LocationTokens.load(tmp_path / file)
