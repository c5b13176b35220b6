"""The measurement of Geom-Erasing, as small as it goes, on the embedded model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from concept_steer.demo import model
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import erasing, erasing_report
from concept_steer.evaluate.erasing_ablation import Row
from concept_steer.evaluate.erasing_data import Build, found_boxes, jittered, overlap, spoiled
from concept_steer.evaluate.figures import read
from concept_steer.hosts.diffusers import DiffusersDenoiser

COUNT = 48


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """Plain pictures with a box in them, in the layout of demo.build_data; two carry a mark already."""
    folder, rng = tmp_path_factory.mktemp("build"), np.random.default_rng(0)
    pictures = np.full((COUNT, 128, 128, 3), 200, np.uint8)
    for number in range(COUNT):
        pictures[number, 40:90, 40:90] = rng.integers(0, 255, 3)
    np.save(folder / "pictures.npy", pictures)
    watermark = np.full(COUNT, -1)
    watermark[:2] = 0
    np.savez(folder / "labels.npz", watermark=watermark, qr=np.zeros(COUNT, int), text=np.zeros(COUNT, int))
    (folder / "captions.json").write_text(json.dumps([[f"a box {i}", f"one box {i}"] for i in range(COUNT)]))
    return Build(folder)


@pytest.fixture(scope="module")
def measure(build, tmp_path_factory) -> erasing.Measure:
    denoiser = DiffusersDenoiser(model.pipeline())
    effort = erasing.Effort(tokens=1, lora=3, learned=20, rank=2, vector_pictures=3, vector_steps=2)
    return erasing.Measure(
        tmp_path_factory.mktemp("out"), denoiser, denoiser, build, count=4, steps=2, batch=4, effort=effort
    )


def test_pictures_with_a_mark_are_not_taken_and_the_rest_always_in_the_same_order(build):
    assert len(build.clean) == COUNT - 2 and not {0, 1} & set(build.clean.tolist())
    one, other = (build.take(3, 5) for _ in range(2))
    assert one[1] == other[1] and all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    with pytest.raises(ConceptSteerError, match="too few"):
        build.take(0, COUNT)


def test_a_folder_that_is_no_build_is_named(tmp_path):
    with pytest.raises(ConceptSteerError, match="build_data"):
        _ = Build(tmp_path).clean


def test_painted_marks_are_where_their_boxes_say_and_the_localiser_finds_them(build):
    pictures, _, boxes = spoiled(build, 0, 12, ("watermark", "qr", "text"), 0.5)
    clean, _ = build.take(0, 12)
    for picture, before, some in zip(pictures, clean, boxes, strict=True):
        changed = (picture != before).any(-1)
        for left, top, right, bottom in some:
            rows, columns = slice(round(top * 128), round(bottom * 128)), slice(round(left * 128), round(right * 128))
            changed[rows, columns] = False
        assert not changed.any()
    assert [len(some) for some in boxes] == [1] * 6 + [0] * 6
    found = found_boxes(pictures, ("watermark", "qr", "text"))
    assert overlap(found, boxes) > 0.6


def test_worse_boxes_are_worse_and_still_in_the_picture():
    boxes = [[(0.2, 0.2, 0.6, 0.5)], [], [(0.0, 0.0, 1.0, 0.3)]]
    near, far = jittered(boxes, 0.1), jittered(boxes, 0.5)
    assert overlap(boxes, boxes) == 1.0 > overlap(near, boxes) > overlap(far, boxes) > 0
    assert all(0 <= low < 1 for some in far for box in some for low in box[:2]) and far[1] == []


def test_a_single_mark_is_painted_found_and_named_and_its_record_is_another(measure):
    own = replace(measure, marks=("qr",))
    assert (own.concept, measure.concept) == ("qr code", "mark")
    given, _, boxes = spoiled(own.build, own.count, own.effort.learned, own.marks, erasing.SHARE)
    assert own.learned.boxes == found_boxes(given, ("qr",)) and len(own.learned.spoiled) == sum(map(bool, boxes))
    assert own.only == {"marks": ["qr"]} and measure.only == {}


def test_the_table_has_every_way_with_its_shares_and_is_not_drawn_again(measure):
    assert erasing.draw(measure, say=lambda text: None) == len(erasing.WAYS)
    assert erasing.draw(measure, say=lambda text: None) == 0
    extra = [Row("fine-tuning", "plain", {"watermark": 2, "qr": 0, "text": 0, "any": 2}, 8)]
    erasing_report.report(measure, "the command", {"model": "demo"}, extra)
    figures = read(measure.out / "geom_erasing.json")
    names = {(figure.method, figure.metric) for figure in figures if "set" not in figure.extra}
    assert {(way, f"icr_{mark}") for way in erasing.WAYS for mark in ("watermark", "qr", "text", "any")} <= names
    assert {(way, "frechet_distance") for way in erasing.WAYS} <= names
    assert all(figure.n == 4 for figure in figures if figure.metric.startswith("icr") and "set" not in figure.extra)
    rows = {figure.method: figure.value for figure in figures if figure.metric == "unet_rows"}
    assert rows["none"] == rows["masked_lora"] == 2 and rows["sld_strong"] > 2
    text = (measure.out / "geom_erasing.md").read_text(encoding="utf-8")
    assert "the command" in text and "fine-tuning" in text and "masked_lora" in text


def test_what_was_learned_with_other_settings_is_not_taken(measure):
    other = erasing.Measure(
        measure.out, measure.denoiser, measure.teacher, measure.build, count=4, steps=2, batch=4,
        effort=erasing.Effort(tokens=2, lora=3, learned=20, rank=2, vector_pictures=3, vector_steps=2),
    )  # fmt: skip
    with pytest.raises(ConceptSteerError, match=r"tokens|steps"):
        erasing.draw(other, say=lambda text: None)


def test_an_unknown_way_is_refused():
    with pytest.raises(ConceptSteerError, match="no way 'magic'"):
        erasing.chosen_ways(["magic"])
