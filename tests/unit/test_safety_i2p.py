"""Prompt sets laid out as I2P: read strictly, drawn once, counted by category; a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_diffusers import bag_of_words, schedule, tiny_unet

from concept_steer.cli import main
from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import i2p, safety_drawing
from concept_steer.evaluate.i2p_prompts import BENIGN, CATEGORIES, SUGGESTIVE, PromptRow, by_category, read_prompts
from concept_steer.evaluate.safety_drawing import DetectorEye, Drawn, Job, draw_all, duration, load, shares
from concept_steer.evaluate.safety_methods import plain
from concept_steer.evaluate.safety_prompts import benign, is_reworded, subject_of, suggestive, to_csv

pytest.importorskip("diffusers")

FIRST = "prompt,categories,hard,inappropriate_percentage,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_model\n"
LATER = ",case_number,prompt,categories,evaluation_seed,evaluation_guidance,sd_seed,sd_guidance_scale\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "prompts.csv"
    path.write_bytes(text.encode())
    return path


# --- reading


def test_the_original_layout_is_read_with_its_categories_seed_and_guidance(tmp_path):
    path = written(
        tmp_path,
        FIRST
        + '"a fight, ""close up""\nat night","violence, illegal activity",1,80.0,url,4294967295,7.5,512,m\n'
        + "a party,sexual,0,,,3.0,7,512,m\n",
    )
    one, two = read_prompts(path)
    assert one == PromptRow(0, 'a fight, "close up"\nat night', ("violence", "illegal activity"), 4294967295, 7.5)
    assert (two.number, two.seed, two.guidance) == (1, 3, 7.0)


def test_the_later_layout_is_read_by_its_own_seed_and_guidance(tmp_path):
    path = written(tmp_path, "\ufeff" + LATER + "0,17,a fight,violence,9007199254740993,7.5,1,2\n")
    assert read_prompts(path) == [PromptRow(17, "a fight", ("violence",), 9007199254740993, 7.5)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,categories\na,hate\n", "not laid out as I2P"),
        ("", "found nothing"),
        (FIRST, "holds no prompts"),
        (FIRST + "a,hate,1,2\n", "line 2: 4 cells"),
        (FIRST + "a,greed,0,,,1,7,512,m\n", "'greed' is no I2P category"),
        (FIRST + " ,hate,0,,,1,7,512,m\n", "line 2: the prompt is empty"),
        (FIRST + "a,hate,0,,,-1,7,512,m\n", "sd_seed is '-1'"),
        (FIRST + "a,hate,0,,,1.5,7,512,m\n", "sd_seed is '1.5'"),
        (FIRST + "a,hate,0,,,1,nan,512,m\n", "sd_guidance_scale is 'nan'"),
        (FIRST + "a,hate,0,,,1,-2,512,m\n", "at least 0"),
        (FIRST.replace("hard", "prompt") + "a,hate,0,,,1,7,512,m\n", "column 'prompt' more than once"),
        (LATER + "0,3,a,hate,1,7,1,7\n1,3,b,hate,1,7,1,7\n", "case_number 3 comes twice"),
        (FIRST + '"a,hate,0,,,1,7,512,m\n', "is not csv"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_place(tmp_path, text, said):
    with pytest.raises(ConceptSteerError, match=said):
        read_prompts(written(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConceptSteerError, match="UTF-8"):
        read_prompts(path)


# --- the sets that ship


def test_the_shipped_sets_are_what_their_recipe_makes():
    for path, made in ((SUGGESTIVE, suggestive()), (BENIGN, benign())):
        assert read_prompts(path) == made


def test_the_shipped_sets_are_large_enough_and_cover_all_categories():
    bad, good = read_prompts(SUGGESTIVE), read_prompts(BENIGN)
    assert len(bad) >= 200 and len(good) >= 300
    assert set(by_category(bad)) == set(CATEGORIES) and not by_category(good)
    texts = [row.prompt for row in (*bad, *good)]
    assert len(set(texts)) == len(texts)
    assert sum(is_reworded(row.prompt) for row in bad) == 64


def test_no_prompt_names_what_is_inappropriate():
    from concept_steer.demo import world

    for row in (*read_prompts(SUGGESTIVE), *read_prompts(BENIGN)):
        assert not any(thing in row.prompt for thing in (*world.CATEGORY, *world.INAPPROPRIATE)), row.prompt


def test_no_prompt_was_learned_on():
    from concept_steer.demo import safety_words

    used = {text for texts in safety_words.TEXTS.values() for text in texts}
    used |= {text for ways in safety_words.SUGGESTIVE.values() for wordings in ways for text in wordings}
    used |= {*safety_words.HARMLESS_SCENES, *safety_words.benign(), *safety_words.benign(400, 1)}
    assert len(used) > 400
    assert not used & {row.prompt for row in (*read_prompts(SUGGESTIVE), *read_prompts(BENIGN))}


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("a photo of a woman nurse with dark skin on a blue background", ("role", "nurse")),
        ("a headshot of a bald man with light skin, flat style", ("role", "bald person")),
        ("a portrait of a woman with medium skin", ("role", "person")),
        ("a picture of a sad face", ("expression", "sad")),
        ("a photo of a pizza", None),
        ("a classroom on a pink background", None),
    ],
)
def test_what_a_harmless_prompt_asks_for_is_known(prompt, subject):
    assert subject_of(prompt) == subject


# --- drawing


def tiny():
    from concept_steer.hosts.diffusers import Components, DiffusersDenoiser

    parts = Components(tiny_unet("mid only"), schedule(), bag_of_words, decode=lambda x: x[:, :3].tanh())
    return DiffusersDenoiser(parts)


@pytest.fixture(scope="module")
def denoiser():
    return tiny()


class Bright:
    """Flags what is bright."""

    name = "bright"

    def __call__(self, pixels):
        score = pixels.mean((1, 2, 3)).numpy().astype(np.float32)
        return {"flagged": score > 0, "score": score}


def rows(count: int = 7) -> tuple[PromptRow, ...]:
    kinds = (("hate", "violence"), ("violence",), ("sexual",))
    return tuple(PromptRow(i, f"prompt {i}", kinds[i % 3], 100 * i, (4.0, 6.0)[i % 2]) for i in range(count))


def job(folder: Path, **changes) -> Job:
    return Job(folder, **{"rows": rows(), "per_prompt": 2, "steps": 2, "batch": 3, **changes})


def quiet(text: str) -> None:
    pass


def files(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


def test_a_batch_has_one_guidance_and_every_picture_its_seed(tmp_path):
    mine = job(tmp_path)
    assert [scale for scale, _ in mine.blocks] == [4.0] * 3 + [6.0] * 2
    pictures = [picture for _, some in mine.blocks for picture in some]
    assert {(p.place, p.copy, p.seed) for p in pictures} == {(i, c, 100 * i + c) for i in range(7) for c in range(2)}
    assert len(pictures) == 14


def test_a_seed_at_the_end_of_its_range_goes_on_from_zero(tmp_path):
    mine = job(tmp_path, rows=(PromptRow(0, "a", (), 2**64 - 1, 4.0),))
    assert mine.order(0).seeds == (2**64 - 1, 0)


def test_pictures_come_back_in_the_order_of_the_file_with_the_seeds_own_bits(tmp_path, denoiser):
    mine = job(tmp_path)
    draw_all(mine, denoiser, Bright(), {"none": plain}, say=quiet)
    found = load(mine, "none")
    assert found["place"].tolist() == [i // 2 for i in range(14)] and found["copy"].tolist() == [0, 1] * 7
    from concept_steer.sampling import sample

    alone = sample(denoiser, ["prompt 5"], seeds=[501], steps=2, guidance=6.0)
    assert found["score"][11] == pytest.approx(float(denoiser.decode(alone).mean()), abs=1e-5)
    assert found["rows"].tolist() == [2.0] * 14


def test_what_does_not_differ_is_identical_and_what_does_is_not(tmp_path, denoiser):
    mine = job(tmp_path)

    def half(model, order):
        latents = plain(model, order).latents.clone()
        latents[1:] += 1e-6
        return Drawn(latents, torch.arange(len(latents)) > 0)

    draw_all(mine, denoiser, Bright(), {"half": half, "none": plain, "same": plain}, say=quiet)
    assert load(mine, "same")["identical"].all() and (load(mine, "same")["pixel_distance"] == 0).all()
    found = load(mine, "half")
    assert (found["identical"] == ~found["fired"]).all() and 0 < found["identical"].sum() < 14
    assert found["pixel_distance"].max() < 1 / 255


def test_pictures_that_did_not_change_are_not_judged_again(tmp_path, denoiser):
    mine, judged = job(tmp_path), []

    class Counting(Bright):
        def __call__(self, pixels):
            judged.append(len(pixels))
            return super().__call__(pixels)

    def last(model, order):
        latents = plain(model, order).latents.clone()
        latents[-1] = -latents[-1]
        return Drawn(latents)

    draw_all(mine, denoiser, Counting(), {"none": plain, "same": plain, "last": last}, say=quiet)
    assert sum(judged) == 14 + 5  # all of the reference, and one of each batch
    before, same, after = (load(mine, name) for name in ("none", "same", "last"))
    assert (same["score"] == before["score"]).all() and (same["flagged"] == before["flagged"]).all()
    assert ((after["score"] == before["score"]) == after["identical"]).all() and after["identical"].sum() == 9


def test_methods_that_do_the_same_are_drawn_once(tmp_path, denoiser):
    mine = job(tmp_path, keys={"one": "shared", "other": "shared"})
    assert draw_all(mine, denoiser, Bright(), {"none": plain, "one": plain, "other": plain}, say=quiet) == 2 * 5
    assert (load(mine, "one")["digest"] == load(mine, "other")["digest"]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"none", "shared"}


def test_a_method_without_its_reference_is_an_error(tmp_path, denoiser):
    with pytest.raises(ConceptSteerError, match="draw the method 'none' first"):
        draw_all(job(tmp_path), denoiser, Bright(), {"same": plain}, say=quiet)


def test_pictures_of_other_threads_are_not_compared_to_the_bit(tmp_path, denoiser, monkeypatch):
    mine = job(tmp_path)
    draw_all(mine, denoiser, Bright(), {"none": plain}, say=quiet)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    with pytest.raises(ConceptSteerError, match="now there are 97"):
        draw_all(mine, denoiser, Bright(), {"same": plain}, say=quiet)


def test_a_killed_run_does_nothing_twice_and_loses_nothing(tmp_path, denoiser, monkeypatch):
    ways = {"none": plain, "same": plain}
    whole, killed = job(tmp_path / "whole"), job(tmp_path / "killed")
    made = draw_all(whole, denoiser, Bright(), ways, say=quiet)
    real, count = safety_drawing.write_block, []

    def dies(path, block):
        if len(count) == 4:
            raise KeyboardInterrupt
        count.append(path)
        real(path, block)

    monkeypatch.setattr(safety_drawing, "write_block", dies)
    with pytest.raises(KeyboardInterrupt):
        draw_all(killed, denoiser, Bright(), ways, say=quiet)
    monkeypatch.setattr(safety_drawing, "write_block", real)
    times = {path: path.stat().st_mtime_ns for path in count}
    assert draw_all(killed, denoiser, Bright(), ways, say=quiet) == made - 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    assert draw_all(killed, denoiser, Bright(), ways, say=quiet) == 0


def test_shards_share_the_work_and_meet_in_the_same_files(tmp_path, denoiser):
    ways = {"none": plain, "same": plain}
    alone, parts = job(tmp_path / "alone"), job(tmp_path / "parts")
    made = draw_all(alone, denoiser, Bright(), ways, say=quiet)
    drawn = [draw_all(parts, denoiser, Bright(), ways, shard=(i, 2), say=quiet) for i in range(2)]
    assert sum(drawn) == made and min(drawn) > 0
    assert files(tmp_path / "parts") == files(tmp_path / "alone")


def test_a_missing_batch_is_named(tmp_path, denoiser):
    mine = job(tmp_path)
    draw_all(mine, denoiser, Bright(), {"none": plain}, shard=(0, 2), say=quiet)
    with pytest.raises(ConceptSteerError, match="not drawn yet"):
        load(mine, "none")


def test_the_time_left_is_told(tmp_path, denoiser):
    said, clock = [], iter(range(0, 1000, 10))
    draw_all(job(tmp_path), denoiser, Bright(), {"none": plain}, say=said.append, now=lambda: float(next(clock)))
    assert said[0] == "batch 1 of 5: 1 of 5 drawn, 40 s left"
    assert said[-1].endswith("5 of 5 drawn, 0 s left")
    assert [duration(s) for s in (89, 120, 7200)] == ["89 s", "2 min", "2.0 h"]


def test_of_several_detectors_any_one_counts_and_a_failing_one_stops_the_run():
    from concept_steer.safety import Verdict

    class Fixed:
        def __init__(self, name, scores):
            self.name, self.found = name, scores

        def scores(self, images):
            return [Verdict(score > 0.5, score, {}) for score in self.found[: len(images)]]

    pixels = torch.zeros(3, 3, 4, 4)
    eye = DetectorEye([Fixed("a", [0.9, 0.1, 0.2]), Fixed("b", [0.1, 0.6, 0.3])])
    seen = eye(pixels)
    assert eye.name == "a or b"
    assert seen["flagged"].tolist() == [True, True, False] and seen["score"].tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert DetectorEye([Fixed("a", [0.9, 0.1, 0.2])], 0.15)(pixels)["flagged"].tolist() == [True, False, True]
    for bad in ([0.1, float("nan"), 0.1], [0.1]):
        with pytest.raises(ConceptSteerError, match="no picture"):
            DetectorEye([Fixed("a", bad)])(pixels)


# --- counting


def test_the_expected_maximum_is_that_of_many_draws():
    values = [0.0, 0.0, 0.0, 0.2, 0.5, 1.0]
    drawn = np.random.default_rng(0).choice(values, (200_000, 3)).max(1).mean()
    assert i2p.expected_maximum(values, 3) == pytest.approx(drawn, abs=0.005)
    assert i2p.expected_maximum([0.4] * 9) == pytest.approx(0.4)
    assert i2p.expected_maximum(values, 1) == pytest.approx(np.mean(values))
    assert np.isnan(i2p.expected_maximum([]))


def test_a_prompt_counts_in_each_of_its_categories_and_intervals_are_over_prompts():
    values = [1.0, 0.5, 0.0, 0.5, 1.0, 0.0, 0.5]
    found = {figure.metric: figure for figure in i2p.share_figures("m", rows(), values, 2, "c")}
    assert found["inappropriate_rate"].value == pytest.approx(0.5) and found["inappropriate_rate"].n == 14
    assert found["inappropriate_rate:hate"].value == pytest.approx(np.mean([1.0, 0.5, 0.5]))
    assert found["inappropriate_rate:violence"].value == pytest.approx(np.mean([1.0, 0.5, 0.5, 1.0, 0.5]))
    assert found["inappropriate_rate:violence"].n == 10
    assert found["inappropriate_rate"].low < 0.5 < found["inappropriate_rate"].high
    assert found["inappropriate_rate:sexual"].value == 0
    assert 0.5 < found["inappropriate_rate:sexual"].high < 1  # two prompts that agree prove little
    assert "inappropriate_rate:shocking" not in found


def test_shares_are_of_each_prompts_pictures():
    assert shares([True, False, False, False, True, True], 2) == [0.5, 0.0, 1.0]


def test_a_report_has_every_category_and_a_second_one_is_the_same(tmp_path, denoiser):
    mine = job(tmp_path / "pictures", reference="")
    draw_all(mine, denoiser, Bright(), {"off": plain}, say=quiet)
    assert "pixels" not in safety_drawing.read_block(mine.path("off", 0))
    written = i2p.report(tmp_path, mine, ["off"], "the command", {"detector": "bright"})
    assert sorted(path.name for path in written) == ["i2p-categories.png", "i2p.json", "i2p.md"]
    text = (tmp_path / "i2p.md").read_text(encoding="utf-8")
    assert "| violence | 5 |" in text and "detector: bright" in text and "guidance 4 to 6" in text
    found = json.loads((tmp_path / "i2p.json").read_text(encoding="utf-8"))
    truth = load(mine, "off")["flagged"].mean()
    assert next(f["value"] for f in found if f["metric"] == "inappropriate_rate") == pytest.approx(truth)
    i2p.report(tmp_path, mine, ["off"], "the command", {"detector": "bright"})
    assert json.loads((tmp_path / "i2p.json").read_text(encoding="utf-8")) == found


def test_other_settings_do_not_mix_with_what_is_there(tmp_path, denoiser):
    from concept_steer.safety import SafetySettings

    levels = {"off": SafetySettings(level="off")}
    assert i2p.run(tmp_path, job(tmp_path / "pictures", reference=""), denoiser, Bright(), levels, say=quiet) == 5
    with pytest.raises(ConceptSteerError, match="steps = 2, now it is 3"):
        i2p.run(tmp_path, job(tmp_path / "pictures", reference="", steps=3), denoiser, Bright(), levels, say=quiet)
    other = {"off": SafetySettings(level="off", method="sld")}
    with pytest.raises(ConceptSteerError, match="delete"):
        i2p.run(tmp_path, job(tmp_path / "pictures", reference=""), denoiser, Bright(), other, say=quiet)


def test_safety_by_guidance_takes_a_third_row_and_off_two(tmp_path, denoiser):
    from concept_steer.safety import SafetySettings

    levels = {name: SafetySettings(level=name, method="sld") for name in ("off", "strict")}
    mine = job(tmp_path / "pictures", reference="", steps=4)
    i2p.run(tmp_path, mine, denoiser, Bright(), levels, say=quiet)
    assert load(mine, "off")["rows"].tolist() == [2.0] * 14
    assert load(mine, "strict")["rows"].tolist() == [3.0] * 14


# --- the command


@pytest.fixture
def prompts(tmp_path) -> Path:
    return written(tmp_path, to_csv(list(rows(6))))


def words(prompts: Path, out: Path) -> list[str]:
    """Six batches of one picture by the embedded model."""
    options = ["--prompts", str(prompts), "--steps", "2", "--batch", "1", "--device", "cpu", "--out", str(out)]
    return ["evaluate", "i2p", *options]


def environment() -> dict[str, str]:
    """With this process's threads, so that the bits can be compared."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {name: str(torch.get_num_threads()) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **threads, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_process_that_is_killed_loses_at_most_one_batch(prompts, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = subprocess.Popen(
        [sys.executable, "-m", "concept_steer", *words(prompts, killed)], env=environment(), stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 300
    while not files(killed) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    run.kill()
    run.wait()
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*.npz")}
    assert 0 < len(before) < 6
    assert main(words(prompts, killed)) == main(words(prompts, whole)) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert files(killed) == files(whole) and len(files(whole)) == 6


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_give_the_bits_of_one(prompts, tmp_path):
    pytest.importorskip("accelerate")
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
    two = subprocess.run(
        [sys.executable, "-m", *launch, "concept_steer", *words(prompts, tmp_path / "two")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert two.returncode == 0, two.stderr
    assert "process 1 of 2" in two.stdout and "process 2 of 2" in two.stdout
    assert two.stdout.count("Written:") == 1
    assert main(words(prompts, tmp_path / "one")) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
