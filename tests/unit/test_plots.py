"""Pictures of numbers and words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from concept_steer.describe import lines
from concept_steer.learn.preview import learning_curve
from concept_steer.learn.result import LearnResult
from concept_steer.plots import BLUE, ORANGE, card, curves
from concept_steer.vector import ConceptVector


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}


def test_both_lines_are_drawn_and_values_that_are_not_finite_left_out():
    image = curves([("a", BLUE, [(0, 1.0), (1, float("nan")), (2, 0.5)]), ("b", ORANGE, [(0, 2.0), (2, 1.0)])])
    assert image.size == (560, 300) and {BLUE, ORANGE} <= colours(image)


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)], [(0.0, float("inf"))]])
def test_no_values_or_equal_ones_still_give_a_picture(points):
    assert curves([("a", BLUE, points)], title="t", x_label="x", footer="f").size == (560, 300)


def test_a_card_wraps_long_values_and_grows_with_them():
    short, long = (
        card("t", [("hash", "ab")]),
        card("t", [("hash", "0123456789abcdef" * 12), ("words", "so many " * 40)]),
    )
    assert short.width == long.width == 640 and long.height > short.height + 60
    assert not (np.asarray(long)[:, -4:] != 255).any()  # nothing runs out of the picture


def test_a_card_shows_its_preview_picture():
    red = Image.new("RGB", (300, 300), (255, 0, 0))
    assert (255, 0, 0) in colours(card("t", [("a", "b")], red))


def test_a_vector_in_words_names_its_family_and_prompts():
    vector = ConceptVector(
        torch.ones(16), "custom:8x16", title="woman", info={"prompt_positive": "a woman", "x_y": "1"}
    )
    words = dict(lines(vector))
    assert words["title"] == "woman" and "custom:8x16" in words["made for"]
    assert words["positive prompts"] == "a woman" and words["x y"] == "1"


def test_the_learning_curve_shows_both_losses_only_where_there_are_some():
    vector = ConceptVector(torch.ones(16), "custom:8x16", title="woman")
    learned = LearnResult(vector, "score", [1.0, 0.6, 0.5], 0.9, 0.5, 10, 5, 1.0, "finished", [1.0, 0.7, 0.5, 0.5])
    meant = LearnResult(vector, "difference", [], 0.9, None, 10, 0, 1.0, "finished")
    assert {BLUE, ORANGE} <= colours(learning_curve(learned))
    assert learning_curve(meant).size == (560, 300)
