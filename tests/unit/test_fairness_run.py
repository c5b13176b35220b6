"""The fairness measurement end to end with tiny nets: what is drawn stays, shards meet, tables come out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_diffusers import bag_of_words, schedule, tiny_unet

from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import fairness, fairness_drawing
from concept_steer.evaluate.fairness_drawing import Job, Studio, draw_all, draw_block, load_series, path_of, read_block
from concept_steer.evaluate.fairness_methods import METHODS, VALUES
from concept_steer.fairness import Attribute, Value
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")

FAMILY = "custom:24x32"


def tiny_studio() -> Studio:
    parts = Components(tiny_unet("mid only"), schedule(), bag_of_words, decode=lambda x: x[:, :3].tanh())
    return Studio(DiffusersDenoiser(parts))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return tiny_studio()


def vector(seed: int) -> ConceptVector:
    return ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3, FAMILY)


def sets() -> dict[str, Attribute]:
    return {
        name: Attribute(name, {value: Value(vector(i)) for i, value in enumerate(values)})
        for name, values in VALUES.items()
    }


def job(folder, **changes) -> Job:
    vectors = {
        method: {name: {value: vector(9 + i) for i, value in enumerate(values)} for name, values in VALUES.items()}
        for method in ("self_discovery", "difference")
    }
    settings = {
        "roles": ("doctor", "nurse"),
        "templates": ("plain",),
        "attributes": ("gender",),
        "pictures": 5,
        "steps": 2,
        "vectors": vectors,
        "sets": sets(),
    }
    return Job(folder, **{**settings, **changes})


def quiet(text: str) -> None:
    pass


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


def test_every_method_draws_the_same_seeds_and_none_is_the_zero_of_distance(tmp_path, studio):
    mine = job(tmp_path, attributes=("both",))
    draw_all(mine, studio, say=quiet)
    plain = load_series(mine, "none", "", "quota", "plain", "doctor")
    assert plain["pictures"].tolist() == [0, 1, 2, 3, 4] and plain["features"].shape == (5, 480)
    for method in METHODS:
        if method == "none":
            continue
        found = load_series(mine, method, "both", "quota", "plain", "doctor")
        assert found["pictures"].tolist() == [0, 1, 2, 3, 4]
        assert (found["pixel_distance"] > 0).all() and (found["pixel_distance"] <= 1).all(), method
        assert set(found["wanted_gender"].tolist()) == {0, 1}
    still = draw_block(
        job(tmp_path, sets=_without_effect()), studio, "fair_sampling", "gender", "quota", "plain", "doctor", range(5)
    )
    assert (still["pixel_distance"] == 0).all()
    assert still["rows"] == 2 * 2


def _without_effect() -> dict[str, Attribute]:
    return {
        name: Attribute(name, {label: Value(value.vector, strength=0.0) for label, value in made.values.items()})
        for name, made in sets().items()
    }


def test_rows_are_counted_as_each_method_spends_them(tmp_path, studio):
    mine = job(tmp_path, roles=("doctor",), pictures=4)
    draw_all(mine, studio, say=quiet)
    rows = {
        method: float(
            load_series(mine, method, "" if method == "none" else "gender", "quota", "plain", "doctor")["rows"][0]
        )
        for method in METHODS
    }
    assert rows.pop("fair_diffusion") == 2 * 4  # prompt, empty prompt, one edit towards and one away, two steps
    assert set(rows.values()) == {2 * 2}


def test_a_killed_run_goes_on_where_it_was(tmp_path, studio, monkeypatch):
    whole = job(tmp_path / "whole")
    made = draw_all(whole, studio, say=quiet)
    killed = job(tmp_path / "killed")
    real, count = fairness_drawing.write_block, []

    def dies(path, block):
        if len(count) == 7:
            raise KeyboardInterrupt
        count.append(path)
        real(path, block)

    monkeypatch.setattr(fairness_drawing, "write_block", dies)
    with pytest.raises(KeyboardInterrupt):
        draw_all(killed, studio, say=quiet)
    monkeypatch.setattr(fairness_drawing, "write_block", real)
    assert draw_all(killed, studio, say=quiet) == made - 7
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert draw_all(killed, studio, say=quiet) == 0


def test_shards_share_the_work_and_meet_in_the_same_files(tmp_path, studio):
    alone, parts = job(tmp_path / "alone"), job(tmp_path / "parts")
    made = draw_all(alone, studio, say=quiet)
    shares = [draw_all(parts, studio, shard=(i, 2), say=quiet) for i in range(2)]
    assert sum(shares) == made and min(shares) > 0
    assert files(tmp_path / "parts") == files(tmp_path / "alone")


def test_random_draws_take_from_the_quota_what_is_assigned_alike(tmp_path, studio):
    mine = job(tmp_path, roles=("doctor",), pictures=12)
    draw_all(mine, studio, say=quiet)
    extra = read_block(path_of(mine, "fair_sampling", "gender", "random", "plain", "doctor", range(12)))
    quota, random = (
        load_series(mine, "fair_sampling", "gender", mode, "plain", "doctor") for mode in ("quota", "random")
    )
    assigned = fairness_drawing.wanted(mine, "gender", "plain", "doctor", range(12), "random")
    assert [VALUES["gender"][i] for i in random["wanted_gender"]] == [values["gender"] for values in assigned]
    same = random["wanted_gender"] == quota["wanted_gender"]
    assert extra["pictures"].tolist() == np.flatnonzero(~same).tolist()
    assert np.array_equal(random["features"][same], quota["features"][same])
    direct = draw_block(mine, studio, "fair_sampling", "gender", "random", "plain", "doctor", range(12))
    assert np.array_equal(direct["pictures"], extra["pictures"])


def test_pictures_added_later_leave_the_first_ones_as_they_were(tmp_path):
    few, many = job(tmp_path), job(tmp_path, pictures=9)
    first = fairness_drawing.wanted(few, "both", "plain", "doctor", range(5), "quota")
    assert fairness_drawing.wanted(many, "both", "plain", "doctor", range(9), "quota")[:5] == first
    assert (
        fairness_drawing.wanted(many, "both", "plain", "doctor", range(5, 9), "quota")
        == fairness_drawing.wanted(many, "both", "plain", "doctor", range(9), "quota")[5:]
    )


def test_a_damaged_or_missing_block_is_named(tmp_path, studio):
    mine = job(tmp_path, roles=("doctor",), pictures=2, methods=("none",))
    with pytest.raises(ConceptSteerError, match="not drawn yet"):
        load_series(mine, "none", "", "quota", "plain", "doctor")
    draw_all(mine, studio, say=quiet)
    path = path_of(mine, "none", "", "quota", "plain", "doctor", range(2))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConceptSteerError, match="damaged"):
        load_series(mine, "none", "", "quota", "plain", "doctor")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """`fairness.run` on a tiny net, its vectors there already; how often a model was loaded."""
    loads = []

    def load(checkpoint, dtype="float32"):
        loads.append(checkpoint)
        return tiny_studio().denoiser

    monkeypatch.setattr(fairness, "load_model", load)
    for name, made in sets().items():
        made.save(tmp_path / "vectors" / f"{name}.attribute.safetensors")
        for value in VALUES[name]:
            for method in ("self_discovery", "difference"):
                vector(5).save(tmp_path / "vectors" / f"{method}-{name}-{value}.safetensors")
    settings = {"roles": ["doctor", "nurse"], "templates": ["plain"], "pictures": 3, "steps": 2, "say": quiet}
    return tmp_path, loads, settings


def test_a_run_writes_figures_tables_plots_and_sheets_and_a_second_one_the_same(small):
    out, _, settings = small
    written = {path.name for path in fairness.run(out, **settings)}
    plots = {"fairness-gender.png", "fairness-tone.png"}
    sheets = {f"fairness-sheet-{name}.png" for name in ("gender", "tone", "both")}
    assert written == {"fairness.json", "fairness.md"} | plots | sheets
    rows = json.loads((out / "fairness.json").read_text(encoding="utf-8"))
    assert {tuple(row) for row in rows} == {("method", "metric", "value", "low", "high", "n", "command")}
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    wanted = ["delta_gender", "role_faithfulness", "picture_distance", "frechet", "unet_rows_per_picture", "time_ratio"]
    for method in METHODS:
        assert all((method, name) in found for name in wanted if method != "none" or name != "picture_distance")
    for name in ("delta_gender_random", "delta_skin_tone_random", "delta_joint_random", "gate_false_alarms"):
        assert ("fair_sampling", name) in found
    assert ("perfect sampler", "delta_gender_random") in found
    assert found["none", "time_ratio"] == 1
    text = (out / "fairness.md").read_text(encoding="utf-8")
    assert "N = 3 pictures" in text and "| fair_sampling |" in text
    before = files(out)
    fairness.run(out, **settings)
    assert files(out) == before
    again = json.loads((out / "fairness.json").read_text(encoding="utf-8"))
    assert again == rows


def test_a_shard_draws_its_part_only_and_needs_the_vectors(small):
    out, _, settings = small
    assert fairness.run(out, shard=(0, 2), **settings) == []
    assert files(out) and not (out / "fairness.json").exists()
    (out / "vectors" / "difference-gender-man.safetensors").unlink()
    with pytest.raises(ConceptSteerError, match="--learn-only"):
        fairness.run(out, shard=(1, 2), **settings)


def test_other_settings_do_not_mix_with_what_is_there(small):
    out, loads, settings = small
    assert fairness.run(out, learn_only=True, **settings) == []
    assert loads == []
    with pytest.raises(ConceptSteerError, match="steps = 2, now it is 3"):
        fairness.run(out, **{**settings, "steps": 3})
