"""Model families: detect one from a UNet's own config, describe it in words, explain a mismatch.

SD 1.x, SD 2.x and SDXL all have 1280 channels in the mid block, so a shape alone never decides (needs.md, row 1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from .errors import ConceptSteerError, FamilyMismatch

_CUSTOM = re.compile(r"custom:([1-9]\d{0,6})x([1-9]\d{0,6})")


@dataclass(frozen=True)
class Family:
    """One model family. channels: of the mid block's output. text_width: of the text embedding. The rest: metadata."""

    key: str
    title: str
    channels: int
    text_width: int
    architecture: str
    ss_base: str
    model_channels: int = 0


FAMILIES = MappingProxyType(
    {
        f.key: f
        for f in (
            Family("sd1", "Stable Diffusion 1.x", 1280, 768, "stable-diffusion-v1/concept-vector", "sd_v1", 320),
            Family("sd2", "Stable Diffusion 2.x", 1280, 1024, "stable-diffusion-v2-768-v/concept-vector", "sd_v2", 320),
            Family("sdxl", "SDXL", 1280, 2048, "stable-diffusion-xl-v1-base/concept-vector", "sdxl_base_v1-0", 320),
            Family(
                "sdxl-refiner",
                "SDXL refiner",
                1536,
                1280,
                "stable-diffusion-xl-v1-refiner/concept-vector",
                "sdxl_refiner_v1-0",
                384,
            ),
            Family(
                "demo",
                "the embedded demo model",
                192,
                128,
                "concept-steer-demo/concept-vector",
                "concept_steer_demo",
                64,
            ),
        )
    }
)


def family(key: str) -> Family:
    """The family of that key; also for "custom:<text width>x<channels>". Errors: ConceptSteerError for others."""
    if key in FAMILIES:
        return FAMILIES[key]
    if found := _CUSTOM.fullmatch(key):
        width, channels = int(found[1]), int(found[2])
        title = f"an unlisted model (text width {width}, {channels} mid-block channels)"
        return Family(key, title, channels, width, f"custom-{width}x{channels}/concept-vector", "custom")
    known = ", ".join(FAMILIES)
    raise ConceptSteerError(
        f"The model family {key!r} is not known; known are {known}, and custom:<text width>x<channels> for "
        "other models. If it comes from a newer version, update Concept Steer."
    )


def detect(*, cross_attention_dim: int, channels: int, model_channels: int | None = None) -> str:
    """The family key of a UNet, from its own config; an unlisted model gives "custom:<cross_attention_dim>x<channels>".

    `channels`: of the mid block's output. `model_channels`: of the first convolution, checked when given.
    """
    for f in FAMILIES.values():
        same_width = model_channels is None or model_channels == f.model_channels
        if (cross_attention_dim, channels) == (f.text_width, f.channels) and same_width:
            return f.key
    return f"custom:{cross_attention_dim}x{channels}"


def check(vector_family: str, vector_channels: int, model_family: str, model_channels: int, *, source: str) -> None:
    """Errors: FamilyMismatch when the vector was not made for this model. `source`: the file or the vector's title."""
    if vector_family != model_family:
        raise FamilyMismatch(
            f"{source} was made for {_words(vector_family)}, but this model is {_words(model_family)}. "
            f"Load a model of the first family, or choose a vector that was learned on {_words(model_family)}."
        )
    if vector_channels != model_channels:
        raise FamilyMismatch(
            f"{source} has {vector_channels} channels, but the mid block of this model ({_words(model_family)}) has "
            f"{model_channels}. It fits only models like the one it was learned on: learn it anew on this model."
        )


def _words(key: str) -> str:
    return f"{family(key).title} ({key})"
