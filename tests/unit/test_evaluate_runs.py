"""The measurements end to end on the embedded model, with as little of everything as there can be."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")
from concept_steer.demo.job import Studio
from concept_steer.demo.model import MODEL_FILE
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import generality, learning
from concept_steer.evaluate.figures import KEYS
from concept_steer.evaluate.methods import SCALES
from concept_steer.evaluate.tasks import tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL_FILE.is_file(), reason="the embedded model's weights are not there"),
]
METHODS = ("self_discovery", "difference", "score_short")


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture(scope="module")
def measured(studio, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate")
    return out, learn(studio, out)


def learn(studio, out, methods=METHODS):
    return learning.run(
        studio,
        tasks(["woman"]),
        methods,
        seeds=1,
        scale=SCALES["tiny"],
        out=out,
        command="again",
        say=lambda text: None,
    )


def test_learning_writes_a_figure_for_every_method_and_metric(measured):
    out, paths = measured
    assert {path.name for path in paths} == {"learning.json", "learning.md", "learning-effect.png"}
    rows = json.loads((out / "learning.json").read_text(encoding="utf-8"))
    for row in rows:
        assert set(row) == {*KEYS, "concept"} and row["n"] > 0 and row["command"] == "again"
    metrics = {
        "rows_to_reference_effect",
        "rows_to_90_percent",
        "final_effect",
        "seconds_to_learn",
        "rows_total",
        "rows_forward",
        "rows_backward",
    }
    for method in METHODS:
        assert metrics <= {row["metric"] for row in rows if row["method"] == method}
    totals = {row["method"]: row["value"] for row in rows if row["metric"] == "rows_total"}
    assert totals["difference"] == 5.5 * 4 * 8  # its last point: 8 seeds, 4 pairs
    # two pictures of two steps with CFG, four steps of two rows there and back, one batch's encoder for the size of h
    assert totals["self_discovery"] == 2 * 2 * 2 + 4 * (2 + 2) + 2 / 2


def test_a_second_run_learns_and_draws_nothing(measured, studio):
    out, _ = measured
    before = (out / "learning.json").read_bytes()
    cost = studio.denoiser.cost.snapshot()
    learn(studio, out)
    spent = studio.denoiser.cost.since(cost)
    assert (spent.encoder_rows, spent.decoder_rows, spent.backward_rows) == (0, 0, 0)
    assert (out / "learning.json").read_bytes() == before


def test_an_unknown_method_is_refused_by_name(studio, tmp_path):
    with pytest.raises(ConceptSteerError, match="'magic'"):
        learn(studio, tmp_path, ("magic",))


def test_generality_measures_every_condition_and_goes_on_where_it_was(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(generality, "QUICK", {"steps": 2, "trajectories": 4, "sample_steps": 2})
    small = [c for c in generality.conditions() if c.group in ("learned on", "sampler") or c.name == "96 px"]
    quick = [generality.replace(c, drawing=generality.replace(c.drawing, steps=3)) for c in small]
    monkeypatch.setattr(generality, "conditions", lambda: quick)
    monkeypatch.setattr(generality, "QUICK_ABLATIONS", ("default", "one pair"))

    def run():
        options = {"seeds": 1, "roles": 2, "judged": 1, "quick": True}
        both = tasks(["woman", "dark skin"])
        return generality.run(studio, both, **options, out=tmp_path, command="c", say=lambda text: None)

    run()
    rows = json.loads((tmp_path / "generality.json").read_text(encoding="utf-8"))
    groups = {"learned on", "sampler", "size", "strength", "together"}
    assert {row["group"] for row in rows if "group" in row} == groups
    by_strength = [r["condition"] for r in rows if r["metric"] == "probability" and r["concept"] == "woman"]
    assert by_strength == ["-1", "-0.5", "0", "0.5", "1", "1.5"]
    sums = [r for r in rows if r["concept"] == "woman + dark skin" and r["metric"] == "share_both"]
    assert [r["condition"] for r in sums] == ["none", "first", "second", "sum"] and all(r["n"] == 2 for r in sums)
    assert {row["ablation"] for row in rows if "ablation" in row} == {"default", "one pair"}
    assert all(set(KEYS) <= set(row) for row in rows)
    cost = studio.denoiser.cost.snapshot()
    run()
    assert studio.denoiser.cost.since(cost).encoder_rows == 0
