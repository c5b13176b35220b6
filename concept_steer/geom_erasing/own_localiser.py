"""Localisers in files of the user's own: ONNX, or the layout of the embedded one. Neither can run code when loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import SafetyError
from ..safety.detectors import Detector, Verdict, package_of
from .regions import verdict_of_heat

MODEL = "model:"  # before the file's name, where a detector is named
DEMO = "..demo.localiser"  # the embedded model's, loaded when it is asked for


def load_file(path: Path, limits: Mapping[str, float]) -> Detector:
    """The localiser in a file, by its ending. Errors: SafetyError."""
    if path.suffix.lower() not in (".onnx", ".safetensors"):
        raise SafetyError(
            f"{path.name!r} cannot be a detector: expected a file .onnx or .safetensors. Pickles and TorchScript "
            "(.pt, .pth) can run code when loaded, so they are never opened; export the model to ONNX."
        )
    if not path.is_file():
        raise SafetyError(f"There is no file {path}: check what stands behind {MODEL!r}.")
    return OnnxLocaliser(path, **limits) if path.suffix.lower() == ".onnx" else FileLocaliser(path, **limits)


class OnnxLocaliser:
    """Any localiser of the user's own: an ONNX file, run by onnxruntime on the CPU.

    Its layout: one input (1, 3, S, S), the whole picture scaled to S x S (whatever its shape), RGB from 0 to 1; one
    output (1, 1, h, w), probabilities from 0 to 1 of where the thing is. S is read from the file; a file that leaves it
    open gets 256. What it finds is called as the file, "-" and "_" read as spaces. Weights must be in the file itself.
    """

    OPEN_SIDE, LARGEST_SIDE = 256, 2048
    MAX_BYTES = 2**30

    def __init__(self, path: Path, threshold: float = 0.5) -> None:
        self.path, self.threshold = path, threshold
        self.name = f"{MODEL}{path.name}"
        self.concept = _spoken(path)
        runtime = package_of("onnxruntime", "onnxruntime")
        if path.stat().st_size > self.MAX_BYTES:
            raise SafetyError(f"{path} is larger than {self.MAX_BYTES // 2**20} MB: no localiser is expected to be.")
        data = path.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:  # from bytes, so that the file cannot name others
            self._session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise SafetyError(f"{path} is not a model that onnxruntime can load ({str(error)[:200]}).") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(inputs) != 1 or len(outputs) != 1 or len(shape) != 4 or shape[1] != 3 or "float" not in inputs[0].type:
            told = [list(one.shape) for one in inputs], [list(one.shape) for one in outputs]
            raise SafetyError(
                f"{path} has inputs {told[0]} and outputs {told[1]}; expected one input (1, 3, S, S) of float32 and "
                "one output (1, 1, h, w) of probabilities."
            )
        height, width = (side if isinstance(side, int) else self.OPEN_SIDE for side in shape[2:])
        if not 0 < height <= self.LARGEST_SIDE or not 0 < width <= self.LARGEST_SIDE:
            raise SafetyError(f"{path} looks at {width} x {height} px; expected at most {self.LARGEST_SIDE} a side.")
        self._input, self._size = inputs[0].name, (width, height)

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [verdict_of_heat(self.concept, self._heat(one), one.size, self.threshold) for one in images]

    def _heat(self, image: Image.Image) -> np.ndarray:
        small = image.convert("RGB").resize(self._size, Image.Resampling.BILINEAR)
        pixels = np.asarray(small, np.float32).transpose(2, 0, 1)[None] / 255
        heat = np.asarray(self._session.run(None, {self._input: pixels})[0])
        if heat.ndim != 4 or heat.shape[:2] != (1, 1) or not 0 < max(heat.shape) <= self.LARGEST_SIDE:
            raise SafetyError(f"{self.path} gave an output of shape {heat.shape}; expected a heat map (1, 1, h, w).")
        if not np.isfinite(heat).all() or heat.min() < -1e-3 or heat.max() > 1 + 1e-3:
            raise SafetyError(
                f"{self.path} gave values from {heat.min():.3g} to {heat.max():.3g}; expected probabilities from 0 to "
                "1 (end the model with a sigmoid)."
            )
        return heat[0, 0].astype(np.float32)


class FileLocaliser:
    """A localiser in the layout of the embedded one (`demo.train_localiser`): each of its concepts, under its name."""

    def __init__(self, path: Path, threshold: float = 0.5) -> None:
        demo = import_module(DEMO, __package__)
        self.name, self.threshold = f"{MODEL}{path.name}", threshold
        net = demo.Localiser(path)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        self._parts = [demo.DemoLocaliser(concept, threshold, net) for concept in net.concepts]

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        found = zip(*(part.scores(images) for part in self._parts), strict=True)
        return [
            Verdict(
                any(one.flagged for one in each),
                max(one.score for one in each),
                {name: score for one in each for name, score in one.categories.items()},
                [box for one in each for box in one.boxes],
            )
            for each in found
        ]


def _spoken(path: Path) -> str:
    words = re.sub(r"[-_\s]+", " ", path.stem).strip()
    if not words:
        raise SafetyError(f"{path.name!r} names no thing: call the file what it finds, such as company-logo.onnx.")
    return words
