"""The main job, as a stranger would run it, with few pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from concept_steer import ConceptVector

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "concept_steer" / "demo" / "weights"

pytestmark = pytest.mark.skipif(
    not any(WEIGHTS.glob("*.safetensors")), reason="the embedded model's weights are not there yet"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "concept_steer", "demo", "--count", "16", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def report(out) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_it_writes_pictures_vectors_and_a_report(out):
    written = {p.name for p in out.iterdir()}
    vectors = {"woman-difference.safetensors", "woman-score.safetensors"}
    assert written == {"strip.png", "sheet.png", "report.json", "report.txt", *vectors}
    for name in ("strip.png", "sheet.png"):
        assert min(Image.open(out / name).size) > 256
    for name in vectors:
        assert ConceptVector.load(out / name).family == "demo"
    assert (out / "report.txt").read_text(encoding="utf-8").strip()


def test_the_report_has_its_figures(report):
    assert report["pictures"] == 16 and report["seconds"] > 0
    assert set(report["kept"]) == {"skin_tone", "role", "expression"}
    assert set(report["learn"]) == {"difference", "score"}
    for cost in report["learn"].values():
        assert cost["unet_rows"] > 0 and cost["seconds"] > 0
    shares = [report["share_before"], report["share_after"], *report["kept"].values()]
    assert all(0 <= share <= 1 for share in shares)


def test_the_vector_does_what_it_is_for(report):
    assert report["share_after"] > report["share_before"]
    assert not set(report["learned_on"]) & set(report["tested_on"])
