"""What finds unasked things in pictures, with boxes: behind the protocol of the safety detectors.

Each is loaded when it is asked for, and a missing package is an error that says what to install (`pip install
'concept-steer[erase]'` brings all but NudeNet). Their weights come with their own wheels; nothing is fetched at run
time. `detector.concept` is the thing's name as captions call it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConceptSteerError, SafetyError
from ..safety.detectors import Box, Detector, NudeNet, Verdict, as_bgr, package_of
from .own_localiser import DEMO, MODEL, load_file

QR_SCALES = (1, 2, 3)  # small codes are found on an enlarged copy only
QR_LONGEST = 3000  # px: an enlarged copy is not made any larger
FEWEST_LETTERS = 3  # a reader sees "00" in a pair of eyes and "中" in a sword, and is sure of it
OCR_WEIGHTS = ("det", "rec", "cls")
# Who marks pictures, and how: as whole words of what is read, in lower case.
WATERMARK_WORDS = (
    "watermark", "sample", "preview", "proof", "copyright", "all rights reserved", "stock", "stock photo",
    "shutterstock", "istock", "istockphoto", "getty images", "gettyimages", "alamy", "dreamstime", "123rf",
    "depositphotos", "adobe stock", "adobestock", "bigstock", "freepik", "vecteezy", "canstock", "pond5", "pixta",
    "stocksy", "envato", "vectorstock", "agefotostock", "masterfile", "corbis", "reuters", "demo",
)  # fmt: skip
_SIGNS = re.compile(r"©|\(c\)|\bwww\b|https?:|\b[\w-]+\.(com|net|org|photo|photos|art|io|co|de|jp|cn|ru)\b")


class QRCodes:
    """QR codes, by OpenCV (`pip install opencv-python-headless`), also on a copy enlarged two and three times.

    score: 1 for a code that can be read, .5 for one of which only the pattern is seen. The default threshold, .5, takes
    both; anything above takes only codes that can be read.
    """

    name, concept = "qr", "qr code"

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self._cv2 = package_of("cv2", "opencv-python-headless")
        # the younger one, by ArUco markers, sees nearly all; the other one is asked about what it leaves
        younger = getattr(self._cv2, "QRCodeDetectorAruco", None)
        self._nets = [net() for net in (younger, self._cv2.QRCodeDetector) if net is not None]

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [self._verdict(image) for image in images]

    def _verdict(self, image: Image.Image) -> Verdict:
        array = as_bgr(image)
        codes: list[tuple[float, Box]] = []
        for scale in QR_SCALES:
            if scale > 1 and scale * max(image.size) > QR_LONGEST:
                break
            for net in self._nets:
                for score, box in self._codes(net, array, scale):
                    _keep(codes, score, box)
                if any(score == 1 for score, _ in codes):
                    return self._told(codes, image)
        return self._told(codes, image)

    def _told(self, codes: Sequence[tuple[float, Box]], image: Image.Image) -> Verdict:
        return _verdict_of(self.concept, [(s, _inside(box, image.size)) for s, box in codes], self.threshold)

    def _codes(self, net: Any, array: np.ndarray, scale: int) -> list[tuple[float, Box]]:
        size = (array.shape[1] * scale, array.shape[0] * scale)
        larger = array if scale == 1 else self._cv2.resize(array, size, interpolation=self._cv2.INTER_CUBIC)
        seen, corners = net.detectMulti(larger)
        if not seen or corners is None:
            return []
        read, texts = net.decodeMulti(larger, corners)[:2]
        known = [bool(text) for text in texts] if read else [False] * len(corners)
        return [(1.0 if k else 0.5, _around(c / scale)) for k, c in zip(known, corners, strict=True)]


class WrittenText:
    """Written words, by RapidOCR (`pip install rapidocr onnxruntime`, Apache-2.0; PP-OCR weights in its wheel).

    score: how sure the reading of a line is (its reader's confidence). threshold: of that; the default is .5. Lines of
    one or two letters are left out: in drawings they are shapes far more often than words.
    """

    name, concept = "text", "text"

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self._read = _reader()

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [self._verdict(image) for image in images]

    def _verdict(self, image: Image.Image) -> Verdict:
        found = [
            (score, _inside(_around(c), image.size)) for text, score, c in self._lines(image) if self._wanted(text)
        ]
        return _verdict_of(self.concept, found, self.threshold)

    def _lines(self, image: Image.Image) -> list[tuple[str, float, np.ndarray]]:
        found = self._read(as_bgr(image))
        if found.boxes is None or found.txts is None:
            return []
        return [(t, float(s), np.asarray(c)) for t, s, c in zip(found.txts, found.scores, found.boxes, strict=True)]

    def _wanted(self, text: str) -> bool:
        return sum(letter.isalnum() for letter in text) >= FEWEST_LETTERS


class Watermarks(WrittenText):
    """Watermarks that are words: lines that name a stock agency or an address, or say "sample", "©" and the like.

    By RapidOCR, as `WrittenText`. Logos without words, and patterns, it cannot see: give a localiser of your own as
    `model:FILE`. words: more of them, in lower case.
    """

    name, concept = "watermark", "watermark"

    def __init__(self, threshold: float = 0.5, words: Sequence[str] = WATERMARK_WORDS) -> None:
        super().__init__(threshold)
        joined = "|".join(re.escape(word).replace(r"\ ", r"\s*") for word in sorted(words, key=len, reverse=True))
        self._words = re.compile(rf"(?<!\w)(?:{joined})(?!\w)")

    def _wanted(self, text: str) -> bool:
        plain = text.lower()
        return bool(self._words.search(plain) or _SIGNS.search(plain))


class Nudity(NudeNet):
    """NudeNet's boxes (see `safety.detectors.NudeNet`) under one name for captions."""

    concept = "nudity"


def _demo(concept: str) -> Callable[..., Detector]:
    def made(threshold: float = 0.5) -> Detector:
        return import_module(DEMO, __package__).DemoLocaliser(concept, threshold)

    return made


KNOWN: dict[str, Callable[..., Detector]] = {
    "qr": QRCodes,
    "text": WrittenText,
    "watermark": Watermarks,
    "nudenet": Nudity,
    "demo-watermark": _demo("watermark"),
    "demo-qr": _demo("qr"),
    "demo-text": _demo("text"),
}


def detector_of(name: str, threshold: float | None = None) -> Detector:
    """A detector by its name in `KNOWN`, or "model:FILE" for a localiser of one's own (.onnx, or .safetensors in the
    layout of the embedded one). threshold: 0 to 1; None is the detector's own.

    Errors: SafetyError (or its base) when it is not known or cannot be loaded, with what to install.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise SafetyError(f"The threshold of the detector {name!r} is {threshold!r}; expected above 0, up to 1.")
    limits = {} if threshold is None else {"threshold": threshold}
    if name not in KNOWN and not name.startswith(MODEL):
        raise SafetyError(f"There is no detector {name!r}; there are {', '.join(KNOWN)} and {MODEL}FILE.")
    try:
        if name.startswith(MODEL):
            return load_file(Path(name.removeprefix(MODEL)).expanduser(), limits)
        return KNOWN[name](**limits)
    except ConceptSteerError:
        raise
    except Exception as error:  # whatever it is: a detector that does not load must not be taken for one that is silent
        raise SafetyError(
            f"The detector {name!r} cannot be loaded ({type(error).__name__}: {error}). Repair its installation, or "
            "choose another."
        ) from error


def detector_spec(text: str) -> Detector:
    """NAME[=THRESHOLD], as on a command line. Errors: SafetyError."""
    name, sign, number = text.rpartition("=")
    if sign:
        try:
            return detector_of(name, float(number))
        except ValueError:
            if not text.startswith(MODEL):  # a file's name may hold "="
                raise SafetyError(
                    f"The detector {text!r} is not NAME=THRESHOLD with a number from 0 to 1, for example qr=0.5."
                ) from None
    return detector_of(text)


def _reader() -> Any:
    """RapidOCR on the weights in its own wheel. Named one by one: it downloads what it does not find."""
    package = package_of("rapidocr", "rapidocr (with onnxruntime)")
    package_of("onnxruntime", "onnxruntime")
    folder = Path(str(package.__file__)).parent / "models"
    params: dict[str, Any] = {"Global.log_level": "error"}
    for part in OCR_WEIGHTS:
        files = sorted(folder.glob(f"*_{part}_*.onnx"))
        if len(files) != 1:
            raise SafetyError(
                f"RapidOCR's weights are not in its package ({len(files)} files *_{part}_*.onnx in {folder}): install "
                "it anew with pip install --force-reinstall 'rapidocr>=3.9'."
            )
        params[f"{part.capitalize()}.model_path"] = str(files[0])
    return package.RapidOCR(params=params)


def _around(corners: np.ndarray) -> Box:
    """The upright box (left, top, width, height) around corners (n, 2)."""
    left, top = (math.floor(value) for value in corners.min(0))
    right, bottom = (math.ceil(value) for value in corners.max(0))
    return left, top, right - left, bottom - top


def _inside(box: Box, size: tuple[int, int]) -> Box:
    """What of the box is in a picture of `size` (width, height); at least one pixel."""
    left, top = (min(max(0, low), side - 1) for low, side in zip(box[:2], size, strict=True))
    right, bottom = min(size[0], box[0] + box[2]), min(size[1], box[1] + box[3])
    return left, top, max(1, right - left), max(1, bottom - top)


def _keep(codes: list[tuple[float, Box]], score: float, box: Box) -> None:
    """Add a code, or raise the score of the one that is at its place already."""
    for i, (known, other) in enumerate(codes):
        x, y = other[0] + other[2] / 2, other[1] + other[3] / 2
        if box[0] <= x <= box[0] + box[2] and box[1] <= y <= box[1] + box[3]:
            codes[i] = (max(known, score), other)
            return
    codes.append((score, box))


def _verdict_of(concept: str, found: Sequence[tuple[float, Box]], threshold: float) -> Verdict:
    score = max((score for score, _ in found), default=0.0)
    boxes = [(concept, box) for one, box in found if one >= threshold]
    return Verdict(bool(boxes), score, {concept: score}, boxes)
