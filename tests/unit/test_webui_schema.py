"""One schema for accordion, prompt syntax, API and infotext of the web UIs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from concept_steer.errors import SettingError
from concept_steer.hosts.webui import with_axes
from concept_steer.hosts.webui_rows import MODES, SIDES, Fair, Row, without_tags
from concept_steer.hosts.webui_safe_words import ON_LEVELS, WAYS
from concept_steer.hosts.webui_schema import CONTROLS, ROWS, USUAL, Settings

FULL = Settings(
    True,
    (Row("woman", 0.8, 0.2, 0.9), Row("people/old man", -1.5, rows="uncond"), Row("a=b", 0.1 + 0.2, rows="both")),
    0.5,
    Fair("gender", "woman=0.7,man=0.3", "random", 0.9, 123, 4),
)
# how AUTOMATIC1111 reads the fields of an infotext
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def test_a_tag_says_name_strength_window_and_side():
    assert Row.parsed(["woman", "0.8", "start=0.2", "end=0.9", "rows=both"]) == Row("woman", 0.8, 0.2, 0.9, "both")
    assert Row.parsed(["woman"]) == Row("woman")
    assert Row.parsed(["woman", "strength=2", "end=0.5"]) == Row("woman", 2, 0, 0.5)


@pytest.mark.parametrize(
    "items",
    [[], [""], ["a", "x"], ["a", "1", "2"], ["a", "1", "begin=0"], ["a", "1", "start=0", "start=1"], ["a", "1", "end="],
     ["a", "nan"], ["a", "inf"], ["a", "1", "start=0.5", "end=0.5"], ["a", "1", "end=2"], ["a", "1", "rows=all"]],
)  # fmt: skip
def test_a_tag_that_is_not_understood_is_an_error(items):
    with pytest.raises(SettingError):
        Row.parsed(items)


@pytest.mark.parametrize("row", FULL.rows)
def test_a_row_is_read_back_from_its_text_to_the_last_digit(row):
    assert Row.parsed(row.text().split(":")) == row


def test_settings_are_read_back_from_their_text():
    assert Settings.parsed(FULL.text()) == FULL


def test_settings_survive_the_infotext_of_the_web_ui():
    line = f"Steps: 20, Concept Steer: {json.dumps(FULL.text())}, Version: v1.10.1"
    found = {key: json.loads(value) if value[0] == '"' else value for key, value in FIELD.findall(line)}
    assert Settings.parsed(found["Concept Steer"]) == FULL


def test_names_of_attributes_may_hold_the_separators():
    odd = Settings(True, fair=Fair("a|b %7C", "x y=1"))
    assert Settings.parsed(odd.text()) == odd


def test_the_infotext_holds_only_what_is_on():
    assert Settings(False, FULL.rows).text() == ""
    assert Settings(True, (Row("woman", 0.0),)).text() == ""
    assert Settings(True, (Row("woman"), Row("man", 0.0))).text() == "concept:woman:1"


@pytest.mark.parametrize("text", ["woman:1", "concept:woman:1 | sideways:2", "hires:much", "concept:"])
def test_an_infotext_that_is_not_understood_is_an_error(text):
    with pytest.raises(SettingError):
        Settings.parsed(text)


def test_the_controls_show_what_they_were_read_from():
    assert Settings.from_controls(list(FULL.to_controls().values())) == FULL
    assert tuple(FULL.to_controls()) == CONTROLS


def test_the_apis_dict_and_its_list_mean_the_same():
    assert Settings.from_args([FULL.to_dict(), *[None] * 30]) == FULL
    assert Settings.from_args(list(FULL.to_controls().values())) == FULL
    assert Settings.from_args([{"rows": [{"vector": "woman"}]}]) == Settings(True, (Row("woman"),))


def test_a_short_list_leaves_the_rest_as_usual():
    assert Settings.from_args([True, "woman", 0.5]) == Settings(True, (Row("woman", 0.5),))
    assert Settings.from_args([]) == Settings()
    assert Settings.from_controls(list(USUAL.values())) == Settings()


@pytest.mark.parametrize(
    "given",
    [{"row": []}, {"rows": {}}, {"rows": [{"strength": 1}]}, {"rows": [{"vector": "a", "path": "b"}]}, {"hires": "x"},
     {"enabled": "yes"}, {"fair": {"attribute": "gender", "mode": "some"}}, {"fair": {"attribute": "g", "seed": 1.5}},
     {"rows": [{"vector": "a", "strength": True}]}, {"rows": [{"vector": 3}]}, {"safety": True},
     {"safety": "much"}, {"safety": {"detector": "demo"}}],
)  # fmt: skip
def test_a_dict_that_is_not_understood_is_an_error(given):
    with pytest.raises(SettingError):
        Settings.from_dict(given)


def test_the_accordion_has_five_rows_and_the_api_as_many_as_wanted():
    assert sum(name.startswith("vector_") for name in CONTROLS) == ROWS == 5
    assert len(Settings.from_dict({"rows": [{"vector": f"v{i}"} for i in range(9)]}).rows) == 9


def test_strength_zero_and_a_switch_that_is_off_are_nothing_at_all():
    assert not Settings(True, (Row("woman", 0.0),)).acts
    assert not Settings(False, (Row("woman"),)).acts
    assert Settings(True, (Row("woman"),)).acts


def test_what_will_happen_is_said_in_words():
    said = FULL.in_words()
    assert "woman x 0.8 from 20% to 90% of sampling" in said and "in the negative prompt" in said
    assert "gender balanced" in said and "Hires pass: x 0.5" in said
    assert Settings().in_words().startswith("Off")


def test_a_plot_changes_single_controls_and_switches_steering_on():
    args = [False, "None", 1.0, 0.0, 1.0, "prompt", "woman"]  # the second row is the one in use
    assert with_axes(args, {"strength_2": 0.5}) == Settings(True, (Row("woman", 0.5),))
    assert with_axes(args, {"vector_1": "man"}) == Settings(True, (Row("man"), Row("woman")))
    assert with_axes([FULL.to_dict()], {"hires": 1.0}) == Settings(True, FULL.rows, 1.0, FULL.fair)
    assert with_axes(args, {}) == Settings(False, (Row("woman"),))


def test_a_plot_over_a_row_without_a_vector_is_an_error():
    with pytest.raises(SettingError, match="row 1 has no vector"):
        with_axes([True], {"strength_1": 0.5})


def test_tags_of_all_kinds_are_taken_out_of_a_prompt():
    assert without_tags("a doctor <concept:woman:0.8:end=0.5><lora:x:1>") == "a doctor"


def test_every_label_of_the_accordion_has_a_translation():
    root = Path(__file__).parents[2]
    known = json.loads((root / "localizations" / "de_DE.json").read_text(encoding="utf-8"))
    source = (root / "concept_steer" / "hosts" / "webui_script.py").read_text(encoding="utf-8")
    labels = set(re.findall(r'label="([^"]+)"', source)) | {f"Vector {i}" for i in range(1, ROWS + 1)}
    assert len(labels) > 15 and not labels - set(known)
    assert not {*SIDES, *MODES, *WAYS, *ON_LEVELS} - set(known)
