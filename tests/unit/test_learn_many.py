"""Many concepts in one run: the file that names them, going on after a failure or a kill, several processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_diffusers import tiny_denoiser, tiny_sd

from concept_steer import ConceptVector
from concept_steer.cli import main
from concept_steer.errors import LearnError, VectorFileError
from concept_steer.learn.concept_file import method_options
from concept_steer.learn.many import Concept, learn_many, read_concepts, split, strips

pytest.importorskip("diffusers")
ROLES = ("a pilot", "a cook")
SMALL = {"steps": 8, "batch": 6, "trajectories": 6, "sample_steps": 2}


def concept(word: str, roles=ROLES, method: str = "score", **options) -> Concept:
    given = {**SMALL, **options} if method == "score" else {"seeds": 2, **options}
    return Concept(word, tuple((role, f"{role} {word}") for role in roles), method, given)


@pytest.fixture
def denoiser():
    return tiny_denoiser("sd")


def bits(folder: Path) -> dict[str, str]:
    """The tensors of a folder by name, as hashes."""
    paths = sorted(folder.glob("*.safetensors"))
    return {p.stem: hashlib.sha256(ConceptVector.load(p).tensor.numpy().tobytes()).hexdigest() for p in paths}


def count(outcomes) -> list[tuple[str, str]]:
    return [(outcome.name, outcome.status) for outcome in outcomes]


# --- learning


def test_each_concept_is_saved_with_its_report_and_what_it_shared(denoiser, tmp_path):
    before = denoiser.cost.snapshot()
    outcomes = learn_many(denoiser, [concept("old"), concept("tall"), concept("old2", method="difference")], tmp_path)
    assert count(outcomes) == [("old", "learned"), ("tall", "learned"), ("old2", "learned")]
    assert outcomes[0].saved_rows == 0 < outcomes[1].saved_rows
    assert sum(o.report["unet_rows"] for o in outcomes) == denoiser.cost.since(before).unet_rows
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{name}.{end}" for name in ("old", "old2", "tall") for end in ("json", "safetensors")
    ]
    report = json.loads((tmp_path / "tall.json").read_text())
    assert report["settings"]["options"]["rate"] == method_options("score")["rate"]  # also what was left at its default
    assert report["report"]["fingerprint"] == ConceptVector.load(tmp_path / "tall.safetensors").fingerprint


def test_what_is_there_already_is_left_alone(denoiser, tmp_path):
    concepts = [concept("old"), concept("tall")]
    learn_many(denoiser, concepts[:1], tmp_path)
    written = (tmp_path / "old.safetensors").stat().st_mtime_ns
    assert count(learn_many(denoiser, concepts, tmp_path)) == [("old", "already there"), ("tall", "learned")]
    assert (tmp_path / "old.safetensors").stat().st_mtime_ns == written


def test_the_same_name_with_other_settings_is_an_error_before_anything_is_learned(denoiser, tmp_path):
    learn_many(denoiser, [concept("old")], tmp_path)
    before, rows = bits(tmp_path), denoiser.cost.unet_rows
    changed = [concept("tall"), concept("old", seed=1)]
    with pytest.raises(VectorFileError, match="exists already, but does not come from the prompts, settings"):
        learn_many(denoiser, changed, tmp_path)
    assert (bits(tmp_path), denoiser.cost.unet_rows) == (before, rows)
    assert count(learn_many(denoiser, changed, tmp_path, overwrite=True))[1] == ("old", "learned")
    assert bits(tmp_path)["old"] != before["old"]


def test_somebody_elses_report_is_not_overwritten(denoiser, tmp_path):
    (tmp_path / "old.json").write_text('{"mine": 1}')
    with pytest.raises(VectorFileError, match=r"old\.json exists already"):
        learn_many(denoiser, [concept("old")], tmp_path)


def test_a_report_whose_vector_was_never_written_does_not_count(denoiser, tmp_path):
    learn_many(denoiser, [concept("old")], tmp_path)
    before = bits(tmp_path)
    (tmp_path / "old.safetensors").unlink()
    assert count(learn_many(denoiser, [concept("old")], tmp_path)) == [("old", "learned")]
    assert bits(tmp_path) == before


def test_a_failing_concept_does_not_stop_the_others(denoiser, tmp_path):
    nothing = Concept("nothing", (("a b", "b a"),), "score", SMALL)  # a bag of words cannot tell the two apart
    outcomes = learn_many(denoiser, [nothing, concept("old"), concept("tall")], tmp_path)
    assert count(outcomes) == [("nothing", "failed"), ("old", "learned"), ("tall", "learned")]
    assert "nothing to learn" in outcomes[0].error
    assert not (tmp_path / "nothing.safetensors").exists()


def test_nan_half_way_keeps_the_last_good_vector_but_does_not_count_as_learned(denoiser, tmp_path):
    real, calls = denoiser.from_h, [0]

    def spoiled(state):
        calls[0] += torch.is_grad_enabled()
        return real(state) * (float("nan") if calls[0] > 4 and torch.is_grad_enabled() else 1.0)

    denoiser.from_h = spoiled
    outcomes = learn_many(denoiser, [concept("old")], tmp_path)
    assert count(outcomes) == [("old", "unfinished")]
    assert "NaN" in outcomes[0].error
    assert "NaN" in ConceptVector.load(tmp_path / "old.safetensors").info["unfinished"]
    denoiser.from_h = real
    assert count(learn_many(denoiser, [concept("old")], tmp_path)) == [("old", "learned")]


def test_an_interrupted_run_keeps_the_best_so_far_and_the_next_one_ends_where_it_would_have(denoiser, tmp_path):
    concepts = [concept("old"), concept("tall")]
    learn_many(denoiser, concepts, tmp_path / "whole")
    asked = []

    def progress(name, done, total):
        if total == SMALL["steps"] and done == 5:  # in the midst of learning, not of the trajectories
            asked.append(name)

    broken = tmp_path / "broken"
    outcomes = learn_many(denoiser, concepts, broken, progress=progress, stop=lambda: bool(asked))
    assert count(outcomes) == [("old", "unfinished")]
    assert "request" in ConceptVector.load(broken / "old.safetensors").info["unfinished"]
    assert count(learn_many(denoiser, concepts, broken)) == [("old", "learned"), ("tall", "learned")]
    assert bits(broken) == bits(tmp_path / "whole")
    assert not [p for p in broken.iterdir() if p.suffix == ".checkpoint"]


def test_two_shares_together_are_the_bits_of_one_run(denoiser, tmp_path):
    concepts = [concept("old"), concept("tall"), concept("red"), concept("small", roles=("a cat",))]
    learn_many(denoiser, concepts, tmp_path / "one")
    outcomes = [learn_many(denoiser, concepts, tmp_path / "two", rank=rank, processes=2) for rank in (0, 1)]
    assert all(outcomes)
    assert bits(tmp_path / "one") == bits(tmp_path / "two")


def test_the_strips_show_every_vector_in_a_row(tmp_path, denoiser):
    pipe = tiny_sd(tmp_path / "parts")
    from concept_steer.hosts.diffusers import DiffusersDenoiser

    model = DiffusersDenoiser(pipe)
    vector = ConceptVector(torch.ones(32), model.family, title="old")
    one = strips(model, [(concept("old"), vector)], steps=1)
    two = strips(model, [(concept("old"), vector), (concept("tall"), vector)], steps=1)
    assert two.width == one.width > 6 * 128
    assert two.height > one.height + 128


# --- splitting


def test_every_concept_is_in_exactly_one_share_and_those_that_share_stay_together():
    concepts = [concept(f"{word}{n}", roles=(role,)) for n, role in enumerate(ROLES) for word in ("old", "tall", "red")]
    mixed = concepts[::2] + concepts[1::2]
    shares = split(mixed, 2)
    assert [{c.pairs[0][0] for c in share} for share in shares] == [{ROLES[0]}, {ROLES[1]}]
    assert sorted(c.name for share in shares for c in share) == sorted(c.name for c in concepts)
    assert [[c.name for c in share] for share in split(mixed, 1)] == [
        ["old0", "red0", "tall0", "tall1", "old1", "red1"]
    ]


def test_a_single_group_is_divided_evenly():
    concepts = [concept(f"c{n}") for n in range(7)]
    assert sorted(len(share) for share in split(concepts, 3)) == [2, 2, 3]
    assert sorted(len(share) for share in split(concepts[:1], 3)) == [0, 0, 1]


def test_a_concept_that_costs_more_counts_for_more():
    concepts = [concept("long", steps=300), *(concept(f"c{n}", roles=("a cat",)) for n in range(3))]
    assert [[c.name for c in share] for share in split(concepts, 2)] == [["long"], ["c0", "c1", "c2"]]


# --- the file


def written(tmp_path: Path, text: str, suffix: str = "yaml") -> Path:
    if suffix == "yaml":
        pytest.importorskip("yaml")
    path = tmp_path / f"people.{suffix}"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_json_say_the_same(tmp_path):
    yaml = """
defaults: {steps: 50, rate: 1, method: score}
concepts:
  woman: {pairs: [[a doctor, a woman doctor], [a judge, a woman judge]]}
  smiling: {neutral: a face, positive: a smiling face, method: difference, timesteps: [0, 0.5]}
"""
    concepts = read_concepts(written(tmp_path, yaml))
    assert concepts == [
        Concept(
            "woman",
            (("a doctor", "a woman doctor"), ("a judge", "a woman judge")),
            "score",
            {"steps": 50, "rate": 1.0},
        ),
        Concept("smiling", (("a face", "a smiling face"),), "difference", {"timesteps": (0.0, 0.5)}),
    ]
    import yaml as reader

    assert read_concepts(written(tmp_path, json.dumps(reader.safe_load(yaml)), "json")) == concepts


PAIR = "neutral: a, positive: b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("concepts: {}", "names no concepts"),
        ("- woman", "names no concepts"),
        (f"concept: {{w: {{{PAIR}}}}}", "names no concepts"),
        (f"steps: 3\nconcepts: {{w: {{{PAIR}}}}}", "'steps' beside 'concepts'"),
        ("concepts: {w: {pairs: [[a, b, c]]}}", "concept 'w': a pair is"),
        ("concepts: {w: {pairs: [[a, 3]]}}", "concept 'w': a pair is"),
        ("concepts: {w: {pairs: [[a, a]]}}", "concept 'w': Both prompts"),
        ("concepts: {w: {pairs: []}}", "concept 'w': Learning needs"),
        ("concepts: {w: {neutral: a}}", "concept 'w': give 'pairs', or both"),
        (f"concepts: {{w: {{pairs: [[a, b]], {PAIR}}}}}", "concept 'w': give 'pairs', or both"),
        ("concepts: {w: woman}", "concept 'w': expected 'pairs'"),
        (f"concepts: {{w: {{{PAIR}, stepps: 3}}}}", "concept 'w': 'stepps' is no setting of score"),
        (f"concepts: {{w: {{{PAIR}, against: [x]}}}}", "'against' is no setting"),
        (f"concepts: {{w: {{{PAIR}, steps: many}}}}", "steps is 'many'; expected a whole number"),
        (f"concepts: {{w: {{{PAIR}, steps: true}}}}", "steps is True; expected a whole number"),
        (f"concepts: {{w: {{{PAIR}, steps: 0}}}}", "from 1 upwards"),
        (f"concepts: {{w: {{{PAIR}, rate: 1e-1}}}}", "rate has '1e-1'; expected a number such as 0.1"),
        (f"concepts: {{w: {{{PAIR}, rate: .nan}}}}", "rate has nan"),
        (f"concepts: {{w: {{{PAIR}, start: nothing}}}}", "expected one of difference, zero"),
        (f"concepts: {{w: {{{PAIR}, method: magic}}}}", "the method is 'magic'"),
        (f"concepts: {{w: {{{PAIR}, method: difference, steps: 3}}}}", "'steps' is no setting of difference"),
        (f"defaults: {{seeds: 3}}\nconcepts: {{w: {{{PAIR}}}}}", "defaults: 'seeds' is no setting of score"),
        (f"defaults: {{neutral: a}}\nconcepts: {{w: {{{PAIR}}}}}", "defaults: expected settings"),
        (f"concepts: {{w: {{{PAIR}}}, w: {{{PAIR}}}}}", "'w' is given twice"),
        (f"concepts: {{w: {{{PAIR}}}, W: {{{PAIR}}}}}", "one file on many systems"),
        (f"concepts: {{summary: {{{PAIR}}}}}", "cannot be named 'summary'"),
        (f"concepts: {{../w: {{{PAIR}}}}}", "it is a path"),
        (f"concepts: {{no: {{{PAIR}}}}}", "put it into quotes"),
        ("concepts: {w: [", "cannot be understood"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(LearnError) as error:
        read_concepts(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_list_of_concepts_is_refused(tmp_path):
    for name, said in (("a.txt", "must end in"), ("none.json", "cannot be read"), ("none.yaml", "cannot be read")):
        with pytest.raises(LearnError, match=said):
            read_concepts(tmp_path / name)
    with pytest.raises(LearnError, match="'w' is given twice"):
        read_concepts(written(tmp_path, '{"concepts": {"w": {}, "w": {}}}', "json"))


def test_without_pyyaml_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "people.yaml"
    path.write_text("concepts: {}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(LearnError, match=r"concept-steer\[many\]"):
        read_concepts(path)


# --- the command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd(folder / "parts").save_pretrained(folder / "sd")
    return str(folder / "sd")


@pytest.fixture
def people(tmp_path) -> Path:
    entries = {word: {"pairs": [[role, f"{role} {word}"] for role in ROLES]} for word in ("old", "tall", "red")}
    path = tmp_path / "people.json"
    path.write_text(json.dumps({"defaults": SMALL, "concepts": entries}))
    return path


def test_the_command_learns_all_tells_the_rows_saved_and_draws_strips(checkpoint, people, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["learn", "--concepts", str(people), "--out", str(out), "--checkpoint", checkpoint, "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    rows, alone = summary["unet_rows"], summary["unet_rows_one_by_one"]
    assert f"{rows:,.0f} UNet rows instead of {alone:,.0f} one by one" in said
    assert rows < alone
    assert [c["name"] for c in summary["concepts"]] == ["old", "tall", "red"]
    assert (out / "strips.png").exists()
    assert main([*command, "--no-preview"]) == 0
    assert capsys.readouterr().out.count("already there") == 3


def test_a_failed_concept_gives_exit_code_1_and_is_named_at_the_end(checkpoint, tmp_path, capsys):
    path = tmp_path / "people.json"
    good, bad = ({"neutral": "a", "positive": p} for p in ("a b", "A"))  # the tokenizer does not know capitals
    path.write_text(json.dumps({"defaults": SMALL, "concepts": {"good": good, "bad": bad}}))
    out = tmp_path / "out"
    options = ["--checkpoint", checkpoint, "--device", "cpu", "--no-preview"]
    assert main(["learn", "--concepts", str(path), "--out", str(out), *options]) == 1
    assert "bad failed" in capsys.readouterr().err
    assert list(bits(out)) == ["good"]


@pytest.mark.parametrize(
    "wrong", [["--pair", "a", "b"], ["--seed", "3"], ["--method", "score"], ["--spatial"], ["--steps", "5"]]
)
def test_what_belongs_in_the_file_is_refused_beside_it(people, wrong, capsys):
    with pytest.raises(SystemExit) as left:
        main(["learn", "--concepts", str(people), "--out", "x", *wrong])
    assert left.value.code == 2
    assert "name it in the file" in capsys.readouterr().err


def test_the_folder_must_be_named(people, capsys):
    with pytest.raises(SystemExit):
        main(["learn", "--concepts", str(people)])
    assert "--out DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_give_the_bits_of_one(checkpoint, people, tmp_path):
    pytest.importorskip("accelerate")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
    options = ["--concepts", str(people), "--checkpoint", checkpoint, "--device", "cpu", "--no-preview"]
    said = {}
    for name, start in (("one", []), ("two", launch)):
        command = [sys.executable, "-m", *start, "concept_steer", "learn", *options, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert "on process 1 of 2" in said["two"]
    assert "on process 2 of 2" in said["two"]
    assert said["two"].count("UNet rows instead of") == 1  # one process speaks for all
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    assert len(bits(tmp_path / "two")) == 3
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert [c["status"] for c in summary["concepts"]] == ["learned"] * 3
