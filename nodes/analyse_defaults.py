"""What bare roles take for granted, and how that differs between two models or without and with vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..concept_steer.analysis.charts import change_chart, lean_chart
from ..concept_steer.analysis.defaults import compare, defaults
from ..concept_steer.analysis.word_list import from_lines
from ..concept_steer.demo.auditing import usual_words
from ..concept_steer.errors import ConceptSteerError
from ..concept_steer.pictures import stacked
from ..concept_steer.steering import Steer
from .audit import ATTRIBUTES, ROLES, SEEDS
from .common import Vector, denoiser_of, schema, vectors_of
from .look import CLIP, MODEL, PICTURE, REPORT, begin, interruptible, shown


class Defaults(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerDefaults",
            display_name="Defaults",
            description="Which value of an attribute each role's bare prompt takes for granted, read from the model "
            "without drawing a picture.",
            search_aliases=["bias", "fairness", "analyse", "stereotypes"],
            inputs=[MODEL, CLIP, ROLES, ATTRIBUTES, SEEDS],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, roles: str, attributes: str, seeds: int) -> io.NodeOutput:
        denoiser, watch, reader = begin(cls, model, clip, seeds, predicted=True)
        words = from_lines(usual_words(denoiser.family), roles, attributes, "")
        with interruptible():
            found = defaults(reader, words, progress=lambda done, total: watch.at(99 * done / total))
        by = {name: [one for one in found if one.attribute == name] for name in words.attributes}
        chart = stacked([lean_chart(mine, name) for name, mine in by.items()])
        return shown(cls, watch, chart, [f"{one.attribute}, {one.text()}" for one in found])


class CompareDefaults(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerCompare",
            display_name="Compare Defaults",
            description="Defaults of two models, or of one without and with vectors: what changed, by role.",
            search_aliases=["analyse", "before after", "bias", "difference"],
            inputs=[
                MODEL,
                CLIP,
                ROLES,
                ATTRIBUTES,
                SEEDS,
                io.Model.Input("other_model", optional=True, tooltip="Another model; connect its CLIP too."),
                io.Clip.Input("other_clip", optional=True, tooltip="The other model's text encoder."),
                Vector.Input("vector", optional=True, tooltip="Or a vector that acts in the second reading."),
                io.Float.Input(
                    "strength", default=1.0, min=-3.0, max=3.0, step=0.05, optional=True, tooltip="Of the vector."
                ),
            ],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        roles: str,
        attributes: str,
        seeds: int,
        other_model: Any = None,
        other_clip: Any = None,
        vector: Any = None,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        if (other_model is None) == (vector is None):
            raise ConceptSteerError("Connect either another model (with its CLIP) or a vector to compare with.")
        denoiser, watch, reader = begin(cls, model, clip, seeds, predicted=True)
        words = from_lines(usual_words(denoiser.family), roles, attributes, "")
        other, steered = reader, None
        if vector is not None:
            steers = [Steer(one, strength) for one in vectors_of(vector)]
            acting = replace(reader, steers=[steers] * seeds, _inputs=[])
            steered = dict.fromkeys(words.attributes, acting)
        else:
            other = replace(reader, denoiser=denoiser_of(other_model, other_clip or clip, None, 0), _inputs=[])
        with interruptible():
            before = defaults(reader, words, progress=lambda done, total: watch.at(49 * done / total))
            after = defaults(
                other, words, steered=steered, progress=lambda done, total: watch.at(49 + 49 * done / total)
            )
        changes = compare(before, after)
        by = {name: [one for one in changes if one.attribute == name] for name in words.attributes}
        chart = stacked([change_chart(mine, f"{name} (grey: before)") for name, mine in by.items()])
        lines = [f"{c.attribute}, {c.role}: lean {c.before.lean[0]:+.2f}, then {c.after.lean[0]:+.2f}" for c in changes]
        return shown(cls, watch, chart, lines)


NODES = [Defaults, CompareDefaults]
