"""The table of safety methods end to end with tiny nets: what each row means, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_diffusers import TEXT_WIDTH, _clip, bag_of_words, schedule, tiny_unet, write_tokenizer

from concept_steer.cli import main
from concept_steer.cli.evaluate_safety import SAFETY_METHODS
from concept_steer.demo.judges import CLASSES
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import safety, safety_report
from concept_steer.evaluate.attack import Attack, TextEncoder
from concept_steer.evaluate.figures import Figure
from concept_steer.evaluate.i2p_prompts import PromptRow
from concept_steer.evaluate.safety_attacks import Attacked, Effort, targets
from concept_steer.evaluate.safety_drawing import JudgesEye, Order, load
from concept_steer.evaluate.safety_methods import METHODS, methods
from concept_steer.evaluate.safety_table import aims, as_prompted, attack_figures, suggestive_figures, time_figures
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.safety import Presence, SafeConcept, SafetySet
from concept_steer.safety.safety_set import STEERED, Strength
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")

FAMILY = "custom:24x32"
CLOSED, OPEN = 1e9, -1e9  # thresholds


def concept(name: str, seed: int, threshold: float, family: str = FAMILY) -> SafeConcept:
    vector = ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3, family)
    gate = Presence(torch.full((1, 1, 32), 1.0 + seed), torch.zeros(1, 1), torch.ones(1, 1), (500.0,), threshold)
    return SafeConcept(name, name, vector, gate, {level: Strength(1.0, threshold) for level in STEERED})


def safety_set(distilled: float = CLOSED, family: str = FAMILY) -> SafetySet:
    kinds = {name: concept(name, i, CLOSED, family) for i, name in enumerate(("violence", "drugs"))}
    return SafetySet("tiny", kinds, concept("all", 9, distilled, family))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = TextEncoder(tokenizer, _clip(tokenizer, TEXT_WIDTH).requires_grad_(False))
    tiny = Components(tiny_unet("mid only"), schedule(), bag_of_words, decode=lambda x: x[:, :3].tanh())
    return DiffusersDenoiser(tiny), JudgesEye(), encoder


EFFORT = Effort(targets=1, restarts=1, tokens=3, steps=1, candidates=8, misspelled=2, trials=1, works_from=0.0)


def measure(out, parts, **changes) -> safety.Measure:
    settings = {
        "safety_set": safety_set(),
        "pictures": (1, 1, 1),
        "steps": 4,
        "batch": 4,
        "limit": 4,
        "effort": EFFORT,
    }
    return safety.Measure(out, *parts, **{**settings, **changes})


def quiet(text: str) -> None:
    pass


def figures(folder) -> dict[tuple[str, str], dict]:
    rows = json.loads((folder / "safety.json").read_text(encoding="utf-8"))
    found = {(row["method"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_all_methods_are_drawn_counted_and_written(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(safety, "TIMED", 1)
    monkeypatch.setattr(safety, "ROUNDS", {"benign": 2, "suggestive": 1})
    monkeypatch.setattr(safety_report, "SHEET_COLUMNS", 1)
    mine = measure(tmp_path, parts)
    safety.prepare(mine, quiet)
    # batches: one for each guidance
    assert len(set(mine.keys.values())) == len(METHODS) - 1
    assert safety.draw(mine, say=quiet) == len(METHODS) * (3 + 3 + 1)
    written = {path.name for path in safety_report.report(mine, "the command", {"model": "tiny"})}
    sheets = {f"safety-sheet-{place}.png" for place in safety.PLACES}
    assert written == {"safety.json", "safety.md", "safety-categories.png"} | sheets
    found = figures(tmp_path)
    wanted = ["inappropriate_rate", "faithfulness", "frechet", "unet_rows_per_step", "time_ratio", "attack_success"]
    for method in METHODS:
        assert all((method, name) in found for name in wanted), method
        assert method == "none" or {(method, "benign_identical"), (method, "benign_distance")} <= found.keys()
    assert found["none", "time_ratio"]["value"] == 1
    rows = {method: found[method, "unet_rows_per_step"]["value"] for method in METHODS}
    assert rows["sld_medium"] == rows["sld_max"] == rows["distilled_sld_medium"] == 3
    assert rows["sld_max_every2"] == 2.5 and rows["sld_max_every4"] == 2.25
    assert rows["sld_weak"] == 2.5  # without momentum only the last two of four steps ask for the safety text
    assert {rows[name] for name in ("none", "negative_prompt", "vectors", "gated", "distilled", "switch_default")} == {
        2
    }
    for closed in ("gated", "distilled", "switch_default"):
        assert found[closed, "benign_identical"]["value"] == 1 and found[closed, "benign_distance"]["value"] == 0
        assert found[closed, "benign_gate_fired"]["value"] == found[closed, "not_enough"]["value"] == 0
        assert found[closed, "missed"]["value"] == found[closed, "inappropriate_rate"]["value"]
    for always in ("vectors", "negative_prompt", "sld_max", "distilled_sld_medium", "switch_strict"):
        assert found[always, "benign_identical"]["value"] == 0 and found[always, "benign_distance"]["value"] > 0
    scenes = [figure for (method, metric), figure in found.items() if method == "none" and ":a " in metric]
    assert sum(figure["n"] for figure in scenes) == 4  # all prompts are of the first scene
    text = (tmp_path / "safety.md").read_text(encoding="utf-8")
    assert (
        "| switch_default |" in text
        and "| inappropriate rate, at most SLD strong's |" in text
        and "1 of 1 by gradient" in text
    )
    assert safety.draw(mine, say=quiet) == 0
    again = safety_report.collect(measure(tmp_path, parts), mine.attacks(may_search=False), "the command")
    assert [figure.row() for figure in again] == list(found.values())  # also the times, which were kept


def test_an_open_gate_changes_every_picture_and_is_counted(tmp_path, parts):
    mine = measure(tmp_path, parts, safety_set=safety_set(OPEN), names=("distilled",))
    safety.prepare(mine, quiet)
    safety.draw(mine, say=quiet)
    found = load(mine.job("benign"), "distilled")
    assert found["fired"].all() and not found["identical"].any()


def test_a_shard_needs_the_attacks_and_then_draws_its_part(tmp_path, parts):
    mine = measure(tmp_path, parts, names=("sld_weak",))
    with pytest.raises(ConceptSteerError, match="--prepare"):
        safety.draw(mine, (0, 2), quiet)
    safety.prepare(mine, quiet)
    halves = [safety.draw(mine, (i, 2), quiet) for i in range(2)]
    assert min(halves) > 0 and safety.draw(mine, say=quiet) == 0


def test_other_settings_do_not_mix_with_what_is_there(tmp_path, parts):
    names = ("sld_weak",)
    safety.prepare(measure(tmp_path, parts, names=names), quiet)
    with pytest.raises(ConceptSteerError, match="steps = 4, now it is 5"):
        safety.prepare(measure(tmp_path, parts, names=names, steps=5), quiet)


def test_a_new_safety_set_has_its_methods_drawn_anew_and_only_those(tmp_path, parts):
    names = ("sld_weak", "vectors", "switch_default")
    mine = measure(tmp_path, parts, names=names, limit=2)
    safety.prepare(mine, quiet)
    safety.draw(mine, say=quiet)
    other = measure(tmp_path, parts, names=names, limit=2, safety_set=safety_set(OPEN))
    safety.prepare(other, quiet)
    assert safety.draw(other, say=quiet) == 2 + 2 + 1  # of the switch alone: its gate is another
    assert {name for name in mine.keys if mine.keys[name] != other.keys[name]} == {"switch_default"}
    assert not load(mine.job("benign"), "switch_default")["fired"].any()
    assert load(other.job("benign"), "switch_default")["fired"].all()


@pytest.mark.parametrize("name", ["switch_default", "gated"])
def test_vectors_of_another_family_end_the_run_before_any_picture(tmp_path, parts, name):
    mine = measure(tmp_path, parts, safety_set=safety_set(family="custom:48x32"), names=(name,), limit=2)
    with pytest.raises(ConceptSteerError, match="safety set 'tiny'"):
        safety.prepare(mine, quiet)
    assert not list(tmp_path.rglob("*.npz"))


def test_gates_that_were_not_asked_are_an_error(parts):
    recipe = methods(["gated"], parts[0], safety_set())["gated"]
    with pytest.raises(ConceptSteerError, match="asked about 0 pictures of a batch of 1"):
        replace(recipe, steers=())(parts[0], Order(("a",), (0,), 2, 5.0))


@pytest.mark.parametrize("name", ["vectors", "gated", "distilled", "switch_default"])
def test_a_method_without_its_vectors_is_an_error(name, parts):
    with pytest.raises(ConceptSteerError, match=f"{name} needs learned safety vectors"):
        methods([name], parts[0], None)


def test_an_unknown_method_is_an_error(parts):
    with pytest.raises(ConceptSteerError, match="'magic' is no method"):
        methods(["magic"], parts[0], None)


def test_the_time_ratio_is_taken_round_by_round():
    plain = {"benign": [1.0, 2.0, 4.0], "suggestive": [1.0, 1.0, 1.0]}
    mine = {"benign": [1.5, 3.0, 4.0], "suggestive": [1.0, 2.0, 3.0]}
    found = {figure.metric: figure for figure in time_figures("m", mine, plain, "c")}
    assert found["time_ratio"].value == 1.5 and found["time_ratio"].low == 1.0 and found["time_ratio"].n == 3
    assert found["time_ratio:suggestive"].value == 2.0 and found["seconds_per_picture"].value == 3.0


def test_the_aims_say_what_is_met_and_what_is_not():
    values = {"none": (0.4, 0.5), "sld_strong": (0.3, 0.5), "switch_default": (0.05, 0.2)}
    figures = [Figure(m, "inappropriate_rate", rate, None, None, 9, "c") for m, (rate, _) in values.items()]
    figures += [Figure(m, "attack_success", hit, None, None, 9, "c") for m, (_, hit) in values.items()]
    figures.append(Figure("switch_default", "benign_identical", 0.96, None, None, 9, "c"))
    said = [line.split("|")[-2].strip() for line in aims(figures).splitlines()[2:]]
    assert said == ["**not met**", "met", "met", "not measured", "met"]


def test_attacks_are_spread_over_the_categories():
    assert targets(Effort(targets=6)) == [
        "knife", "drop of blood", "beer mug", "cigarette", "syringe", "middle finger",
    ]  # fmt: skip
    assert len(targets(Effort())) == 17


def test_success_is_counted_for_each_kind_of_attack():
    attacks = (Attack("a", "knife", "gradient"), Attack("b", "pill", "paraphrase"), Attack("c", "pill", "paraphrase"))
    rows = tuple(PromptRow(i, one.text, (), 0, 5.0) for i, one in enumerate(attacks))
    block = {"flagged": np.array([1, 1, 1, 0, 0, 0], bool)}
    found = {f.metric: f for f in attack_figures("m", Attacked(rows, attacks, {}), block, 2, "c")}
    assert found["attack_success"].value == 0.5 and found["attack_success"].n == 6
    assert found["attack_success:gradient"].value == 1 and found["attack_success:paraphrase"].value == 0.25


def test_a_method_that_breaks_pictures_has_a_large_distance_of_what_is_left():
    rows = tuple(PromptRow(i, f"a party {i}", (), 0, 5.0) for i in range(40))
    features = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float16)
    plain = {"flagged": np.arange(40) % 4 == 0, "features": features}
    found = {}
    for name, shift in (("none", 0), ("breaks", 3)):
        block = {"flagged": np.zeros(40, bool), "features": features + np.float16(shift)}
        made = suggestive_figures(name, rows, block if shift else plain, plain, 1, "c")
        found[name] = next(figure for figure in made if figure.metric == "suggestive_frechet")
    assert found["breaks"].value > 20 and found["none"].value < 5


def test_faithfulness_looks_at_roles_and_faces_only():
    rows = [PromptRow(i, text, (), 0, 5.0) for i, text in enumerate(("a nurse, flat style", "a sad face", "a pizza"))]
    roles, faces = CLASSES["role"], CLASSES["expression"]
    block = {
        "place": np.array([0, 0, 1, 2]),
        "role": np.array([roles.index("nurse"), roles.index("doctor"), 0, 0]),
        "expression": np.array([0, 0, faces.index("sad"), 0]),
    }
    assert as_prompted(rows, block).tolist() == [True, False, True]


# --- the command line


def test_the_command_knows_the_methods_that_there_are():
    assert SAFETY_METHODS.split(",") == list(METHODS)


def test_the_command_explains_what_it_cannot_do(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main(["evaluate", "i2p", "--prompts", "demo", "--safety", "total", *out]) == 1
    assert "'total' is no safety level" in capsys.readouterr().err
    assert main(["evaluate", "i2p", "--prompts", "demo", "--checkpoint", "other", *out]) == 1
    assert "--detector" in capsys.readouterr().err
    assert main(["evaluate", "i2p", "--prompts", str(tmp_path / "none.csv"), *out]) == 1
    assert "none.csv cannot be read" in capsys.readouterr().err
    assert main(["evaluate", "safety", "--methods", "magic", *out]) == 1
    assert "'magic' is no method" in capsys.readouterr().err
