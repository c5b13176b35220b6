"""The embedded localiser says where the world's marks are, and its training learns from what painting changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from concept_steer.demo import drawing, train_judges, train_localiser
from concept_steer.demo.localiser import CONCEPTS, LOCALISER_FILE, DemoLocaliser, Localiser
from concept_steer.errors import ConceptSteerError
from concept_steer.geom_erasing.detectors import detector_of

COLOURS = ((250, 250, 250), (150, 195, 240), (248, 190, 212), (170, 220, 170), (176, 178, 184), (52, 56, 76))


@pytest.fixture(scope="module")
def localiser() -> Localiser:
    return Localiser()


def canvas(seed: int) -> np.ndarray:
    """A plain ground with a coloured disc in its middle, as a thing would stand there."""
    rng = np.random.default_rng(seed)
    made = np.broadcast_to(np.array(COLOURS[seed % len(COLOURS)], np.uint8), (128, 128, 3)).copy()
    y, x = np.mgrid[:128, :128]
    made[(x - 64) ** 2 + (y - 64) ** 2 < rng.integers(25, 50) ** 2] = rng.integers(30, 220, 3)
    return made


def marked(concept: str, seed: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The picture, and left, top, right, bottom of its mark."""
    rng = np.random.default_rng(1000 + seed)
    wanted = np.array([one == concept for one in CONCEPTS])
    picture, masks, _ = train_localiser.mark(canvas(seed), rng, wanted, held_out=True)
    rows, columns = np.nonzero(masks[CONCEPTS.index(concept)])
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return Image.fromarray(picture), box


@pytest.mark.parametrize("concept", CONCEPTS)
def test_marks_are_found_where_they_were_painted(concept, localiser):
    detector = DemoLocaliser(concept, localiser=localiser)
    images, truths = zip(*(marked(concept, seed) for seed in range(24)), strict=True)
    overlaps = []
    for verdict, (left, top, right, bottom) in zip(detector.scores(images), truths, strict=True):
        found = [(b[0], b[1], b[0] + b[2], b[1] + b[3]) for _, b in verdict.boxes]
        overlaps.append(max((train_localiser.overlap(one, (left, top, right, bottom)) for one in found), default=0.0))
    assert np.mean(np.array(overlaps) > 0) >= 0.9, "too few are found"
    assert np.mean(overlaps) > 0.6


@pytest.mark.parametrize("concept", CONCEPTS)
def test_clean_pictures_and_the_other_marks_are_left_alone(concept, localiser):
    detector = DemoLocaliser(concept, localiser=localiser)
    others = [marked(other, seed)[0] for other in CONCEPTS if other != concept for seed in range(12)]
    clean = [Image.fromarray(canvas(seed)) for seed in range(24)]
    assert np.mean([verdict.flagged for verdict in detector.scores(others)]) <= 0.1
    assert np.mean([verdict.flagged for verdict in detector.scores(clean)]) <= 0.1


def test_boxes_are_in_pixels_of_the_picture_given(localiser):
    detector = DemoLocaliser("qr", localiser=localiser)
    image, _ = marked("qr", 1)
    large = image.resize((512, 256), Image.Resampling.NEAREST)
    small, wide = (detector.scores([one])[0].boxes[0][1] for one in (image, large))
    np.testing.assert_allclose(wide, np.array(small) * np.array([4, 2, 4, 2]), atol=4)


def test_the_detectors_by_name_are_the_localisers_concepts():
    for concept in CONCEPTS:
        detector = detector_of(f"demo-{concept}", 0.6)
        assert detector.name == f"demo-{concept}" and detector.threshold == 0.6  # type: ignore[attr-defined]
    assert detector_of("demo-qr").concept == "qr code"  # type: ignore[attr-defined]  # as captions call it


def test_the_file_is_small_and_says_how_good_it_is(localiser):
    assert LOCALISER_FILE.stat().st_size < 1_000_000
    report = json.loads(localiser.metadata["localiser.report"])
    for part in ("held_out_art", "held_out_art_through_vae"):
        for concept in CONCEPTS:
            assert report[part][concept]["n"] >= 500
            assert {"recall", "false_alarms", "iou_mean", "iou_at_least_half"} <= report[part][concept].keys()
    assert all(report["against_the_judges"][concept]["n"] >= 200 for concept in CONCEPTS)


def test_a_users_own_file_of_the_same_kind_reports_every_concept():
    images = [marked(concept, 3)[0] for concept in CONCEPTS]
    found = detector_of(f"model:{LOCALISER_FILE}").scores(images)
    assert [{label for label, _ in verdict.boxes} for verdict in found] == [{"watermark"}, {"qr code"}, {"text"}]


def test_a_file_that_is_missing_or_another_is_named(tmp_path):
    with pytest.raises(ConceptSteerError, match="missing"):
        Localiser(tmp_path / "none.safetensors")
    with pytest.raises(ConceptSteerError, match="is not a localiser"):
        Localiser(train_judges.judges.JUDGES_FILE)
    with pytest.raises(ConceptSteerError, match="does not know 'logo'"):
        DemoLocaliser("logo")


# --- training


def test_the_mask_is_where_painting_changed_the_picture():
    clean = canvas(2)
    for index, concept in enumerate(CONCEPTS):
        wanted = np.arange(len(CONCEPTS)) == index
        picture, masks, word = train_localiser.mark(clean, np.random.default_rng(index), wanted, held_out=True)
        assert not (picture != clean).any(2)[~masks[index]].any() and masks[index].any()
        assert not masks[~wanted].any() and (word >= 0) == (concept == "watermark")


def test_a_mark_that_a_later_one_hides_is_no_longer_in_the_mask():
    for seed in range(20):
        _, masks, _ = train_localiser.mark(canvas(seed), np.random.default_rng(seed), np.ones(3, bool), held_out=True)
        assert masks.sum(0).max() == 1


def test_the_held_out_word_is_never_painted_for_training():
    rng = np.random.default_rng(0)
    wanted = np.array([True, False, False])
    words = {train_localiser.mark(canvas(0), rng, wanted, held_out=False)[2] for _ in range(60)}
    assert words == set(range(len(drawing.WATERMARKS))) - {train_localiser.HELD_OUT_WORD}


def test_training_tells_the_marked_cells_from_the_others(capsys):
    rng = np.random.default_rng(5)
    made = [train_localiser.mark(canvas(i), rng, np.array([False, True, False]), held_out=False) for i in range(48)]
    pictures = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture, _, _ in made])
    masks = torch.stack([torch.from_numpy(mask).byte()[:, ::2, ::2] * 255 for _, mask, _ in made])
    net = train_localiser.train(train_localiser.small(pictures), masks, steps=60, seed=0, batch=16)
    with torch.no_grad():
        heat = net(train_judges.judges.view(pictures / 127.5 - 1)).sigmoid()[:, 1]
    inside = torch.nn.functional.avg_pool2d(masks[:, 1].float(), 4) > 127
    assert heat[inside].mean() > 2 * heat[~inside].mean()


def test_pictures_and_masks_are_moved_alike():
    moved = train_judges.moves(4, torch.Generator().manual_seed(0), mirror=False)
    pictures = (torch.rand(4, 3, 64, 64) * 255).byte()
    with_moves = train_judges.augment(pictures, torch.Generator().manual_seed(1), False, moved)
    still = torch.eye(2, 3).expand(4, 2, 3)
    unmoved = train_judges.augment(pictures, torch.Generator().manual_seed(1), False, still)
    grid = torch.nn.functional.affine_grid(moved, [4, 3, 64, 64], align_corners=False)
    expected = torch.nn.functional.grid_sample(unmoved, grid, padding_mode="border", align_corners=False)
    assert (with_moves - expected).abs().mean() < (with_moves - unmoved).abs().mean() / 1.5
