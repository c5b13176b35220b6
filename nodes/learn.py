"""Learn Concept: from prompts or from pictures, with the model that is in the graph."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..concept_steer.denoiser import Denoiser
from ..concept_steer.errors import LearnError
from ..concept_steer.learn import LearnResult, learn_difference, learn_pictures, learn_score
from ..concept_steer.learn.preview import Preview, learning_curve
from ..concept_steer.pictures import stacked
from ..concept_steer.vector import ConceptVector
from .common import Vector, schema, to_image_tensor, to_pixels

SCORE, DIFFERENCE = "the model's own predictions (best)", "difference of means (fastest)"
CACHING = 40  # percent of the progress bar that drawing trajectories takes
PREVIEWS = 4  # live previews while learning
PICTURE_STEPS = 100


class _Watch:
    """Progress bar with live preview, and ComfyUI's Interrupt button: it ends learning, the best so far is kept."""

    def __init__(self, node_id: Any, preview: Preview | None) -> None:
        self.bar = comfy.utils.ProgressBar(100, node_id=node_id)
        self.preview = preview
        self.interrupted = False

    def stop(self) -> bool:
        self.interrupted = self.interrupted or comfy.model_management.processing_interrupted()
        return self.interrupted

    def caching(self, done: int, total: int) -> None:
        self._at(CACHING * done / total)

    def step(self, step: int, steps: int, loss: float, vector: ConceptVector) -> None:
        image = None
        if self.preview is not None and step % max(1, steps // PREVIEWS) == 0 and not self.stop():
            image = self.preview.sheet(vector, f"step {step} of {steps}, loss {loss:.3f}")
        self._at(CACHING + (100 - CACHING) * step / steps, image)

    def last(self, image: Image.Image) -> None:
        """The page goes on showing a node's last live picture in front of its outputs: let it be the right one."""
        self._at(100, image, 1024)

    def _at(self, percent: float, image: Image.Image | None = None, side: int = 768) -> None:
        if self.stop():
            return
        try:
            self.bar.update_absolute(int(percent), 100, None if image is None else ("JPEG", image, side))
        except comfy.model_management.InterruptProcessingException:
            self.interrupted = True  # the bar asks too; it must not throw away what has been learned

    def finish(self) -> None:
        """Let the rest of the graph stop, as the button asked; the vector stays on this node for the next run."""
        if self.interrupted:
            comfy.model_management.interrupt_current_processing(True)


def _denoiser(model: Any, clip: Any, vae: Any, size: int) -> Denoiser:
    from ..concept_steer.hosts.comfy_denoiser import ComfyDenoiser

    return ComfyDenoiser(model, clip, vae, size or None)


def _learned(cls: Any, result: LearnResult, watch: _Watch) -> io.NodeOutput:
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


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def pairs_of(neutral: str, positive: str) -> list[tuple[str, str]]:
    """One pair a line; a single line on one side goes with every line of the other."""
    low, high = _lines(neutral), _lines(positive)
    if not low or not high:
        raise LearnError("Give both: a neutral prompt (a doctor) and one with the concept (a woman doctor).")
    if len(low) != len(high) and 1 not in (len(low), len(high)):
        raise LearnError(
            f"There are {len(low)} neutral prompts and {len(high)} with the concept: give the same number of lines, "
            "or a single line on one side."
        )
    count = max(len(low), len(high))
    return [(low[i % len(low)], high[i % len(high)]) for i in range(count)]


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
SPATIAL = io.Boolean.Input(
    "spatial", default=False, tooltip="On: a map over the picture instead of one value per channel. Needs more steps."
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
                    options=[SCORE, DIFFERENCE],
                    default=SCORE,
                    tooltip="The first learns until strength 1 does what the prompt does; the second takes a mean.",
                ),
                io.Int.Input(
                    "steps", default=100, min=1, max=5000, tooltip="Most steps of learning; it may end sooner."
                ),
                io.Int.Input(
                    "examples",
                    default=32,
                    min=2,
                    max=512,
                    tooltip="Noisy pictures to learn from: more are surer, slower.",
                ),
                SEED,
                io.String.Input(
                    "title", default="", tooltip="The vector's name; empty: the first prompt with the concept."
                ),
                SIZE,
                SPATIAL,
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
        pairs = pairs_of(neutral, positive)
        denoiser = _denoiser(model, clip, vae, size)
        prompts = [pairs[i % len(pairs)][0] for i in range(4)]
        preview = None if vae is None else Preview(denoiser, prompts, [vector_seed + 1000 + i for i in range(4)])
        watch = _Watch(cls.hidden.unique_id, preview)
        common: dict[str, Any] = {"seed": vector_seed, "title": title.strip(), "spatial": spatial}
        try:
            if method == DIFFERENCE:
                result = learn_difference(denoiser, pairs, progress=lambda i, n: watch.caching(i, n), **common)
            else:
                result = learn_score(
                    denoiser,
                    pairs,
                    steps=steps,
                    trajectories=examples,
                    caching=watch.caching,
                    progress=watch.step,
                    stop=watch.stop,
                    **common,
                )
        except LearnError:
            if watch.interrupted:  # before its first step: there is nothing to keep
                raise comfy.model_management.InterruptProcessingException from None
            raise
        return _learned(cls, result, watch)


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
                io.Int.Input("steps", default=PICTURE_STEPS, min=1, max=5000, tooltip="Most steps; it may end sooner."),
                SEED,
                io.String.Input("title", default="my concept", tooltip="The vector's name."),
                SIZE,
                SPATIAL,
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
        denoiser = _denoiser(model, clip, vae, size)
        preview = Preview(denoiser, [prompt] * 4, [vector_seed + 1000 + i for i in range(4)])
        watch = _Watch(cls.hidden.unique_id, preview)
        try:
            result = learn_pictures(
                denoiser,
                to_pixels(images),
                prompt,
                without=None if without is None else to_pixels(without),
                steps=steps,
                seed=vector_seed,
                title=title.strip(),
                spatial=spatial,
                caching=watch.caching,
                progress=watch.step,
                stop=watch.stop,
            )
        except LearnError:
            if watch.interrupted:
                raise comfy.model_management.InterruptProcessingException from None
            raise
        return _learned(cls, result, watch)


NODES = [LearnConceptPrompts, LearnConceptPictures]
