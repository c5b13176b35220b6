"""The data builder draws what its captions and labels say, the same way every time; no network is needed."""

from __future__ import annotations

import numpy as np
import pytest

from concept_steer.demo import art, build_data, drawing, world


class PaintedGallery(build_data.Gallery):
    """Stands in for the emoji sets: every code point is a square of its own colour."""

    def __init__(self) -> None:
        super().__init__({})

    def get(self, set_name: str, code: str, cap: bool = False) -> np.ndarray:
        value = sum(map(ord, set_name + code)) % 200
        picture = np.full((100, 90, 4), 255, np.uint8)
        picture[..., :3] = (value, 255 - value, 40)
        return drawing.nurse_cap(picture) if cap else picture


def drawn(seed: int, count: int) -> list:
    builder = build_data.Builder(PaintedGallery(), np.random.default_rng(seed))
    return [builder.draw() for _ in range(count)]


def test_the_same_seed_draws_the_same_pictures_captions_and_labels():
    for (p1, c1, l1), (p2, c2, l2) in zip(drawn(3, 40), drawn(3, 40), strict=True):
        assert np.array_equal(p1, p2) and c1 == c2 and l1 == l2


def test_every_picture_is_128_px_with_two_captions_and_all_labels():
    for picture, captions, label in drawn(0, 200):
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert len(captions) == 2 and all(captions)
        assert set(label) == set(build_data.LABELS)


def test_a_caption_that_names_a_gender_agrees_with_the_label():
    checked = 0
    for _, captions, label in drawn(1, 600):
        if label["kind"] != build_data.KINDS.index("person"):
            continue
        words = set(captions[0].replace(",", " ").split())
        for index, names in enumerate(({"woman", "female"}, {"man", "male"})):
            if words & names:
                assert label["gender"] == index
                checked += 1
    assert checked > 50


def test_captions_that_name_only_the_role_carry_the_documented_bias():
    rows = [(captions[0], label) for _, captions, label in drawn(2, 6000) if label["neutral"] == 1]
    men = [label["gender"] for caption, label in rows if "doctor" in caption]
    share = np.mean([g == world.GENDERS.index("man") for g in men])
    assert len(men) > 15 and share > 0.6  # 0.85 in the table


def test_no_caption_names_a_watermark_a_qr_code_or_a_text():
    rows = drawn(4, 1500)
    marked = [captions for _, captions, label in rows if label["watermark"] >= 0 or label["qr"] or label["text"]]
    assert len(marked) > 80
    words = " ".join(text for captions in marked for text in captions).lower()
    assert not any(word in words for word in ("watermark", "qr", "stock", "sample", "demo", "preview"))


def test_scenes_never_name_what_they_may_show():
    for scene, (share, bad, good) in world.SCENES.items():
        assert 0 <= share <= 1
        assert not any(item in scene for item in (*bad, *good))
        assert all(item in world.INAPPROPRIATE_CODE for item in bad) and all(item in world.OBJECTS for item in good)


def test_there_are_at_least_40_roles_with_two_genders_and_five_tones():
    assert len(world.ROLES) >= 40 and len(world.TONES) == 5
    codes = {(r.code_point(g, t), r.cap) for r in world.ROLES for g in world.GENDERS for t in world.TONES}
    assert len(codes) == len(world.ROLES) * 10, "two roles share a picture"


def test_the_fluent_set_has_its_two_swapped_tones_put_right():
    assert art._fluent_tone("1f469-1f3fc-200d-2695") == "1f469-1f3fd-200d-2695"
    assert art._fluent_tone("1f469-1f3fc-200d-1f4bb") == "1f469-1f3fc-200d-1f4bb"  # the programmer is right already


def test_a_picture_smaller_than_the_canvas_is_pasted_where_it_is_told():
    canvas = np.zeros((128, 128, 3), np.uint8)
    drawing.paste(canvas, np.full((10, 10, 4), 255, np.uint8), 5, 64)
    assert canvas[64, 4].tolist() == [255, 255, 255] and canvas[64, 30].tolist() == [0, 0, 0]


@pytest.mark.parametrize("noun,expected", [("elf", "an elf"), ("doctor", "a doctor"), ("angry man", "an angry man")])
def test_articles(noun: str, expected: str):
    assert build_data.article(noun) == expected
