"""One look at a time into what a model associates: descriptors, associations, a map, names of vectors."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..concept_steer.analysis import maps
from ..concept_steer.analysis.associations import associations, descriptors
from ..concept_steer.analysis.charts import heat_map, map_picture
from ..concept_steer.analysis.names import SEEDS as NAMING_SEEDS
from ..concept_steer.analysis.names import read_names
from ..concept_steer.analysis.word_list import in_contexts
from ..concept_steer.demo.auditing import usual_words
from ..concept_steer.errors import ConceptSteerError
from ..concept_steer.learn.request import lines_of
from ..concept_steer.plots import card
from .audit import SEEDS
from .common import Vector, schema, vectors_of
from .look import CLIP, MODEL, PICTURE, PROMPTS, REPORT, WORDS, begin, interruptible, prompts_of, shown, table_of


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
        denoiser, watch, reader = begin(cls, model, clip, seeds)
        table, neutral = table_of(words, usual_words(denoiser.family)), reader.settings.neutral
        h = watch.read(reader, [neutral, concept.strip(), *table.values()])
        named = {name: h[prompt] for name, prompt in table.items()}
        ranked = descriptors(h[concept.strip()], named, h[neutral])
        rows = [(name, f"{value:+.2f}   ({low:+.2f} to {high:+.2f})") for name, value, low, high in ranked]
        picture = card(f"{concept.strip()}: nearest words (cosine)", rows[:24])
        return shown(cls, watch, picture, [f"{name}: {text}" for name, text in rows])


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
        denoiser, watch, reader = begin(cls, model, clip, seeds)
        listed, neutral = usual_words(denoiser.family), reader.settings.neutral
        rows, table = prompts_of(prompts, listed), table_of(words, listed)
        h = watch.read(reader, [neutral, *rows.values(), *table.values()])
        found = associations(
            {name: h[prompt] for name, prompt in rows.items()},
            {name: h[prompt] for name, prompt in table.items()},
            h[neutral],
        )
        lines = [f"{row} with {column}: {value:+.2f}" for row, column, value in found.strongest(20)]
        return shown(cls, watch, heat_map(found, "Associations (cosine, hundredths)"), lines)


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
        denoiser, watch, reader = begin(cls, model, clip, seeds)
        listed, neutral = usual_words(denoiser.family), reader.settings.neutral
        rows, table = prompts_of(prompts, listed), table_of(words, listed)
        h = watch.read(reader, [neutral, *rows.values(), *table.values()])
        points = torch.stack([(h[prompt] - h[neutral]).mean(0) for prompt in rows.values()])
        named = {name: (h[prompt] - h[neutral]).mean(0) for name, prompt in table.items()}
        found = maps.clusters(list(rows), points, named, count=clusters)
        number = {member: i for i, cluster in enumerate(found) for member in cluster.members}
        places = maps.principal_map(points)[0]
        picture = map_picture(list(rows), places, [number[name] for name in rows], "Map of prompts")
        lines = [f"{i + 1}. {cluster.title()}: {', '.join(cluster.members)}" for i, cluster in enumerate(found)]
        return shown(cls, watch, picture, lines)


class NameVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerNameVector",
            display_name="Name Vector",
            description="The words nearest to a concept vector: what a direction means to the model.",
            search_aliases=["analyse", "what is this vector", "nearest words"],
            inputs=[
                MODEL,
                CLIP,
                Vector.Input("vector", tooltip="One vector or several."),
                WORDS,
                io.Int.Input(
                    "seeds", default=NAMING_SEEDS, min=1, max=64, tooltip="Noises that each prompt is read from."
                ),
            ],
            outputs=[PICTURE, REPORT],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vector: Any, words: str, seeds: int) -> io.NodeOutput:
        vectors = vectors_of(vector)
        denoiser, watch, reader = begin(cls, model, clip, seeds)
        for one in vectors:
            if one.family != denoiser.family:
                raise ConceptSteerError(
                    f"The vector {one.name!r} is for {one.family}, the model is {denoiser.family}: use one that fits."
                )
        contexts = in_contexts(usual_words(denoiser.family), lines_of(words))
        with interruptible():
            known = read_names(reader, contexts, lambda done, total: watch.at(99 * done / total))
        rows = [
            (one.name, ", ".join(f"{name} {value:+.2f}" for name, value in known.nearest(one, 5))) for one in vectors
        ]
        return shown(cls, watch, card("Nearest words (likeness)", rows), [f"{name}: {text}" for name, text in rows])


NODES = [Descriptors, AssociationMap, ConceptMap, NameVector]
