"""A latent and a pixel tower trained side by side, and the figures that are made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from concept_steer.demo import tower_pair, world
from concept_steer.demo.build_data import LABELS
from concept_steer.demo.trainer import Job
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import latent_clip_towers as towers
from concept_steer.evaluate.latent_clip_guard import area

COUNT = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random pictures and latents with labels and captions in the layout of a build."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.save(folder / "pictures.npy", rng.integers(0, 256, (COUNT, 128, 128, 3), np.uint8))
    labels = {name: np.full(COUNT, -1, np.int16) for name in LABELS}
    labels |= {"kind": np.zeros(COUNT, np.int16), "role": np.zeros(COUNT, np.int16), "set": np.zeros(COUNT, np.int16)}
    labels["gender"], labels["tone"] = (rng.integers(0, n, COUNT).astype(np.int16) for n in (2, 5))
    np.savez(folder / "labels.npz", **labels)
    captions = [["a woman doctor", "a doctor"] if g else ["a man doctor", "a doctor"] for g in labels["gender"]]
    (folder / "captions.json").write_text(json.dumps(captions))
    np.save(folder / "latents.npy", rng.standard_normal((COUNT, 8, 16, 16)).astype(np.float16))
    (folder / "scale.json").write_text('{"scaling_factor": 0.2}')
    return folder


def test_held_out_drawings_are_about_a_tenth_of_people_and_a_fifth_of_things():
    every = np.indices((len(world.ROLES), 2, 5, 3)).reshape(4, -1)
    none = np.full(every.shape[1], -1)
    people = dict(zip(("role", "gender", "tone", "set"), every, strict=True), face=none, item=none)
    assert tower_pair.held_out(people).mean() == pytest.approx(0.1, abs=0.01)
    item, style = np.indices((len(world.OBJECTS) + len(world.CATEGORY), 3)).reshape(2, -1)
    none = np.full(len(item), -1)
    things = {"role": none, "gender": none, "tone": none, "face": none, "item": item, "set": style}
    assert tower_pair.held_out(things).mean() == pytest.approx(0.2, abs=0.02)


def test_a_pair_is_trained_the_same_twice_goes_on_after_a_stop_and_is_read_back(data, tmp_path):
    def trained(name: str, *steps: int):
        work = tmp_path / name
        work.mkdir()
        for file in ("latents.npy", "scale.json"):
            (work / file).symlink_to(data / file)
        for count in steps:
            pair = tower_pair.train(Job(data, work, count, 16, 1e-3, save_every=1))
        return pair

    pair = trained("one", 2)
    again = trained("two", 1, 2)  # the rate depends on how many steps there will be only after the warm-up
    torch.testing.assert_close(again.latent.proj, pair.latent.proj)
    both, told = tower_pair.read(tower_pair.write(pair, tmp_path / "pair.safetensors", {"steps": 2}))
    assert told == {"steps": 2} and set(both) == {"latent", "pixel"}
    pictures = torch.zeros(2, 3, 128, 128)
    assert (
        both["pixel"].encode_latents(pictures).shape == both["latent"].encode_latents(torch.zeros(2, 4, 16, 16)).shape
    )
    sizes = [sum(p.numel() for p in clip.visual.transformer.parameters()) for clip in both.values()]
    assert sizes[0] == sizes[1]


def test_a_file_that_is_no_pair_is_refused(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConceptSteerError, match="no pair of towers"):
        tower_pair.read(tmp_path / "other.safetensors")


def test_prompts_say_what_they_ask_for():
    texts, truth = towers.prompts(4)
    assert len(texts) == 12 and truth["inappropriate"].tolist() == [-1, 0, 1] * 4
    assert texts[0].startswith("a woman") and truth["gender"][0] == 0 and truth["object"][0] == -1
    assert texts[1] == towers.CLASSES["object"][int(truth["object"][1])]


def test_the_area_under_the_curve_counts_pairs_in_the_right_order():
    assert area([0.9, 0.8, 0.1, 0.2], [True, True, False, False]) == 1
    assert area([0.5, 0.5], [True, False]) == 0.5
    assert np.isnan(area([0.5], [True]))
