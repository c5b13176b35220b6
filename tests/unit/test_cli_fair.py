"""`concept-steer fair` on a tiny real diffusers folder: what it writes, reuses and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tiny_diffusers import tiny_sd

from concept_steer import ConceptVector
from concept_steer.cli import fair, main
from concept_steer.cli.output import SETTINGS_KEY
from concept_steer.fairness import Attribute
from concept_steer.fairness.assignment import MODES
from concept_steer.fairness.learning import METHODS

pytest.importorskip("diffusers")
AGE = ("--learn", "age", "young=a young {}", "old=an old {}|an elderly {}")
QUICK = ("--method", "difference", "--steps", "2", "--count", "4", "--role", "pilot", "--role", "cook", "--role", "elf")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd(folder / "parts").save_pretrained(folder / "sd")
    return str(folder / "sd")


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """An empty library and an empty working folder, and no other."""
    monkeypatch.setenv("CONCEPT_STEER_VECTORS", str(tmp_path / "library"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "library"


@pytest.fixture
def run(checkpoint):
    return lambda *args: main(["fair", "--checkpoint", checkpoint, *QUICK, *map(str, args)])


def refused(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_choices_are_those_of_the_package():
    assert fair.MODES == MODES and fair.METHODS == METHODS


def test_a_run_writes_pictures_with_their_settings_a_sheet_and_a_report(run, tmp_path, capsys):
    assert run("--prompt", "a singer", *AGE, "--out", "out") == 0
    said = capsys.readouterr().out
    assert "Learned age (young, old)" in said and "young 2 (50%), old 2 (50%)" in said
    out = tmp_path / "out"
    names = {"0000.png", "0001.png", "0002.png", "0003.png", "age.attribute.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"sheet.png", "report.json", "report.txt"}
    with Image.open(out / "0001.png") as picture:
        settings = json.loads(picture.text[SETTINGS_KEY])
    assert settings["seed"] == 1 and settings["assigned"]["age"] in ("young", "old")
    told = json.loads((out / "report.json").read_text())
    assert told["attributes"]["age"]["assigned"] == {"young": 2, "old": 2} and told["mode"] == "quota"
    assert Attribute.load(out / "age.attribute.safetensors").labels == ("young", "old")

    # the kept attribute is used again, and a later part of a run is the same as in the whole
    assert run("--prompt", "a singer", "--attribute", "age", "--out", "out", "--first", 2, "--count", 2) == 0
    assert "Learned" not in capsys.readouterr().out
    with Image.open(out / "0003.png") as picture:
        again = json.loads(picture.text[SETTINGS_KEY])
    assert again["number"] == 3 and again["seed"] == 3
    whole = json.loads(json.dumps(told))
    assert whole["pictures"] == 4


def test_a_prompt_that_names_the_attribute_is_drawn_without_vectors(run, tmp_path, capsys):
    assert run("--prompt", "an elderly singer", *AGE, "--out", "out", "--compare") == 0
    assert "left alone" in capsys.readouterr().out
    for number in range(4):
        with (
            Image.open(tmp_path / f"out/{number:04d}.png") as one,
            Image.open(tmp_path / f"out/{number:04d}-without.png") as other,
        ):
            assert one.tobytes() == other.tobytes()


def test_targets_are_obeyed_and_wrong_ones_named(run, tmp_path, capsys):
    assert run("--prompt", "a singer", *AGE, "--out", "out", "--target", "age:young=0.75,old=0.25") == 0
    assert "young 3 (75%), old 1 (25%)" in capsys.readouterr().out
    assert run("--prompt", "a singer", "--attribute", "age", "--out", "out", "--target", "tone:x=1") == 1
    assert "'tone:x=1' does not begin with an attribute of this run (age)" in refused(capsys)


def test_what_is_missing_is_said(run, library, capsys):
    assert run("--prompt", "a singer", "--attribute", "gender", "--out", "out") == 1
    assert "--learn gender" in refused(capsys)
    assert run("--prompt", "a fight, no violence", *AGE, "--out", "out") == 1
    message = refused(capsys)
    assert "'no violence'" in message and "vector" in message
    tensor = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ConceptVector(tensor, "custom:24x32", title="calm").save(library / "no violence.safetensors")
    assert run("--prompt", "a fight, no violence", "--out", "out") == 0
    assert "Found in the prompt: 'no violence' adds 'no violence'." in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [("--learn", "age"), ("--learn", "age", "young"), ()])
def test_a_mistake_in_the_command_line_ends_with_2(run, wrong, capsys):
    with pytest.raises(SystemExit) as left:
        run("--prompt", "a singer", *wrong)
    assert left.value.code == 2
