"""Vectors as files in a running ComfyUI: saved, found by name and by content, refused with words when wrong."""

from __future__ import annotations

import numpy as np
import pytest

from concept_steer.vector import ConceptVector

from .graphs import Graph
from .vectors import random_vector, with_nan


def picture_of(client, name: str) -> np.ndarray:
    g = Graph()
    demo = g.demo()
    shown = g.picture(demo, g.steer(demo, g.vector(name)))
    return client.pictures(client.queue(g), shown)


def error_of(client, name: str) -> str:
    g = Graph()
    demo = g.demo()
    g.picture(demo, g.steer(demo, g.vector(name)))
    return client.error(g)


def choice(client, name: str) -> str:
    """How the list of Load Concept Vector shows a file: its name and digits."""
    node = client.object_info()["ConceptSteerLoadVector"]
    kind, options = node["input"]["required"]["name"]
    listed = options["options"] if kind == "COMBO" else kind
    return next(shown for shown in listed if shown.startswith(f"{name} ["))


def test_a_saved_vector_is_loaded_by_name_and_by_its_digits_after_a_rename(client, vectors):
    random_vector(11).save(vectors / "source.safetensors", overwrite=True)
    g = Graph()
    demo = g.demo()
    kept = g.save(g.vector("source"), "kept")
    shown = g.picture(demo, g.steer(demo, kept))
    at_once = client.pictures(client.queue(g), shown)
    path = vectors / "kept.safetensors"
    assert ConceptVector.load(path) == random_vector(11)
    assert np.array_equal(picture_of(client, "kept"), at_once)
    (vectors / "source.safetensors").unlink()
    name = choice(client, "kept")
    path.rename(vectors / "renamed.safetensors")
    assert np.array_equal(picture_of(client, name), at_once)


def test_a_changed_file_is_read_again(client, vectors):
    random_vector(12).save(vectors / "changing.safetensors", overwrite=True)
    first = picture_of(client, "changing")
    random_vector(13).save(vectors / "changing.safetensors", overwrite=True)
    assert not np.array_equal(picture_of(client, "changing"), first)


def test_an_existing_name_is_not_overwritten_without_being_asked(client, vectors):
    random_vector(14).save(vectors / "taken.safetensors", overwrite=True)
    random_vector(15).save(vectors / "other.safetensors", overwrite=True)
    g = Graph()
    g.save(g.vector("other"), "taken")
    text = client.error(g)
    assert "taken.safetensors" in text and "overwrit" in text
    assert ConceptVector.load(vectors / "taken.safetensors") == random_vector(14)
    g = Graph()
    g.save(g.vector("other"), "taken", overwrite=True)
    client.queue(g)
    assert ConceptVector.load(vectors / "taken.safetensors") == random_vector(15)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", "con", "evil\n", ""])
def test_a_name_that_is_a_path_is_refused_and_nothing_is_written(client, base, vectors, name):
    random_vector(16).save(vectors / "good.safetensors", overwrite=True)
    before = {path for path in base.rglob("*") if path.suffix == ".safetensors"}
    g = Graph()
    g.save(g.vector("good"), name)
    text = client.error(g)
    assert repr(name) in text and "cannot name a concept vector" in text
    assert {path for path in base.rglob("*") if path.suffix == ".safetensors"} == before


def test_a_name_that_is_a_path_is_not_loaded_either(client, base):
    random_vector(17).save(base / "models" / "secret.safetensors", overwrite=True)
    text = error_of(client, "../secret")
    assert "'..'" in text and "cannot name a concept vector" in text


def test_a_missing_file_is_named_with_the_folders_searched(client, vectors):
    random_vector(18).save(vectors / "woman.safetensors", overwrite=True)
    text = error_of(client, "womann")
    for word in ("'womann'", "Did you mean woman", str(vectors)):
        assert word in text


def test_a_file_with_nan_says_so(client, vectors):
    with_nan(vectors / "spoiled.safetensors")
    text = error_of(client, "spoiled")
    assert "spoiled" in text and "NaN" in text and "learn it again" in text


def test_a_damaged_file_says_so_and_does_not_spoil_the_list(client, vectors):
    (vectors / "damaged.safetensors").write_bytes(b"oops")
    text = error_of(client, "damaged")
    assert "damaged.safetensors" in text
    assert choice(client, "damaged")
    (vectors / "damaged.safetensors").unlink()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_vector_of_another_family_names_both(client, vectors, family):
    random_vector(19, family, 1280).save(vectors / f"of {family}.safetensors", overwrite=True)
    text = error_of(client, f"of {family}")
    for word in (f"({family})", "the embedded demo model (demo)", "random 19", "Load a model of the first family"):
        assert word in text


def test_info_shows_where_a_vector_comes_from(client, vectors):
    random_vector(20).save(vectors / "facts.safetensors", overwrite=True)
    g = Graph()
    info = g("ConceptSteerInfo", vector=g.vector("facts"))
    told = g.text(info)
    run = client.queue(g)
    text = client.text(run, told)
    assert "the embedded demo model (demo)" in text and random_vector(20).fingerprint in text
    assert client.pictures(run, info).shape[-1] == 3


def test_vectors_whose_families_differ_are_not_mixed(client, vectors):
    random_vector(21).save(vectors / "one.safetensors", overwrite=True)
    random_vector(21, "sd1", 1280).save(vectors / "two.safetensors", overwrite=True)
    g = Graph()
    weights = {f"weight_{number}": 1.0 for number in (1, 2, 3, 4)}
    mix = g("ConceptSteerMix", vector_1=g.vector("one"), vector_2=g.vector("two"), mode="weighted sum", **weights)
    g("ConceptSteerInfo", vector=mix)
    text = client.error(g)
    assert "sd1" in text and "demo" in text
