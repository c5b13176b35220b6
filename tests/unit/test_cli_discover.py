"""`concept-steer discover` on a tiny real diffusers folder: what it writes, refuses and keeps after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal

import pytest
from PIL import Image
from tiny_diffusers import tiny_sd

from concept_steer import ConceptVector
from concept_steer.analysis import discovery
from concept_steer.analysis.strips import Strips
from concept_steer.cli import discover, main

pytest.importorskip("diffusers")
SMALL = ("--seeds", 6, "--count", 2, "--strip-seeds", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd(folder / "parts").save_pretrained(folder / "sd")
    return str(folder / "sd")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("# mine\n{} at night\n\nan old cook\na red cook\n", encoding="utf-8")
    return tmp_path


def run(checkpoint: str, *args: object) -> int:
    given = ("discover", "--checkpoint", checkpoint, "--device", "cpu", "--prompt", "a cook", "--words", "words.txt")
    return main([str(arg) for arg in (*given, "--out", "found", *args)])


def test_the_methods_are_those_of_the_analysis():
    assert discover.METHODS == discovery.METHODS


def test_it_writes_vectors_strips_a_sheet_and_a_report(checkpoint, folder, capsys):
    assert run(checkpoint, *SMALL) == 0
    report = json.loads((folder / "found" / "report.json").read_text())
    assert [one["number"] for one in report["directions"]] == [1, 2]
    for one in report["directions"]:
        name = one["names"][0][0]
        assert name in ("night", "old cook", "red cook")
        assert one["file"] == f"pca-{one['number']}-{name.replace(' ', '-')}.safetensors"
        vector = ConceptVector.load(folder / "found" / one["file"])
        assert (vector.fingerprint, vector.info["method"]) == (one["fingerprint"], "pca")
        with Image.open((folder / "found" / one["file"]).with_suffix(".png")) as strip:
            assert strip.info["concept_steer"]
    assert (folder / "found" / "sheet.png").exists()
    assert "2 vectors and 2 strips" in capsys.readouterr().out


def test_a_folder_with_a_report_is_not_written_over(checkpoint, folder, capsys):
    (folder / "found").mkdir()
    (folder / "found" / "report.json").write_text("{}")
    assert run(checkpoint, *SMALL) == 1
    assert "choose another folder" in capsys.readouterr().err


def test_a_mask_keeps_the_jacobian_to_a_region(checkpoint, folder):
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    options = ("--method", "jacobian", "--count", 1, "--seeds", 1, "--mask", "mask.png", "--no-strips")
    assert run(checkpoint, *options) == 0
    (one,) = json.loads((folder / "found" / "report.json").read_text())["directions"]
    assert one["method"] == "jacobian" and one["value"] > 0
    assert ConceptVector.load(folder / "found" / one["file"]).info["masked"] == "True"


@pytest.mark.parametrize("wrong", [("--mask", "mask.png"), ("--method", "jacobian", "--per-timestep")])
def test_options_of_the_other_method_are_a_mistake(checkpoint, wrong):
    with pytest.raises(SystemExit) as left:
        run(checkpoint, *wrong)
    assert left.value.code == 2


def test_a_file_without_words_is_refused(checkpoint, folder, capsys):
    (folder / "words.txt").write_text("# nothing\n")
    assert run(checkpoint, *SMALL) == 1
    assert "one prompt a line" in capsys.readouterr().err


def test_ctrl_c_keeps_the_vectors_and_the_strips_drawn_so_far(checkpoint, folder, monkeypatch, capsys):
    drawn = Strips.drawn

    def interrupted(self, vector, progress=None):
        os.kill(os.getpid(), signal.SIGINT)
        return drawn(self, vector, progress)

    monkeypatch.setattr(Strips, "drawn", interrupted)
    assert run(checkpoint, *SMALL) == 130
    assert len(list((folder / "found").glob("*.safetensors"))) == 2
    assert len(list((folder / "found").glob("pca-*.png"))) == 1
    assert "2 vectors and 1 strips" in capsys.readouterr().out
