"""The safety switch: its settings, its sets and their files, and that it fails closed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load, save_file
from safety_parts import FAMILY, C, safety_set

from concept_steer.cli import safety as command_line
from concept_steer.errors import ConceptSteerError, FamilyMismatch, SafetyError, SettingError, VectorFileError
from concept_steer.guidance.safe_latent_diffusion import PRESETS, SAFETY_TEXT
from concept_steer.library import Library
from concept_steer.safety import SafetySet, SafetySettings, find_safety_set, plan
from concept_steer.safety import settings as schema
from concept_steer.safety.known import BENIGN, TEXTS
from concept_steer.safety.switch import safety_text

SUFFIX = ".safety.safetensors"


def planned(folders=(), **changes):
    how = {key: changes.pop(key) for key in ("sets", "can_guide") if key in changes}
    family = changes.pop("family", FAMILY)
    return plan(SafetySettings(**changes), family, C, folders=folders, **how)


# --- settings


def test_settings_survive_a_round_trip_through_json():
    settings = SafetySettings("strict", "both", ("weapons",), {"weapons": "knives"}, "retry", 5, "demo", 0.3)
    assert SafetySettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert hash(SafetySettings.from_dict(settings.to_dict())) == hash(settings)
    assert SafetySettings.from_dict({}) == SafetySettings()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"level": "high"}, "level"),
        ({"method": "magic"}, "method"),
        ({"on_flag": "hide"}, "on_flag"),
        ({"detector": "eyes"}, "detector"),
        ({"categories": "weapons"}, "categories"),
        ({"categories": [1]}, "category"),
        ({"texts": {"weapons": " "}}, "weapons"),
        ({"retries": -1}, "retries"),
        ({"retries": True}, "retries"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"strength": 1}, "strength"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_that_names_it(wrong, said):
    with pytest.raises(SettingError, match=said):
        SafetySettings.from_dict(wrong)


def test_one_line_says_what_will_happen():
    assert SafetySettings("off").text() == "Safety is off."
    line = SafetySettings(categories=("weapons",), detector="nudenet", on_flag="retry", retries=2).text()
    assert all(word in line for word in ("standard", "weapons", "nudenet", "at most 2 times"))


def test_the_command_line_offers_what_the_schema_knows():
    assert command_line.LEVELS == schema.LEVELS and command_line.METHODS == schema.METHODS
    assert command_line.ON_FLAG == schema.ON_FLAG and ("", *command_line.DETECTORS) == schema.DETECTORS


# --- sets and files


def test_a_set_survives_its_file_exactly(tmp_path):
    made = safety_set(threshold=0.5)
    path = made.save(tmp_path / f"school{SUFFIX}")
    found = SafetySet.load(path)
    assert found.categories == made.categories and found.texts == made.texts
    assert (found.family, found.channels, found.checkpoint_hash) == (FAMILY, C, "0" * 64)
    for name in (*made.categories, None):
        mine, theirs = (one.distilled if name is None else one.concepts[name] for one in (made, found))
        assert mine.vector == theirs.vector and mine.vector.title == theirs.vector.title
        assert mine.levels == theirs.levels
        assert mine.steer("strict").gate.fingerprint == theirs.steer("strict").gate.fingerprint
    with pytest.raises(VectorFileError, match="exists"):
        made.save(path)


def test_a_set_file_ends_in_its_own_suffix_and_is_no_vector_of_the_library(tmp_path):
    with pytest.raises(VectorFileError, match="must end"):
        safety_set().save(tmp_path / "school.safetensors")
    safety_set().save(tmp_path / f"school{SUFFIX}")
    assert Library([tmp_path]).entries() == []


def test_a_set_is_found_by_the_family_of_the_model(tmp_path):
    safety_set().save(tmp_path / "sub" / f"a{SUFFIX}")
    safety_set("sd1", 1280).save(tmp_path / f"b{SUFFIX}")
    assert find_safety_set(FAMILY, [tmp_path]).family == FAMILY
    assert find_safety_set("sd1", [tmp_path, tmp_path / "nowhere"]).channels == 1280
    assert find_safety_set("sdxl", [tmp_path]) is None


def changed(path, tensors=None, **meta):
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        about = {**file.metadata(), **meta}
    save_file({**load(path.read_bytes()), **(tensors or {})}, path, about)
    return path


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": {"0.vector": torch.full((C,), float("nan"))}},
        {"tensors": {"1.scales": torch.zeros(3, 1)}},
        {"tensors": {"2.limits": torch.full((3, 1), float("inf"))}},
        {"tensors": {"7.vector": torch.zeros(C)}},
        {"hspace.safety_version": "99"},
        {"hspace.safety": "{"},
        {"hspace.safety": "[]"},
    ],
)
def test_a_damaged_set_is_an_error_that_names_the_file_and_the_switch_draws_nothing(tmp_path, damage):
    path = changed(safety_set().save(tmp_path / f"a{SUFFIX}"), **damage)
    with pytest.raises(VectorFileError, match=r"a\.safety"):
        SafetySet.load(path)
    with pytest.raises(SafetyError, match=r"a\.safety"):
        planned([tmp_path])


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / f"a{SUFFIX}"
    save_file({"vector": torch.zeros(C)}, path)
    with pytest.raises(VectorFileError, match="not a safety set"):
        SafetySet.load(path)
    with pytest.raises(SafetyError, match="not a safety set"):
        planned([tmp_path])


def test_vectors_of_two_models_make_no_set():
    concepts = {"a": safety_set().concepts["weapons"], "b": safety_set("sd1", 1280).concepts["alcohol"]}
    with pytest.raises(SafetyError, match="different models"):
        SafetySet("mixed", concepts)
    with pytest.raises(SafetyError, match="no categories"):
        SafetySet("empty", {})


# --- the switch


def test_copies_of_what_hangs_on_a_model_are_the_same_thing():
    made = planned(sets=[safety_set()])
    copied = copy.deepcopy(made)
    assert copied.steers == made.steers and copied.firings is made.firings and copied.settings == made.settings


def test_off_does_nothing():
    made = planned(level="off", method="vectors")
    assert not made.acts and made.method == "off" and made.text() == "Safety is off."


def test_automatic_takes_both_where_there_are_vectors_and_guidance_otherwise():
    both, guidance = planned(sets=[safety_set()]), planned()
    assert (both.method, both.gated, len(both.steers)) == ("both", True, 1)
    assert both.steers[0].vector.title == "safe: all" and both.steers[0].rows == "cond"
    assert both.guidance.settings is both.guide and both.guidance.firings is both.firings and both.guidance.gated
    assert (guidance.method, guidance.steers) == ("sld", ()) and guidance.guide.text == SAFETY_TEXT
    assert guidance.guidance is guidance.guide and not guidance.gated


def test_automatic_is_vectors_alone_where_the_host_cannot_guide_and_says_so():
    made = planned(sets=[safety_set()], can_guide=False)
    assert (made.method, made.guidance) == ("vectors", None) and "no place for guidance" in made.text()
    assert "no place" not in planned(method="vectors", sets=[safety_set()]).text()


def test_strict_guides_every_picture_where_that_is_possible():
    both = planned(level="strict", sets=[safety_set()])
    assert both.method == "both" and both.guide.scale == PRESETS["max"].scale and both.steers[0].strength == 2.0
    assert both.guidance is both.guide and not both.gated
    assert planned(level="strict", sets=[safety_set()], can_guide=False).method == "vectors"
    assert planned(level="strict", method="vectors", sets=[safety_set()]).guide is None


@pytest.mark.parametrize(
    ("level", "alone", "beside"),
    [("gentle", "medium", "strong"), ("standard", "strong", "max"), ("strict", "max", "max")],
)
def test_levels_are_presets_of_guidance_and_thresholds_of_gates(level, alone, beside):
    made = planned(level=level, method="both", sets=[safety_set(threshold=0.5)])
    assert made.guide.warmup == PRESETS[beside].warmup
    assert planned(level=level, method="sld").guide.warmup == PRESETS[alone].warmup
    assert made.steers[0].gate.threshold == made.set.distilled.levels[level].threshold


def test_chosen_categories_have_vectors_and_gates_of_their_own():
    made = planned(categories=("alcohol",), sets=[safety_set()])
    assert [steer.vector.title for steer in made.steers] == ["safe: alcohol"] and made.categories == ("alcohol",)
    every = planned(categories=("alcohol", "weapons"), sets=[safety_set(distilled=False)])
    assert len(every.steers) == 2


def test_all_gates_of_a_plan_count_together_and_no_two_plans_do():
    one, other = (planned(sets=[safety_set(distilled=False)]) for _ in range(2))
    assert {id(steer.gate.firings) for steer in one.steers} == {id(one.firings)}
    assert one.firings is not other.firings


def test_the_switch_says_what_guidance_keeps_away_from():
    assert safety_text(SafetySettings(categories=("sexual",))) == "an image showing " + TEXTS["sexual"]
    every = "an image showing weapons, a weapons thing, alcohol, a alcohol thing"
    assert safety_text(SafetySettings(), safety_set()) == every
    own = SafetySettings(categories=("clowns",), texts={"clowns": "a clown, red noses"})
    assert safety_text(own) == "an image showing a clown, red noses"


def test_the_published_categories_share_out_the_published_text():
    published = set(SAFETY_TEXT.removeprefix("an image showing ").split(", "))
    assert {word for text in TEXTS.values() for word in text.split(", ")} == published
    assert len(set(BENIGN)) == len(BENIGN) >= 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "vectors"}, "no safety vectors"),
        ({"method": "both"}, "no safety vectors"),
        ({"can_guide": False}, "not possible"),
        ({"method": "sld", "can_guide": False}, "not possible"),
        ({"method": "both", "sets": [safety_set()], "can_guide": False}, "not possible"),
        ({"categories": ("clowns",)}, "clowns"),
        ({"categories": ("clowns",), "sets": [safety_set()]}, "clowns"),
        ({"categories": ("clowns",), "method": "sld"}, "clowns"),
    ],
)
def test_what_cannot_work_is_an_error_and_no_picture(changes, said):
    with pytest.raises(SafetyError, match=said):
        planned(**changes)


def test_a_set_of_another_model_is_an_error_that_names_both():
    with pytest.raises(FamilyMismatch, match="sd1"):
        planned(sets=[safety_set("sd1", 1280)])
    with pytest.raises(ConceptSteerError):
        plan(SafetySettings(), FAMILY, C + 1, sets=[safety_set()])


def test_every_further_try_is_stronger_and_counts_for_itself():
    first = planned(method="both", sets=[safety_set()])
    second = first.stronger()
    assert second.steers[0].strength == 1.5 * first.steers[0].strength and second.firings is not first.firings
    assert second.guidance.firings is second.firings and second.gated
    gentle = planned(level="gentle", method="both", sets=[safety_set()])
    warmups = [one.guide.warmup for one in (gentle, gentle.stronger(), first, second)]
    assert warmups == [PRESETS[name].warmup for name in ("strong", "max", "max", "max")]
    assert second.stronger().guide == second.guide and second.stronger().attempt == 2


def test_a_run_in_which_no_gate_was_asked_is_an_error():
    with pytest.raises(SafetyError, match="bypasses"):
        planned(sets=[safety_set()]).check_ran()
    planned().check_ran()  # guidance has no gate


def test_the_report_says_what_was_in_force():
    made = planned(sets=[safety_set()])
    made.firings.saw(999.0, torch.tensor([True, False]))
    report = made.report()
    assert report.to_dict()["gate"] == {"pictures": 2, "fired_pictures": 1, "steps": 2, "fired_steps": 1}
    assert "opened in 1 of 2 pictures" in report.text() and "learned vectors and Safe Latent Diffusion" in report.text()
    assert json.dumps(report.to_dict())
