"""Learn Concept: from prompts or from pictures, with the model that is in the graph."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..concept_steer.errors import LearnError
from ..concept_steer.learn import LearnResult
from ..concept_steer.learn.preview import Preview, learning_curve
from ..concept_steer.learn.request import METHODS, PICTURES, STEPS, LearnRequest
from ..concept_steer.pictures import stacked
from .common import Vector, denoiser_of, schema, to_image_tensor, to_pixels
from .watch import Watch

WORDS = {words: method for method, words in METHODS.items() if method != PICTURES}


def _learned(cls: Any, result: LearnResult, watch: Watch) -> io.NodeOutput:
    """Vector, report and before/after picture; the picture, and the curve where there is one, on the node."""
    pictures = []
    if watch.preview is not None:
        pictures.append(watch.preview.sheet(result.vector, "before and after"))
    if result.losses or not pictures:
        pictures.append(learning_curve(result))
    if watch.preview is not None:
        watch.last(stacked(pictures))
    shown = [to_image_tensor([picture]) for picture in pictures]
    saved = [image for picture in shown for image in ui.PreviewImage(picture, cls=cls).as_dict()["images"]]
    watch.finish()
    return io.NodeOutput(result.vector, result.summary(), shown[0], ui={"images": saved, "animated": (False,)})


def _learn(request: LearnRequest, denoiser: Any, watch: Watch, pixels: Any = None, without: Any = None) -> LearnResult:
    try:
        return request.run(denoiser, pixels, without, caching=watch.caching, progress=watch.step, stop=watch.stop)
    except LearnError:
        if watch.interrupted:  # before its first step: there is nothing to keep
            raise comfy.model_management.InterruptProcessingException from None
        raise


OUTPUTS = [
    Vector.Output(display_name="vector", tooltip="Use it at once in Concept Steer, or save it."),
    io.String.Output(display_name="report", tooltip="How learning went, in words."),
    io.Image.Output(display_name="before / after", tooltip="The same seeds without and with the vector."),
]
SEED = io.Int.Input(
    "vector_seed", default=0, min=0, max=2**31 - 1, tooltip="Same seed, same vector. It is not changed by running."
)
SIZE = io.Int.Input(
    "size", default=0, min=0, max=2048, step=64, tooltip="Side of the pictures to learn on; 0 is the model's own size."
)
MAP = "On: a map over the picture instead of one value per channel. Needs more steps."
AUTOMATIC = (
    "Off: one value per channel, and a map over the picture by itself where that says too little. On: a map at once."
)


class LearnConceptPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLearnPrompts",
            display_name="Learn Concept (Prompts)",
            description="Learns a concept vector from prompts without and with the concept, on this graph's model, "
            "in seconds to minutes. Interrupt keeps the best so far. Nothing of the model is changed.",
            search_aliases=["train", "learn vector", "slider training", "concept from text"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on; the vector will fit models of its family."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.String.Input(
                    "neutral",
                    multiline=True,
                    default="a doctor\na detective\na scientist\na villain",
                    tooltip="Prompts without the concept, one a line. Several make the vector more general.",
                ),
                io.String.Input(
                    "positive",
                    multiline=True,
                    default="a woman doctor\na woman detective\na woman scientist\na woman villain",
                    tooltip="The same prompts with the concept, line by line.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(WORDS),
                    default=METHODS["score"],
                    tooltip="The first learns until strength 1 does what the prompt does; the second takes a mean; "
                    "the third draws pictures and learns from them, as published with 1000 examples and 2500 steps.",
                ),
                io.Int.Input(
                    "steps",
                    default=STEPS["score"],
                    min=1,
                    max=5000,
                    tooltip="Most steps of learning; it may end sooner.",
                ),
                io.Int.Input(
                    "examples",
                    default=32,
                    min=2,
                    max=1000,
                    tooltip="Noisy pictures to learn from: more are surer, slower.",
                ),
                SEED,
                io.String.Input(
                    "title", default="", tooltip="The vector's name; empty: the first prompt with the concept."
                ),
                SIZE,
                io.Boolean.Input("spatial", default=False, tooltip=AUTOMATIC),
                io.Vae.Input("vae", optional=True, tooltip="For the live before/after pictures."),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        neutral: str,
        positive: str,
        method: str,
        steps: int,
        examples: int,
        vector_seed: int,
        title: str = "",
        size: int = 0,
        spatial: bool = False,
        vae: Any = None,
    ) -> io.NodeOutput:
        request = LearnRequest(
            WORDS[method],
            neutral,
            positive,
            steps=steps,
            examples=examples,
            seed=vector_seed,
            title=title,
            spatial=spatial,
        )
        prompts = request.preview_prompts()
        denoiser = denoiser_of(model, clip, vae, size)
        preview = None if vae is None else Preview(denoiser, prompts, [vector_seed + 1000 + i for i in range(4)])
        watch = Watch(cls.hidden.unique_id, preview)
        return _learned(cls, _learn(request, denoiser, watch), watch)


class LearnConceptPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLearnPictures",
            display_name="Learn Concept (Pictures)",
            description="Learns a personal concept from 5 to 20 pictures and a word for what they show, on the model "
            "in this graph. A second batch may show the same without the concept.",
            search_aliases=["train", "personal concept", "style", "few-shot", "images to vector"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on; the vector will fit models of its family."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE: it reads the pictures."),
                io.Image.Input("images", tooltip="5 to 20 pictures of the concept, of one size."),
                io.String.Input("prompt", default="a person", tooltip="What the pictures show, without the concept."),
                io.Int.Input(
                    "steps", default=STEPS[PICTURES], min=1, max=5000, tooltip="Most steps; it may end sooner."
                ),
                SEED,
                io.String.Input("title", default="my concept", tooltip="The vector's name."),
                SIZE,
                io.Boolean.Input("spatial", default=False, tooltip=MAP),
                io.Image.Input(
                    "without",
                    optional=True,
                    tooltip="Pictures of the same without the concept: what both share is then not learned.",
                ),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        images: torch.Tensor,
        prompt: str,
        steps: int,
        vector_seed: int,
        title: str = "",
        size: int = 0,
        spatial: bool = False,
        without: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        request = LearnRequest(PICTURES, prompt=prompt, steps=steps, seed=vector_seed, title=title, spatial=spatial)
        denoiser = denoiser_of(model, clip, vae, size)
        preview = Preview(denoiser, request.preview_prompts(), [vector_seed + 1000 + i for i in range(4)])
        watch = Watch(cls.hidden.unique_id, preview)
        reference = None if without is None else to_pixels(without)
        return _learned(cls, _learn(request, denoiser, watch, to_pixels(images), reference), watch)


NODES = [LearnConceptPrompts, LearnConceptPictures]
