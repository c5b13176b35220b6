"""One look at a time into what a model associates: defaults, descriptors, associations, a map, names, a comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..concept_steer.analysis import maps
from ..concept_steer.analysis.associations import associations, descriptors
from ..concept_steer.analysis.audit import AuditSettings
from ..concept_steer.analysis.charts import change_chart, heat_map, lean_chart, map_picture
from ..concept_steer.analysis.defaults import compare, defaults
from ..concept_steer.analysis.naming import context_directions, nearest
from ..concept_steer.analysis.reading import Reader
from ..concept_steer.analysis.word_list import WordList, from_lines, in_contexts, name_of
from ..concept_steer.demo.auditing import usual_words
from ..concept_steer.denoiser import Denoiser
from ..concept_steer.errors import ConceptSteerError
from ..concept_steer.learn.request import lines_of
from ..concept_steer.pictures import stacked
from ..concept_steer.plots import card
from ..concept_steer.steering import Steer
from .audit import ATTRIBUTES, ROLES, SEEDS
from .common import Vector, denoiser_of, schema, to_image_tensor, vectors_of
from .watch import Watch

MODEL = io.Model.Input("model", tooltip="The model to look into. It is not changed.")
CLIP = io.Clip.Input("clip", tooltip="Its text encoder.")
WORDS = io.String.Input(
    "words", multiline=True, default="", tooltip="One a line; empty braces stand for a person. Empty: the usual ones."
)
PROMPTS = io.String.Input("prompts", multiline=True, default="", tooltip="One a line. Empty: the usual roles.")
PICTURE = io.Image.Output(display_name="picture", tooltip="The chart.")
REPORT = io.String.Output(display_name="report", tooltip="The same in words and figures.")


class _Look(Watch):
    """A node's bar for one reading; Interrupt ends it, and nothing is kept."""

    def read(self, reader: Reader, prompts: list[str]) -> dict[str, torch.Tensor]:
        try:
            return reader.read(prompts, lambda done, total: self.at(99 * done / total))
        except KeyboardInterrupt:
            raise comfy.model_management.InterruptProcessingException from None


def _begin(cls: Any, model: Any, clip: Any, seeds: int, predicted: bool = False) -> tuple[Denoiser, _Look, Reader]:
    denoiser = denoiser_of(model, clip, None, 0)
    watch = _Look(cls.hidden.unique_id, None)
    standard = AuditSettings().defaults if predicted else AuditSettings().space
    settings = replace(standard, seeds=seeds, neutral=usual_words(denoiser.family).neutral)
    return denoiser, watch, Reader(denoiser, settings, batch=16, stop=watch.stop)


def _shown(cls: Any, watch: Watch, image: Image.Image, lines: list[str]) -> io.NodeOutput:
    watch.last(image)
    shown = to_image_tensor([image])
    return io.NodeOutput(shown, "\n".join(lines), ui=ui.PreviewImage(shown, cls=cls))


def _table(words: str, usual_list: WordList) -> dict[str, str]:
    given = {name_of(word): word.replace("{}", usual_list.neutral) for word in lines_of(words)}
    return given or usual_list.directions()


def _prompts(text: str, usual_list: WordList) -> dict[str, str]:
    return {line: line for line in lines_of(text)} or {role: usual_list.prompt(role) for role in usual_list.roles}


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
        denoiser, watch, reader = _begin(cls, model, clip, seeds, predicted=True)
        words = from_lines(usual_words(denoiser.family), roles, attributes, "")
        try:
            found = defaults(reader, words, progress=lambda done, total: watch.at(99 * done / total))
        except KeyboardInterrupt:
            raise comfy.model_management.InterruptProcessingException from None
        by = {name: [one for one in found if one.attribute == name] for name in words.attributes}
        chart = stacked([lean_chart(mine, name) for name, mine in by.items()])
        return _shown(cls, watch, chart, [f"{one.attribute}, {one.text()}" for one in found])


class Descriptors(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerDescriptors",
            display_name="Descriptors",
            description="Ranks words by how near they lie to a concept in the model's inner picture.",
            search_aliases=["associations", "analyse", "words"],
            inputs=[
                MODEL,
                CLIP,
                io.String.Input("concept", default="a nurse", tooltip="A prompt, such as: a nurse."),
                WORDS,
                SEEDS,
            ],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concept: str, words: str, seeds: int) -> io.NodeOutput:
        denoiser, watch, reader = _begin(cls, model, clip, seeds)
        table, neutral = _table(words, usual_words(denoiser.family)), reader.settings.neutral
        h = watch.read(reader, [neutral, concept.strip(), *table.values()])
        named = {name: h[prompt] for name, prompt in table.items()}
        ranked = descriptors(h[concept.strip()], named, h[neutral])
        rows = [(name, f"{value:+.2f}   ({low:+.2f} to {high:+.2f})") for name, value, low, high in ranked]
        picture = card(f"{concept.strip()}: nearest words (cosine)", rows[:24])
        return _shown(cls, watch, picture, [f"{name}: {text}" for name, text in rows])


class AssociationMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerAssociations",
            display_name="Associations",
            description="Prompts against words as a heat map: which lie nearer to each other than the rest.",
            search_aliases=["heat map", "analyse", "bias", "words"],
            inputs=[MODEL, CLIP, PROMPTS, WORDS, SEEDS],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, prompts: str, words: str, seeds: int) -> io.NodeOutput:
        denoiser, watch, reader = _begin(cls, model, clip, seeds)
        listed, neutral = usual_words(denoiser.family), reader.settings.neutral
        rows, table = _prompts(prompts, listed), _table(words, listed)
        h = watch.read(reader, [neutral, *rows.values(), *table.values()])
        found = associations(
            {name: h[prompt] for name, prompt in rows.items()},
            {name: h[prompt] for name, prompt in table.items()},
            h[neutral],
        )
        lines = [f"{row} with {column}: {value:+.2f}" for row, column, value in found.strongest(20)]
        return _shown(cls, watch, heat_map(found, "Associations (cosine, hundredths)"), lines)


class ConceptMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerMap",
            display_name="Concept Map",
            description="Prompts in two dimensions by likeness to the model, in clusters named by their nearest words.",
            search_aliases=["clusters", "pca", "analyse", "embedding"],
            inputs=[
                MODEL,
                CLIP,
                PROMPTS,
                WORDS,
                io.Int.Input("clusters", default=0, min=0, max=12, tooltip="How many; 0 is as the data say."),
                SEEDS,
            ],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, prompts: str, words: str, clusters: int, seeds: int) -> io.NodeOutput:
        denoiser, watch, reader = _begin(cls, model, clip, seeds)
        listed, neutral = usual_words(denoiser.family), reader.settings.neutral
        rows, table = _prompts(prompts, listed), _table(words, listed)
        h = watch.read(reader, [neutral, *rows.values(), *table.values()])
        points = torch.stack([(h[prompt] - h[neutral]).mean(0) for prompt in rows.values()])
        named = {name: (h[prompt] - h[neutral]).mean(0) for name, prompt in table.items()}
        found = maps.clusters(list(rows), points, named, count=clusters)
        number = {member: i for i, cluster in enumerate(found) for member in cluster.members}
        places = maps.principal_map(points)[0]
        picture = map_picture(list(rows), places, [number[name] for name in rows], "Map of prompts")
        lines = [f"{i + 1}. {cluster.title()}: {', '.join(cluster.members)}" for i, cluster in enumerate(found)]
        return _shown(cls, watch, picture, lines)


class NameVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerNameVector",
            display_name="Name Vector",
            description="The words nearest to a concept vector: what a direction means to the model.",
            search_aliases=["analyse", "what is this vector", "nearest words"],
            inputs=[MODEL, CLIP, Vector.Input("vector", tooltip="One vector or several."), WORDS, SEEDS],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vector: Any, words: str, seeds: int) -> io.NodeOutput:
        vectors = vectors_of(vector)
        denoiser, watch, reader = _begin(cls, model, clip, seeds)
        for one in vectors:
            if one.family != denoiser.family:
                raise ConceptSteerError(
                    f"The vector {one.name!r} is for {one.family}, the model is {denoiser.family}: use one that fits."
                )
        contexts = in_contexts(usual_words(denoiser.family), lines_of(words))
        try:
            known = context_directions(reader, contexts, lambda done, total: watch.at(99 * done / total))
        except KeyboardInterrupt:
            raise comfy.model_management.InterruptProcessingException from None
        rows = [
            (
                one.name,
                ", ".join(f"{name} {value:+.2f}" for name, value in nearest(one, known, 5, centred=False, signed=True)),
            )
            for one in vectors
        ]
        return _shown(cls, watch, card("Nearest words (cosine)", rows), [f"{name}: {text}" for name, text in rows])


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
        denoiser, watch, reader = _begin(cls, model, clip, seeds, predicted=True)
        words = from_lines(usual_words(denoiser.family), roles, attributes, "")
        other, steered = reader, None
        if vector is not None:
            steers = [Steer(one, strength) for one in vectors_of(vector)]
            acting = replace(reader, steers=[steers] * seeds, _inputs=[])
            steered = dict.fromkeys(words.attributes, acting)
        else:
            other = replace(reader, denoiser=denoiser_of(other_model, other_clip or clip, None, 0), _inputs=[])
        try:
            before = defaults(reader, words, progress=lambda done, total: watch.at(49 * done / total))
            after = defaults(
                other, words, steered=steered, progress=lambda done, total: watch.at(49 + 49 * done / total)
            )
        except KeyboardInterrupt:
            raise comfy.model_management.InterruptProcessingException from None
        changes = compare(before, after)
        by = {name: [one for one in changes if one.attribute == name] for name in words.attributes}
        chart = stacked([change_chart(mine, f"{name} (grey: before)") for name, mine in by.items()])
        lines = [f"{c.attribute}, {c.role}: lean {c.before.lean[0]:+.2f}, then {c.after.lean[0]:+.2f}" for c in changes]
        return _shown(cls, watch, chart, lines)


NODES = [Defaults, Descriptors, AssociationMap, ConceptMap, NameVector, CompareDefaults]
