"""Detectors of unasked things: real QR codes and words, a file of one's own, and what is said when one is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from concept_steer.cli import erase
from concept_steer.errors import ConceptSteerError, SafetyError
from concept_steer.geom_erasing import detectors
from concept_steer.geom_erasing.detectors import KNOWN, detector_of, detector_spec
from concept_steer.geom_erasing.regions import regions, verdict_of_heat
from concept_steer.pictures import lettering


def plain(size: tuple[int, int] = (512, 384), colour: tuple[int, int, int] = (170, 200, 210)) -> Image.Image:
    return Image.new("RGB", size, colour)


def with_code(text: str, left: int, top: int, pixels: int, onto: Image.Image) -> tuple[Image.Image, tuple[int, ...]]:
    """A QR code by OpenCV's own encoder, `pixels` a module; the picture and left, top, right, bottom of its modules."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless (extra erase) is not installed")
    code = cv2.QRCodeEncoder.create().encode(text)
    dark = np.argwhere(code < 128)
    code = code[dark[:, 0].min() : dark[:, 0].max() + 1, dark[:, 1].min() : dark[:, 1].max() + 1]
    large = np.kron(code, np.ones((pixels, pixels), np.uint8))
    framed = np.pad(large, 4 * pixels, constant_values=255)
    image = onto.copy()
    image.paste(Image.fromarray(framed), (left - 4 * pixels, top - 4 * pixels))
    return image, (left, top, left + large.shape[1], top + large.shape[0])


def overlap(box: tuple[int, int, int, int], truth: tuple[int, ...]) -> float:
    """box: left, top, width, height; truth: left, top, right, bottom."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    width = max(0, min(right, truth[2]) - max(left, truth[0]))
    height = max(0, min(bottom, truth[3]) - max(top, truth[1]))
    both = width * height
    return both / (box[2] * box[3] + (truth[2] - truth[0]) * (truth[3] - truth[1]) - both)


# --- QR codes


@pytest.mark.parametrize("pixels", [2, 4, 8], ids=lambda p: f"{p} px a module")
def test_a_qr_code_is_found_where_it_is(pixels):
    image, truth = with_code("https://example.org/hello", 60, 70, pixels, plain())
    (verdict,) = detector_of("qr").scores([image])
    assert verdict.flagged and verdict.score == 1 and verdict.categories == {"qr code": 1.0}
    ((label, box),) = verdict.boxes
    assert label == "qr code" and overlap(box, truth) > 0.8


def test_two_qr_codes_are_two_boxes():
    image, first = with_code("one", 40, 40, 4, plain())
    image, second = with_code("another", 300, 200, 4, image)
    boxes = [box for _, box in detector_of("qr").scores([image])[0].boxes]
    assert len(boxes) == 2
    for truth in (first, second):
        assert max(overlap(box, truth) for box in boxes) > 0.8


def test_a_picture_without_a_code_has_none_and_the_order_is_kept():
    image, _ = with_code("here", 60, 70, 4, plain())
    none, some = detector_of("qr").scores([plain(), image])
    assert not none.flagged and none.boxes == [] and none.score == 0
    assert some.flagged


# --- words


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr", reason="rapidocr (extra erase) is not installed")
    return detector_of("text")


def written(text: str, place: tuple[int, int] = (60, 150), size: int = 40) -> tuple[Image.Image, tuple[int, ...]]:
    image = plain()
    draw = ImageDraw.Draw(image)
    draw.text(place, text, font=lettering(size), fill=(20, 20, 40))
    return image, tuple(round(v) for v in draw.textbbox(place, text, font=lettering(size)))


def test_written_words_are_found_where_they_are(reader):
    image, truth = written("Grand opening")
    found, none = reader.scores([image, plain()])
    assert found.flagged and found.score > 0.8
    ((label, box),) = found.boxes
    assert label == "text" and overlap(box, truth) > 0.5
    assert not none.flagged and none.boxes == []


@pytest.mark.parametrize(
    ("text", "counts"), [("00", False), ("中", False), ("oo'", False), ("SALE", True), ("24 h", True)]
)
def test_one_or_two_letters_are_no_words(text, counts, monkeypatch):
    monkeypatch.setattr(detectors, "_reader", lambda: None)
    assert detectors.WrittenText()._wanted(text) is counts


def test_only_lines_that_mark_a_picture_are_watermarks(reader, monkeypatch):
    monkeypatch.setattr(detectors, "_reader", lambda: reader._read)
    watermark = detector_of("watermark")
    said = {
        text: watermark.scores([written(text)[0]])[0].flagged for text in ("Grand opening", "© Anna Photo", "SAMPLE")
    }
    assert said == {"Grand opening": False, "© Anna Photo": True, "SAMPLE": True}


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("shutterstock", True), ("Getty Images", True), ("gettyimages", True), ("www.example.com", True),
        ("photo-club.org", True), ("(c) 2024", True), ("PREVIEW ONLY", True),
        ("livestock market", False), ("resampled", False), ("HELLO", False), ("end. Comes", False),
    ],
)  # fmt: skip
def test_words_are_judged_whole(text, marks, monkeypatch):
    monkeypatch.setattr(detectors, "_reader", lambda: None)
    assert detectors.Watermarks()._wanted(text) is marks


def test_the_readers_weights_must_be_in_its_package(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr", reason="rapidocr (extra erase) is not installed")
    import rapidocr

    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SafetyError, match="weights are not in its package"):
        detector_of("text")


# --- names and what is missing


def test_unknown_names_list_the_known_ones():
    with pytest.raises(SafetyError, match=r"no detector 'qrcode'; there are qr, text, .*demo-text and model:FILE"):
        detector_of("qrcode")


@pytest.mark.parametrize(("name", "module", "install"), [
    ("qr", "cv2", "opencv-python-headless"), ("text", "rapidocr", "rapidocr"), ("watermark", "rapidocr", "rapidocr"),
    ("nudenet", "nudenet", "nudenet"),
])  # fmt: skip
def test_a_missing_package_is_named(name, module, install, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SafetyError, match=f"pip install {install}"):
        detector_of(name)


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(SafetyError, match="threshold"):
        detector_of("demo-qr", threshold)


def test_a_detector_is_named_with_its_threshold_on_the_command_line():
    assert detector_spec("demo-qr=0.7").threshold == 0.7  # type: ignore[attr-defined]
    assert detector_spec("demo-qr").threshold == 0.5  # type: ignore[attr-defined]
    with pytest.raises(SafetyError, match="not NAME=THRESHOLD"):
        detector_spec("demo-qr=high")


def test_the_command_line_names_the_same_detectors():
    assert tuple(KNOWN) == erase.DETECTORS


# --- a localiser of one's own


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer."""

    def varint(n: int) -> bytes:
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_file(path: Path, operator: bytes = b"ReduceMean", channels: int = 3, side: int = 16) -> Path:
    """An ONNX model written by hand: the mean of the colours of each pixel (or another operator over channels)."""

    def value(name: bytes, shape: tuple[int, ...]) -> bytes:
        dims = b"".join(field(1, field(1, n)) for n in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    axes = field(1, b"axes") + field(8, 1) + field(20, 7)
    keep = field(1, b"keepdims") + field(3, 1) + field(20, 2)
    node = field(1, b"x") + field(2, b"y") + field(4, operator) + field(5, axes) + field(5, keep)
    graph = field(1, node) + field(2, b"g") + field(11, value(b"x", (1, channels, side, side)))
    graph += field(12, value(b"y", (1, 1, side, side)))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13)))
    return path


def spotted(box: tuple[int, int, int, int] = (128, 96, 256, 288)) -> Image.Image:
    image = plain(colour=(0, 0, 0))
    ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=(255, 255, 255))
    return image


def test_an_onnx_file_of_the_documented_layout_is_a_detector(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime (extra erase) is not installed")
    mine = detector_of(f"model:{onnx_file(tmp_path / 'white-spot.onnx')}", 0.6)
    found, none = mine.scores([spotted(), plain(colour=(0, 0, 0))])
    ((label, box),) = found.boxes
    assert label == "white spot" and overlap(box, (128, 96, 256, 288)) > 0.8
    assert not none.flagged and none.score == 0


def test_an_onnx_file_of_another_layout_is_refused_with_what_was_found(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime (extra erase) is not installed")
    with pytest.raises(SafetyError, match=r"inputs \[\[1, 1, 16, 16\]\].*expected one input \(1, 3, S, S\)"):
        detector_of(f"model:{onnx_file(tmp_path / 'gray.onnx', channels=1)}")
    with pytest.raises(SafetyError, match="not a model that onnxruntime can load"):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"nonsense")
        detector_of(f"model:{broken}")


def test_values_that_are_no_probabilities_are_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime (extra erase) is not installed")
    with pytest.raises(SafetyError, match="expected probabilities"):
        detector_of(f"model:{onnx_file(tmp_path / 'sum.onnx', b'ReduceL1')}").scores([spotted()])


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin"])
def test_files_that_can_run_code_are_never_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(SafetyError, match="can run code"):
        detector_of(f"model:{tmp_path / name}")


def test_a_file_that_is_missing_or_not_a_localiser_is_named(tmp_path):
    with pytest.raises(SafetyError, match="no file"):
        detector_of(f"model:{tmp_path / 'none.onnx'}")
    (tmp_path / "other.safetensors").write_bytes(b"short")
    with pytest.raises(ConceptSteerError, match="not a localiser"):
        detector_of(f"model:{tmp_path / 'other.safetensors'}")


# --- boxes from heat maps


def test_each_connected_region_is_a_box_and_edges_fall_between_cells():
    heat = np.zeros((16, 16), np.float32)
    heat[2:5, 3:9] = 0.9
    heat[10:14, 10:15] = 0.7
    heat[9, 15] = 0.7  # touches the second only by a corner
    heat[4, 9] = 0.4  # below the outline
    one, two = regions(heat, 0.5)
    assert one.score == pytest.approx(0.9, abs=1e-5) and two.score == pytest.approx(0.7, abs=1e-5)
    np.testing.assert_allclose(one.box, (3 / 16, 2 / 16, 9 / 16, 5 / 16), atol=0.02)
    np.testing.assert_allclose(two.box[:2], (10 / 16, 10 / 16), atol=0.07)


def test_a_region_below_the_threshold_and_a_speck_flag_nothing():
    heat = np.zeros((64, 64), np.float32)
    heat[10:30, 10:30] = 0.6
    assert not verdict_of_heat("x", heat, (64, 64), 0.7).flagged
    speck = np.zeros((64, 64), np.float32)
    speck[5:8, 5:8] = 1.0
    verdict = verdict_of_heat("x", speck, (64, 64), 0.7)
    assert not verdict.flagged and verdict.boxes == [] and verdict.score < 0.7


def test_a_low_threshold_draws_its_region_at_that_level():
    heat = np.full((16, 16), 0.1, np.float32)
    heat[4:8, 4:8] = 0.3
    verdict = verdict_of_heat("x", heat, (160, 320), 0.2)
    ((_, box),) = verdict.boxes
    assert verdict.flagged and overlap(box, (40, 80, 80, 160)) > 0.8
