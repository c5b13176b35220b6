from __future__ import annotations

import json
import math
import shlex

import pytest
from PIL import Image

from concept_steer.cli import evaluate as cli
from concept_steer.cli.main import main, parser
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate.curves import Curve, Unit, curve, effect, final_with_interval, rows_to_effect
from concept_steer.evaluate.curves import rows_with_interval as with_interval
from concept_steer.evaluate.figures import KEYS, Figure, pivot, read, write
from concept_steer.evaluate.parts import Parts
from concept_steer.plots import curves as plot

COMMAND = "concept-steer evaluate learning"


def figure(metric="final_effect", value=0.5, low=0.4, high=0.6, **extra) -> Figure:
    return Figure("score", metric, value, low, high, 8, COMMAND, extra)


def unit(shares, rows=(10, 100, 1000), base=0.0, rich=1.0, pictures=10) -> Unit:
    """`shares` of the pictures show the concept at each check."""

    def hits(share):
        return tuple(int(i < round(share * pictures)) for i in range(pictures))

    return Unit(tuple(rows)[: len(shares)], tuple(hits(s) for s in shares), hits(base), hits(rich))


# --- figures and their files


def test_a_figures_row_has_the_agreed_keys_and_its_own_further_ones():
    assert tuple(figure().row()) == KEYS == ("method", "metric", "value", "low", "high", "n", "command")
    assert figure(concept="woman").row()["concept"] == "woman"
    with pytest.raises(ConceptSteerError, match="metric"):
        Figure("score", "m", 1.0, None, None, 1, COMMAND, {"metric": "no"})


def test_numbers_that_are_not_finite_become_null():
    row = figure(value=math.nan, low=-math.inf, high=math.inf).row()
    assert (row["value"], row["low"], row["high"]) == (None, None, None)


def test_figures_survive_their_file(tmp_path):
    given = [figure(concept="dark skin"), figure("rows", None, 1200.0, None), figure("seconds", 3.25, None, None)]
    plots = {"effect": Image.new("RGB", (8, 8))}
    paths = write(tmp_path / "new", "learning", given, title="Cost", sections=[("All", "text")], plots=plots)
    assert [path.name for path in paths] == ["learning.json", "learning.md", "learning-effect.png"]
    assert read(paths[0]) == given
    rows = json.loads(paths[0].read_text(encoding="utf-8"))
    assert all(set(KEYS) <= set(row) for row in rows) and rows[1]["value"] is None
    text = paths[1].read_text(encoding="utf-8")
    assert text.startswith("# Cost\n") and "## All\n\ntext" in text and "(learning-effect.png)" in text
    assert Image.open(paths[2]).size == (8, 8)
    write(tmp_path / "new", "learning", given[:1], title="Cost", sections=[])
    assert read(paths[0]) == given[:1]


@pytest.mark.parametrize("content", ["{", "{}", '[{"method": "score"}]'])
def test_a_file_without_figures_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConceptSteerError, match=r"x\.json"):
        read(path)


def test_a_table_has_a_row_per_method_and_dashes_where_nothing_was_measured():
    table = pivot([figure(), figure("rows", None, 1200.0, None)], {"rows": "cost", "final_effect": "end", "no": "none"})
    assert table.splitlines()[0] == "| method | cost | end | none |"
    assert table.splitlines()[2] == "| score | not reached in 1200 | 0.5 (0.4 to 0.6) | - |"


# --- parts of a long run


def test_a_part_is_made_once_and_then_read(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"hits": [1, 0], "value": 0.5}

    first = Parts(tmp_path, {"steps": (1, 2)})
    assert first.get("dark skin-score-0", make) == {"hits": [1, 0], "value": 0.5}
    second = Parts(tmp_path, {"steps": (1, 2)})
    assert second.get("dark skin-score-0", make) == {"hits": [1, 0], "value": 0.5}
    assert (len(calls), first.made, second.made) == (1, 1, 0)


def test_a_part_of_other_settings_says_which_one_differs(tmp_path):
    Parts(tmp_path, {"steps": 1, "model": "a"}).get("x", dict)
    with pytest.raises(ConceptSteerError, match="steps = 1, now it is 2"):
        Parts(tmp_path, {"steps": 2, "model": "a"}).get("x", dict)
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(ConceptSteerError, match=r"y\.json"):
        Parts(tmp_path, {}).get("y", dict)


# --- effect against cost


def test_effect_is_the_share_gained_over_what_the_rich_prompt_gains():
    assert effect(0.7, 0.1, 0.9) == pytest.approx(0.75)
    assert effect(0.1, 0.1, 0.9) == 0
    assert math.isnan(effect(0.5, 0.9, 0.9))


@pytest.mark.parametrize(
    ("effects", "target", "rows"),
    [
        ((0.0, 0.5, 1.0), 0.5, 100),  # exactly at a check
        ((0.0, 0.5, 1.0), 0.75, 550),  # half-way between two
        ((0.0, 0.5, 1.0), 0.25, 55),
        ((0.8, 0.9, 1.0), 0.5, 10),  # at the first check already: an upper bound
        ((0.0, 0.4, 0.8), 0.9, None),  # never
        ((0.0, 0.9, 0.2), 0.5, None),  # once, but not kept
        ((0.0, 0.0, 1.0), 1.0, 1000),  # at the last check there is nothing to keep it for
        ((0.0, 1.0, 1.0), math.nan, None),
    ],
)
def test_the_cost_of_an_effect_is_read_off_the_curve(effects, target, rows):
    found = rows_to_effect(Curve((10, 100, 1000), effects), target)
    assert found == (None if rows is None else pytest.approx(rows))


def test_an_effect_lost_again_counts_from_where_it_is_kept():
    found = Curve((1, 2, 3, 4, 5, 6), (0.9, 0.1, 0.2, 0.8, 0.8, 0.8))
    assert rows_to_effect(found, 0.5) == pytest.approx(3.5)


def test_a_curve_is_the_mean_over_runs_and_a_short_run_keeps_its_last_check():
    found = curve([unit((0.0, 0.4, 0.8)), unit((0.2, 0.6), rows=(20, 200))])
    assert found.rows == (15, 150, 600)
    assert found.effects == pytest.approx((0.1, 0.5, 0.7))


def test_effects_are_relative_to_the_pooled_prompts():
    assert curve([unit((0.5,), base=0.2, rich=0.8), unit((0.5,), base=0.0, rich=0.6)]).final == pytest.approx(4 / 6)


def test_the_interval_of_a_cost_holds_its_value():
    units = [unit(shares) for shares in ((0.0, 0.5, 1.0), (0.0, 0.3, 0.9), (0.1, 0.7, 1.0), (0.0, 0.6, 0.8))]
    value, low, high = with_interval(units, 0.5, draws=200)
    assert low < value < high <= 1000
    final, below, above = final_with_interval(units, draws=200)
    assert below <= final <= above and final == pytest.approx(0.925)


def test_a_cost_not_reached_is_above_what_was_spent():
    assert with_interval([unit((0.0, 0.1, 0.2))] * 3, 0.9, draws=20) == (None, 1000, None)


def test_the_upper_end_is_open_where_many_resamples_do_not_get_there():
    units = [unit((0.0, 0.5, 1.0))] * 3 + [unit((0.0, 0.1, 0.4))] * 2
    value, low, high = with_interval(units, 0.7, draws=200)
    assert value is not None and low is not None and high is None


def test_the_final_effect_has_an_interval_even_if_some_roles_show_the_concept_anyway():
    units = [unit((0.5,), base=0.0, rich=1.0), unit((1.0,), base=1.0, rich=1.0)]
    value, low, high = final_with_interval(units, draws=200)  # the second alone has no effect to speak of
    assert value == pytest.approx(0.5) and math.isfinite(low) and math.isfinite(high)


# --- plots


def test_on_a_logarithmic_axis_equal_factors_are_equal_distances():
    blue = (38, 98, 204)
    image = plot([("a", blue, [(1, 1.0), (10, 0.0), (100, 1.0), (0, 5.0)])], log_x=True, size=(400, 300))
    lowest = [x for x in range(60, 380) if image.getpixel((x, 300 - 42 - 2)) == blue]
    middle = (56 + 400 - 14) / 2
    assert lowest and abs(sum(lowest) / len(lowest) - middle) < 3


# --- the command line


def test_every_measurement_is_a_subcommand_with_help(capsys):
    for name in ("learning", "generality"):
        with pytest.raises(SystemExit) as left:
            main(["evaluate", name, "--help"])
        assert left.value.code == 0 and "--out" in capsys.readouterr().out


def test_the_command_of_a_figure_measures_the_same_again():
    given = ["evaluate", "learning", "--concepts", "dark skin,woman", "--seeds", "2", "--scale", "quick"]
    args = parser().parse_args([*given, "--out", "somewhere"])
    words = shlex.split(cli.command_line(args, "learning", "concepts", "methods", "seeds", "scale", "pictures"))
    assert words[0] == "concept-steer"
    again = parser().parse_args([*words[1:], "--out", "somewhere"])
    assert vars(again) | {"parser": 0} == vars(args) | {"parser": 0}


@pytest.mark.parametrize("option", ["--concepts", "--methods"])
def test_an_empty_list_of_names_is_a_mistake(option):
    with pytest.raises(SystemExit) as left:
        parser().parse_args(["evaluate", "learning", option, ","])
    assert left.value.code == 2


def test_the_defaults_name_what_exists():
    pytest.importorskip("diffusers")
    from concept_steer.evaluate.methods import METHODS, SCALES, planned
    from concept_steer.evaluate.tasks import TASKS, tasks

    assert cli.names(cli.METHODS) == list(METHODS)
    assert cli.names(cli.CONCEPTS) == list(TASKS)
    assert set(SCALES) == {"full", "quick", "tiny"}
    assert planned(100, 6) == {50, 25, 12, 6, 3} and planned(2, 6) == {1}
    with pytest.raises(ConceptSteerError, match="known are woman"):
        tasks(["nothing"])


def test_no_concept_is_judged_on_a_prompt_it_was_learned_on():
    pytest.importorskip("diffusers")
    from concept_steer.demo.judges import CLASSES
    from concept_steer.evaluate.tasks import TASKS

    for task in TASKS.values():
        assert not {n for n, _ in task.pairs} & {n for n, _ in task.tests}
        assert len(task.opposites) == len(task.pairs) and len(task.tests) == 4
        assert set(task.values) <= set(CLASSES[task.head])


def test_the_rate_is_chosen_by_final_effect_and_then_by_the_whole_curve():
    pytest.importorskip("diffusers")
    from concept_steer.evaluate.learning import best_rate

    assert best_rate({0.1: [0.9, 0.8], 0.3: [0.1, 0.9]}) == 0.3
    assert best_rate({0.1: [0.2, 0.9], 0.3: [0.5, 0.9]}) == 0.3
    assert best_rate({0.1: [0.5, 0.9], 0.3: [0.5, 0.9]}) == 0.1
    assert best_rate({0.1: [0.1, 0.1], 0.3: [0.5, math.nan]}) == 0.1
