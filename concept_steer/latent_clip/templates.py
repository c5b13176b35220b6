"""Prompt templates for zero-shot classification; "{}" stands for the class.

PUBLISHED are the 80 that Radford et al. 2103.00020 made for ImageNet (in the notebooks of openai/CLIP, MIT licence),
with which the zero-shot figures of Latent-CLIP and OpenCLIP are measured; SIMPLE their own selection of 7.
"""

from __future__ import annotations

from ..errors import ConceptSteerError

_A_AND_THE = (  # each with "a" and with "the"
    "a bad photo of", "a low resolution photo of", "a cropped photo of", "a bright photo of", "a dark photo of",
    "a drawing of", "a close-up photo of", "a black and white photo of", "a painting of", "a sculpture of",
    "a rendering of", "a photo of", "a good photo of", "a doodle of", "a sketch of", "a rendition of",
    "a blurry photo of", "a pixelated photo of", "a jpeg corrupted photo of", "art of", "graffiti of", "itap of",
    "a tattoo of",
)  # fmt: skip
_ADJECTIVES = ("hard to see", "clean", "dirty", "cool", "nice", "small", "weird", "large")  # "a photo of a clean {}"
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "plushie", "cartoon")  # "the plastic {}."

PUBLISHED: tuple[str, ...] = (
    *(f"{stem} {article} {{}}." for stem in _A_AND_THE for article in ("a", "the")),
    *(f"a photo of {article} {word} {{}}." for word in _ADJECTIVES for article in ("a", "the")),
    *(f"{article} {word} {{}}." for word in _MATERIALS for article in ("a", "the")),
    *(f"{article} {{}} in a video game." for article in ("a", "the")),
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "itap of my {}.",
)
SIMPLE: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def filled(templates: tuple[str, ...], name: str) -> list[str]:
    """Each template with the name in place of its "{}". Errors: ConceptSteerError for one that has none."""
    for template in templates:
        if template.count("{}") != 1:
            raise ConceptSteerError(f"The template {template!r} must hold {{}} once, where the class belongs.")
    return [template.replace("{}", name) for template in templates]
