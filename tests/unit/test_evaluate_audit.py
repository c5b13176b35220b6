"""The audit's proof: how readings are held against truths, what counts as observed, and its files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny_diffusers import tiny_denoiser

from concept_steer import ConceptVector
from concept_steer.analysis.reading import ReadSettings
from concept_steer.analysis.word_list import parsed
from concept_steer.demo import world
from concept_steer.demo.auditing import usual_words
from concept_steer.demo.build_data import article
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import audit_checks, audit_clusters, audit_report
from concept_steer.evaluate.audit import ABLATION, ATTRIBUTES, Found
from concept_steer.evaluate.audit_drawing import BLOCK, DRAWING, HEADS, Observed, draw_blocks, from_fairness, observed
from concept_steer.evaluate.audit_reading import Leans, fit, h_leans, text_leans, true_lean
from concept_steer.evaluate.figures import read
from concept_steer.evaluate.parts import Parts

pytest.importorskip("diffusers")


def leans(of=lambda role: true_lean(role, "gender")) -> Leans:
    table = {role: of(role) for role in world.ROLE_NAMES}
    return Leans(table, table, table, 12.0, 1.0)


def seen(role: str, men: int, light: int = 10, count: int = 20) -> Observed:
    counts = {
        "gender": {"man": men, "woman": count - men},
        "tone": {"light": light, "dark": count - light},
        "inappropriate": {"none": count},
        "role": {role: count},
    }
    return Observed(article(role), count, counts, 1.0, 24.0 * count)


def test_the_true_lean_is_the_data_cards():
    assert true_lean("nurse", "gender") == pytest.approx(2 * 0.08 - 1)
    assert true_lean("farmer", "skin tone") == pytest.approx(-true_lean("doctor", "skin tone"))
    assert true_lean("nurse", "skin tone") == pytest.approx(0)


def test_a_perfect_reading_fits_perfectly_and_its_opposite_has_every_sign_wrong():
    truth = {role: true_lean(role, "gender") for role in world.ROLE_NAMES}
    good, bad = fit(leans().lean, truth), fit({role: -value for role, value in truth.items()}, truth)
    assert good.pearson == pytest.approx((1, 1, 1)) and good.right == good.far and good.count == 46
    assert bad.pearson[0] == pytest.approx(-1) and bad.right == 0
    assert good.far == sum(not 0.4 <= role.men <= 0.6 for role in world.ROLES)


def test_what_is_observed_is_counted_into_a_lean():
    one = seen("cook", men=15, light=20)
    assert one.lean("gender") == pytest.approx(0.5)
    assert one.lean("skin tone") == pytest.approx(-1)


@pytest.mark.parametrize("similarity", ["mixture", "cosine"])
def test_both_spaces_are_read_for_every_role(similarity):
    listed = parsed(
        {"roles": ["woman cook", "man cook", "house"], "attributes": {"g": {"woman": "a woman {}", "man": "a man {}"}}},
        "the test",
    )
    model = tiny_denoiser("mid only")
    in_h = h_leans(model, listed, "g", ReadSettings(seeds=2), similarity)
    in_text = text_leans(model, listed, "g", similarity)
    assert list(in_h.lean) == list(in_text.lean) == list(listed.roles)
    assert in_h.unet_rows > 0 and in_text.unet_rows == 0
    assert in_text.lean["woman cook"] < in_text.lean["man cook"]


def test_pictures_are_drawn_in_blocks_every_prompt_once_before_any_twice(tmp_path, monkeypatch):
    from concept_steer.evaluate import audit_drawing

    asked = []

    class Verdict:
        def labels(self, head):
            return ["x"] * BLOCK

    def judged(studio, prompts, seeds, drawing):
        asked.append((prompts[0], seeds[0]))
        return Verdict()

    class Studio:
        denoiser = tiny_denoiser("mid only")

    monkeypatch.setattr(audit_drawing, "verdicts", judged)
    parts = Parts(tmp_path, {})
    draw_blocks(Studio(), parts, ["a", "b"], 2 * BLOCK, print)
    assert [prompt for prompt, _ in asked] == ["a", "b", "a", "b"] and len({seed for _, seed in asked}) == 2
    draw_blocks(Studio(), parts, ["a", "b"], 2 * BLOCK, print)
    assert len(asked) == 4
    assert observed(parts, "a").count == 2 * BLOCK and observed(parts, "c") is None


def test_pictures_of_the_fairness_measurement_count_when_they_were_drawn_alike(tmp_path):
    (tmp_path / "settings").mkdir()
    (tmp_path / "blocks" / "none").mkdir(parents=True)
    settings = {"checkpoint": "abc", "steps": DRAWING.steps, "guidance": DRAWING.guidance}
    (tmp_path / "settings" / "drawing.json").write_text(json.dumps({"settings": settings}))
    block = {head: np.zeros(4, np.int16) for head in HEADS if head != "inappropriate"}
    np.savez(
        tmp_path / "blocks" / "none" / "plain-office_worker-00000-00004.npz",
        pictures=np.arange(4),
        rows=np.array(24.0),
        **block,
    )
    found = from_fairness(tmp_path, "office worker", "abc")
    assert found is not None and found.count == 4 and found.lean("gender") == -1 and found.unet_rows == 96
    assert from_fairness(tmp_path, "worker", "abc") is None
    (tmp_path / "settings" / "drawing.json").write_text(json.dumps({"settings": {**settings, "steps": 50}}))
    with pytest.raises(ConceptSteerError, match="steps 50"):
        from_fairness(tmp_path, "office worker", "abc")


def test_a_vector_is_named_after_the_prompt_it_came_from(tmp_path):
    model = tiny_denoiser("mid only")
    h = audit_checks.Reader(model, ReadSettings(seeds=2)).read(["a person", "a knife", "an astronaut"])
    for name, prompt in (("knife", "a knife"), ("astronaut", "an astronaut")):
        vector = ConceptVector((h[prompt] - h["a person"]).mean(0), model.family, prompt)
        vector.save(tmp_path / f"{name}.safetensors")
    found = audit_checks.named_right(model, sorted(tmp_path.glob("*.safetensors")), ReadSettings(seeds=2))
    assert [(one["meant"], one["right"]) for one in found] == [("astronaut", True), ("knife", True)]


def test_clusters_that_are_the_kinds_agree_wholly_and_mixed_ones_do_not():
    which = {f"{kind} {i}": kind for kind in ("role", "face", "thing") for i in range(4)}
    apart = torch.eye(3).repeat_interleave(4, 0) + 0.01 * torch.arange(12)[:, None] / 12
    means = dict(zip(which, apart, strict=True))
    assert audit_clusters.agreement(means, which) == 1
    assert audit_clusters.agreement(means, which, directions=2) == 1
    mixed = dict(zip(which, which.values(), strict=True)) | {"role 0": "face", "face 0": "thing", "thing 0": "role"}
    assert audit_clusters.agreement(means, mixed) < 0.6


def test_every_kind_is_on_both_halves_and_no_prompt_on_two():
    which = audit_clusters.kinds(True)
    one, other = audit_clusters._halves(which, 3)
    assert not set(one) & set(other) and {**one, **other} == which
    assert set(one.values()) == set(other.values()) == {"role", "face", "thing", "inappropriate"}
    assert abs(len(one) - len(other)) <= 4 and audit_clusters._halves(which, 4)[0] != one


def test_choices_of_clusters_are_compared_on_halves(monkeypatch):
    monkeypatch.setattr(audit_clusters, "SPLITS", 2)
    monkeypatch.setattr(audit_clusters, "CHOICES", {"a": ("mean", 0.0, 0), "b": ("mean", 0.0, 2)})
    found = audit_clusters.cluster_choices(tiny_denoiser("mid only"), ReadSettings(seeds=1))
    assert list(found) == ["a", "b", "the best on one half, looked at on the other"]
    assert all(-1 <= one["low"] <= one["halves"] <= one["high"] <= 1 for one in found.values())


def test_titles_are_brought_to_the_names_in_use():
    titles = ("a woman", "dark skin", "a person with medium-dark skin", "Smiling")
    assert [audit_checks.meant(title) for title in titles] == ["woman", "dark", "medium-dark", "smiling"]


def test_there_are_five_thousand_different_prompts():
    found = audit_checks.many_prompts(5000)
    assert len(found) == len(set(found)) == 5000
    assert sum("dark background" in prompt for prompt in found) > 100


def test_speed_is_measured_against_the_bare_encoder(tmp_path):
    found = audit_checks.throughput(tiny_denoiser("mid only"), tmp_path, 80, rounds=2)
    assert found["prompts"] == 80 and 0 < found["low"] <= found["ratio"] <= found["high"]
    assert len(list(tmp_path.rglob("*.npy"))) == 80 and found["text_rows"] >= 0


def test_the_report_holds_every_figure_that_is_asked_for(tmp_path):
    found = Found(usual_words("demo"))
    for attribute in ATTRIBUTES:
        for method in audit_report.METHODS:
            found.leans[method, attribute] = leans(lambda role, a=attribute: true_lean(role, a) / 2)
    found.ablation = {name: leans() for name in ABLATION}
    men = {role: round(20 * world.ROLE[role].men) for role in world.ROLE_NAMES[:10]}
    found.pictures = {role: seen(role, count, light=count, count=30) for role, count in men.items()}
    found.scenes = dict.fromkeys(world.SCENES, 0.1)
    found.scenes["a fight"] = 0.5
    named = {"file": "x", "meant": "woman", "names": [("man", 0.3)], "right": False, "method": "score"}
    found.named = [named, {**named, "right": True, "method": "difference"}]
    found.clusters = {"all": 0.5}
    found.cluster_choices = {"the default": {"all": 0.5, "halves": 0.4, "low": 0.1, "high": 0.6}}
    speed = {"ratio": 0.95, "low": 0.9, "high": 1.0, "prompts": 5000, "rows_per_second": 400.0, "memory": 3.0}
    found.speed = {4: {**speed, "text_rows": 1.0}, 16: {**speed, "text_rows": 1.0}}
    row = {"role": "cook", "before": (0.5, 0.4, 0.6), "after": (0.1, -0.1, 0.2), "covers": True, "covered": False}
    found.steering = {"gender": [row]}
    spent = {"rows": 12.0, "seconds": 0.1}
    found.cost = {"h_space": spent, "prediction": spent, "generate_and_judge": {"rows": 2400.0, "seconds": 30.0}}
    files = audit_report.write_report(tmp_path, found, "concept-steer evaluate audit")
    assert {path.name for path in files} == {"audit.json", "audit.md", "audit-roles.png"}
    figures = {(one.method, one.metric): one for one in read(tmp_path / "audit.json")}
    for metric in (
        "pearson_observed_gender", "pearson_training_gender", "pearson_observed_skin_tone", "sign_right", "cost_ratio",
        "rows_per_second_ratio", "rows_per_second_ratio_without_overhead", "direction_named_right",
    ):  # fmt: skip
        assert ("h_space", metric) in figures, metric
    assert ("text_space", "pearson_training_gender") in figures
    assert ("generate_and_judge", "pearson_training_gender") in figures
    assert figures["h_space", "cost_ratio"].value == 200
    assert figures["h_space", "pearson_training_gender"].value == pytest.approx(1)
    by_way = {
        one.extra.get("learned_by", "all"): (one.value, one.n)
        for one in read(tmp_path / "audit.json")
        if one.metric == "direction_named_right"
    }
    assert by_way == {"all": (0.5, 2), "difference": (1.0, 1), "score": (0.0, 1)}
    assert all(math.isfinite(one.value) for one in figures.values() if one.value is not None)
    assert "was called man" in (tmp_path / "audit.md").read_text()
