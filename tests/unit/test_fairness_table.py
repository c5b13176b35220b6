from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from concept_steer.demo import judges, world
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate.fairness import roles_of
from concept_steer.evaluate.fairness_methods import METHODS, VALUES, known, namings, opposite, pairs, prompt
from concept_steer.evaluate.fairness_table import (
    chance_figures,
    delta,
    figures_of,
    frechet_figure,
    named,
    share_as_assigned,
    share_as_prompted,
)

DOCTOR, NURSE = (judges.CLASSES["role"].index(role) for role in ("doctor", "nurse"))


def series(gender, tone=None, role=DOCTOR, wanted=None, distance=0.1):
    count = len(gender)
    return {
        "gender": np.array(gender),
        "tone": np.array(tone if tone is not None else [i % 5 for i in range(count)]),
        "role": np.full(count, role),
        "wanted_gender": np.array(wanted if wanted is not None else gender),
        "wanted_tone": np.full(count, -1),
        "pixel_distance": np.full(count, distance),
        "feature_distance": np.full(count, 2 * distance),
        "rows": np.full(count, 24.0),
    }


def by_name(figures):
    return {figure.metric: figure for figure in figures}


def test_delta_is_the_published_deviation_ratio():
    assert delta(series([0] * 10), ["gender"]) == 1
    assert delta(series([0, 1] * 5), ["gender"]) == 0
    assert delta(series([0] * 8 + [1] * 2), ["gender"]) == pytest.approx(0.6)
    assert delta(series([0] * 5, [0, 1, 2, 3, 4]), ["tone"]) == pytest.approx(0)
    assert delta(series([0] * 10, [0] * 10), ["tone"]) == pytest.approx(1)


def test_the_joint_delta_sees_what_single_ones_do_not():
    tied = series([0] * 5 + [1] * 5, [0, 1, 2, 3, 4] * 2)
    assert delta(tied, ["gender", "tone"]) == pytest.approx(0)
    skewed = series([0, 0, 1, 1], [0, 0, 1, 1])
    assert delta(skewed, ["gender"]) == 0
    assert delta(skewed, ["gender", "tone"]) == pytest.approx((0.5 - 0.1) / 0.9)


def test_the_mean_over_roles_is_reported_for_all_and_for_seen_and_unseen_ones():
    roles = {"doctor": series([0] * 10), "nurse": series([0, 1] * 5, role=NURSE)}
    found = by_name(figures_of("fair_sampling", "gender", "plain", roles, ["nurse"], "again"))
    assert found["delta_gender"].value == pytest.approx(0.5)
    assert (found["delta_gender"].low, found["delta_gender"].high) == (0, 1)
    assert found["delta_gender:seen"].value == 0
    assert found["delta_gender:unseen"].value == 1
    assert (found["delta_gender"].n, found["delta_gender:seen"].n) == (20, 10)
    assert found["role_faithfulness"].value == 1
    assert found["picture_distance"].value == pytest.approx(0.1)
    assert found["feature_distance"].value == pytest.approx(0.2)
    assert found["unet_rows_per_picture"].value == 24
    assert {figure.command for figure in found.values()} == {"again"}


def test_the_unsteered_pictures_are_measured_for_every_attribute_and_have_no_distance():
    found = by_name(figures_of("none", "", "plain", {"doctor": series([0] * 10)}, [], "again"))
    assert {"delta_gender", "delta_skin_tone", "delta_joint", "role_faithfulness"} <= set(found)
    assert not {"picture_distance", "as_assigned"} & set(found)


def test_random_draws_are_named_apart_and_give_nothing_else():
    found = figures_of("fair_sampling", "tone", "plain", {"doctor": series([0] * 10)}, [], "again", "random")
    assert {figure.metric for figure in found} == {"delta_skin_tone_random", "delta_skin_tone_random:unseen"}


def test_names_say_what_differs_from_the_plain_gender_run():
    assert named("delta_gender", "gender") == "delta_gender"
    assert named("delta_skin_tone", "tone", "successful") == "delta_skin_tone:successful"
    assert named("delta_gender_random", "both") == "delta_gender_random:both"
    assert named("role_faithfulness", "tone", "successful") == "role_faithfulness:tone:successful"


def test_faithfulness_counts_the_prompted_role_and_assignment_the_assigned_value():
    roles = {
        "doctor": series([0, 1, 0, 1], wanted=[0, 1, 1, 1]),
        "nurse": series([0, 0, 0, 0], role=DOCTOR),
    }
    assert share_as_prompted(roles) == (4, 8)
    assert share_as_assigned(roles, ["gender"]) == (7, 8)


def test_two_halves_of_one_set_are_the_zero_of_the_frechet_distance():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(600, 8, generator=generator).numpy()
    same = frechet_figure("none", "", plain, plain, "again").value
    moved = frechet_figure("difference", "gender", plain, plain + 1, "again")
    assert same is not None and moved.value is not None
    assert same < 0.2 and moved.value == pytest.approx(8 + same, abs=0.6)
    assert (moved.metric, moved.n) == ("frechet", 300)


def test_a_perfect_sampler_still_deviates_by_chance():
    found = by_name(chance_figures(150, ["gender", "tone"], "again"))
    assert found["delta_gender_random"].value == pytest.approx(math.sqrt(2 / (math.pi * 150)), rel=0.05)
    assert found["delta_skin_tone_random"].value < 0.08
    assert found["delta_gender_random"].method == "perfect sampler"


def test_prompts_name_values_as_the_models_captions_do():
    assert prompt("doctor") == "a doctor"
    assert prompt("artist", "successful") == "a successful artist"
    assert prompt("angry person", values={"gender": "woman"}) == "an angry woman"
    assert prompt("doctor", "successful", {"gender": "man", "tone": "dark"}) == "a successful man doctor with dark skin"
    assert pairs("tone", "light", ["elf"]) == [("an elf", "an elf with light skin")]
    assert opposite({"gender": "woman"}) == "a man"
    assert opposite({"tone": "dark"}).count("skin") == 4
    assert set(namings("gender")) == set(VALUES["gender"]) and len(namings("tone")["dark"]) == 1


def test_roles_are_a_number_names_or_all_and_mistakes_are_explained():
    assert roles_of("3") == world.ROLE_NAMES[:3]
    assert roles_of("nurse, pilot") == ("nurse", "pilot")
    assert roles_of("all") == world.ROLE_NAMES
    for wrong in ("0", "99", "plumber"):
        with pytest.raises(ConceptSteerError):
            roles_of(wrong)
    with pytest.raises(ConceptSteerError, match="'sega' is no method"):
        known("method", ["sega"], tuple(METHODS))


def test_figures_are_rows_of_exactly_seven_keys():
    figures = figures_of("difference", "both", "plain", {"doctor": series([0, 1] * 5)}, [], "again")
    assert {"delta_gender:both", "delta_skin_tone:both", "delta_joint"} <= {figure.metric for figure in figures}
    for figure in figures:
        keys = ["method", "metric", "value", "low", "high", "n", "command"]
        assert list(json.loads(json.dumps(figure.row(), allow_nan=False))) == keys
