"""Discover Directions: what varies in a model's h-space without being asked for, named and shown; Pick Direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
from comfy_api.latest import io, ui
from PIL import Image

from ..concept_steer.analysis.discovery import discover
from ..concept_steer.analysis.strips import STRENGTHS, Strips, contact_sheet
from ..concept_steer.denoiser import Denoiser
from ..concept_steer.errors import ConceptSteerError, LearnError
from ..concept_steer.learn.found import FoundDirection
from ..concept_steer.learn.request import lines_of
from ..concept_steer.pictures import grid
from .common import Vector, denoiser_of, schema, to_image_tensor
from .learn import SEED, SIZE
from .watch import Watch

PCA, JACOBIAN = "what varies from seed to seed (PCA)", "what changes the picture most (Jacobian)"
SEEDS = {PCA: 64, JACOBIAN: 4}
READING, NAMING = 35, 45  # percent of the progress bar at the end of each part; strips take the rest
Directions = io.Custom("CONCEPT_DIRECTIONS")


@dataclass(frozen=True)
class Found:
    """What the socket CONCEPT_DIRECTIONS carries; fewer strips than directions when the run was interrupted."""

    directions: tuple[FoundDirection, ...]
    strips: tuple[Image.Image, ...]


class _Progress(Watch):
    """The node's bar in three parts."""

    def part(self, low: float, high: float) -> Any:
        return lambda done, total: self.at(low + (high - low) * done / max(1, total))


class DiscoverDirections(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerDiscover",
            display_name="Discover Directions",
            description="Finds directions that nobody named: along which this model's inner picture varies, or which "
            "change the result most. Each gets a name and a strip; choose one with Pick Direction.",
            search_aliases=["unsupervised", "pca", "jacobian", "find sliders", "explore"],
            inputs=[
                io.Model.Input("model", tooltip="The model to look into; the vectors will fit models of its family."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="To draw the strips."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a person",
                    tooltip="One a line; they take turns. What they leave open is what can be found.",
                ),
                io.Combo.Input(
                    "method",
                    options=[PCA, JACOBIAN],
                    default=PCA,
                    tooltip="PCA looks at many seeds; the Jacobian looks at few and asks what matters for the picture.",
                ),
                io.Int.Input("count", default=5, min=1, max=32, tooltip="How many directions to find."),
                io.Int.Input(
                    "seeds", default=0, min=0, max=1024, tooltip="Seeds to look at; 0 is 64 for PCA, 4 for Jacobian."
                ),
                SEED,
                SIZE,
                io.Int.Input("rows", default=2, min=1, max=8, tooltip="Rows of each strip, with new seeds."),
                io.Float.Input(
                    "cfg", default=4.0, min=1.0, max=30.0, step=0.1, tooltip="How closely to follow the prompts."
                ),
                io.String.Input(
                    "words",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Prompts to name directions by, one a line; a model's own list when empty.",
                ),
            ],
            outputs=[
                Directions.Output(display_name="directions", tooltip="For Pick Direction."),
                io.Image.Output(display_name="strips", tooltip="A picture for each direction, strength -2 to 2."),
                io.Image.Output(display_name="sheet", tooltip="One row of pictures for each direction."),
                io.String.Output(display_name="report", tooltip="One line for each direction: share and names."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        method: str,
        count: int,
        seeds: int,
        vector_seed: int,
        size: int,
        rows: int,
        cfg: float,
        words: str = "",
    ) -> io.NodeOutput:
        asked = lines_of(prompts)
        if not asked:
            raise LearnError("Give at least one prompt, such as: a person.")
        denoiser = denoiser_of(model, clip, vae, size)
        watch = _Progress(cls.hidden.unique_id, None)
        naming, neutral = _words(denoiser, words)
        try:
            found = discover(
                denoiser,
                asked,
                method="pca" if method == PCA else "jacobian",
                words=naming,
                neutral=neutral,
                count=count,
                seeds=seeds or SEEDS[method],
                guidance=cfg,
                seed=vector_seed,
                batch=16 if method == PCA else 4,
                reading=watch.part(0, READING),
                naming=watch.part(READING, NAMING),
                stop=watch.stop,
            )
        except LearnError:
            if watch.interrupted:  # too early: there is nothing to keep
                raise comfy.model_management.InterruptProcessingException from None
            raise
        drawn = [asked[i % len(asked)] for i in range(rows)]
        strips = Strips(denoiser, drawn, [vector_seed + 1000 + i for i in range(rows)], guidance=cfg)
        return _shown(cls, found, strips, watch)


def _words(denoiser: Denoiser, text: str) -> tuple[list[str], str]:
    """Words and their neutral prompt; () and "" for the usual ones."""
    own = lines_of(text)
    if own or denoiser.family != "demo":
        return own, ""
    from ..concept_steer.demo.words import NEUTRAL, naming_words

    return naming_words(), NEUTRAL


def _shown(cls: Any, found: list[FoundDirection], strips: Strips, watch: _Progress) -> io.NodeOutput:
    pictures: list[Image.Image] = []
    first_rows = []
    share = (100 - NAMING) / len(found)
    for i, direction in enumerate(found):
        if watch.stop():
            break
        images = strips.drawn(direction.vector, watch.part(NAMING + i * share, NAMING + (i + 1) * share))
        first_rows.append(images[0])
        pictures.append(strips.picture(images, direction.vector.name))
    names = [direction.vector.name for direction in found]
    if not pictures:
        pictures = [_without()]
    sheet = contact_sheet(first_rows, names, STRENGTHS, strips.prompts[0]) if first_rows else pictures[0]
    watch.last(sheet)
    report = "\n".join(direction.summary() for direction in found)
    result = Found(tuple(found), tuple(pictures[: len(first_rows)]))
    shown = to_image_tensor([sheet])
    watch.finish()
    preview = ui.PreviewImage(shown, cls=cls)
    return io.NodeOutput(result, to_image_tensor(pictures), shown, report, ui=preview)


def _without() -> Image.Image:
    """What stands in a strip's place when the run was interrupted before it was drawn."""
    return grid([[Image.new("RGB", (512, 64), "white")]], title="not drawn: the run was interrupted", cell=512)


class PickDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerPickDirection",
            display_name="Pick Direction",
            description="One of the directions that Discover Directions found, as a vector like any other. Choosing "
            "another one computes nothing anew.",
            search_aliases=["choose direction", "unsupervised", "pca"],
            inputs=[
                Directions.Input("directions", tooltip="From Discover Directions."),
                io.Int.Input("direction", default=1, min=1, max=32, tooltip="Its number in the report, from 1."),
            ],
            outputs=[
                Vector.Output(display_name="vector", tooltip="Use it in Concept Steer, or save it."),
                io.Image.Output(display_name="strip", tooltip="What it does at strength -2 to 2."),
                io.String.Output(display_name="name", tooltip="Its title: the method, its number, the nearest word."),
            ],
        )

    @classmethod
    def execute(cls, directions: Found, direction: int) -> io.NodeOutput:
        count = len(directions.directions)
        if not 1 <= direction <= count:
            raise ConceptSteerError(
                f"Direction {direction} was asked for, but {count} were found: choose 1 to {count}."
            )
        vector = directions.directions[direction - 1].vector
        strip = directions.strips[direction - 1] if direction <= len(directions.strips) else _without()
        return io.NodeOutput(vector, to_image_tensor([strip]), vector.name)


NODES = [DiscoverDirections, PickDirection]
