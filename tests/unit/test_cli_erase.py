"""The command line of erasing, on the embedded model: scan, learn, apply."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from concept_steer.cli.main import main
from concept_steer.demo import drawing
from concept_steer.geom_erasing import LocationTokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight plain pictures, six of them with a watermark, and captions beside them."""
    made, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(8):
        canvas = np.full((128, 128, 3), 90 + 20 * number, np.uint8)
        canvas[40:90, 30 + 4 * number : 100] = (200, 60, 60)
        picture = drawing.watermark(canvas, rng)[0] if number < 6 else canvas
        Image.fromarray(picture).save(made / f"{number}.png")
        (made / f"{number}.txt").write_text("a red box")
    return made


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("found")
    assert main(["erase", "scan", str(folder), "--detector", "demo-watermark", "--out", str(out)]) == 0
    return out / "found.jsonl"


def learn(found, out, *more: str) -> int:
    short = ["--steps", "2", "--batch", "2", "--no-preview"]
    return main(["erase", "learn", str(found), "--out", str(out), *short, *more])


def test_tokens_are_learned_from_a_scan_and_written_as_an_embedding_with_a_report(found, tmp_path, capsys):
    assert learn(found, tmp_path) == 0
    tokens = LocationTokens.load(tmp_path / "no-watermark.safetensors")
    assert tokens.concept == "watermark" and tokens.bins == 4
    report = json.loads((tmp_path / "no-watermark.json").read_text())
    assert len(report["losses"]) == 2 and report["concept"] == "watermark"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no-watermark.json", "no-watermark.safetensors"]
    assert "negative prompt" in capsys.readouterr().out


def test_what_is_there_is_not_replaced_without_being_asked(found, tmp_path, capsys):
    assert learn(found, tmp_path) == 0
    assert learn(found, tmp_path) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert learn(found, tmp_path, "--overwrite") == 0


def test_a_lora_and_tokens_are_used_by_apply(found, tmp_path, capsys):
    assert learn(found, tmp_path, "--way", "lora", "--rank", "2", "--bins", "2", "--name", "no-mark") == 0
    told = ["--embedding", str(tmp_path / "no-mark.safetensors"), "--lora", str(tmp_path / "no-mark-lora.safetensors")]
    drawn = ["--prompt", "a cat", "--count", "1", "--steps", "2", "--out", str(tmp_path / "drawn")]
    assert main(["apply", *told, *drawn]) == 0
    pictures = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert pictures == ["0001-0-with.png", "0001-0-without.png", "0001-sheet.png"]
    about = json.loads(Image.open(tmp_path / "drawn" / "0001-0-with.png").text["concept_steer"])
    assert about["negative"] == "no-mark" and about["lora"] == ["no-mark-lora"]
    one, other = (np.asarray(Image.open(tmp_path / "drawn" / name)) for name in pictures[:2])
    assert not np.array_equal(one, other)


def test_masked_learning_writes_a_lora_and_no_embedding_and_draws_before_and_after(found, tmp_path):
    out = tmp_path / "masked"
    arguments = ["erase", "learn", str(found), "--out", str(out), "--steps", "2", "--batch", "2", "--way", "masked"]
    assert main([*arguments, "--rank", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["no-marks-lora.safetensors", "no-marks.json", "no-marks.png"]


def test_a_thing_that_was_not_found_is_named_with_those_that_were(found, tmp_path, capsys):
    assert learn(found, tmp_path, "--concept", "text") == 1
    assert "found were: watermark" in capsys.readouterr().err


def test_apply_wants_something_to_apply(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["apply", "--prompt", "a cat", "--out", str(tmp_path)])
    assert "nothing to apply" in capsys.readouterr().err


def test_apply_draws_once_where_only_the_safety_switch_is_wanted(tmp_path, capsys):
    drawn = ["--prompt", "a night out", "--count", "2", "--steps", "2", "--out", str(tmp_path)]
    assert main(["apply", "--safety", "standard", *drawn]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001-0.png", "0001-1.png", "0001-sheet.png"]
