"""Load, save, look at and mix concept vectors."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..concept_steer.describe import lines
from ..concept_steer.errors import ConceptSteerError
from ..concept_steer.plots import card
from ..concept_steer.vector import ConceptVector
from .common import Vector, choices, chosen, library, schema, to_image_tensor, to_pictures, vectors_of


class LoadConceptVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLoadVector",
            display_name="Load Concept Vector",
            description="A concept vector from models/concept_vectors or from the ones that come with Concept Steer. "
            "A renamed file is found again by the digits of its content.",
            search_aliases=["concept", "steering vector", "slider", "load direction"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=choices(),
                    tooltip="Name and first digits of the content's hash. Press R in ComfyUI to see new files.",
                )
            ],
            outputs=[Vector.Output(display_name="vector", tooltip="For Concept Steer, Concept Mix and the others.")],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        try:
            chosen(name)
        except ConceptSteerError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return chosen(name)[0].fingerprint

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(chosen(name)[0])


class SaveConceptVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerSaveVector",
            display_name="Save Concept Vector",
            description="Writes a vector as a .safetensors file into models/concept_vectors, with a preview picture.",
            search_aliases=["export concept", "keep", "write"],
            inputs=[
                Vector.Input("vector", tooltip="The vector to keep."),
                io.String.Input("name", default="my concept", tooltip="A plain name; it becomes the file's name."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Off: a file of that name is an error, so that nothing is lost."
                ),
                io.Image.Input(
                    "preview", optional=True, tooltip="Saved beside the vector as PNG, for example the before/after."
                ),
            ],
            outputs=[Vector.Output(display_name="saved vector", tooltip="The same vector, for going on.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls, vector: Any, name: str, overwrite: bool = False, preview: torch.Tensor | None = None
    ) -> io.NodeOutput:
        found = vectors_of(vector)
        if len(found) != 1:
            raise ConceptSteerError(
                f"{len(found)} vectors were given for one name: mix them first, or save one by one."
            )
        named = found[0] if found[0].title else found[0].with_title(name)
        picture = None if preview is None else to_pictures(preview)[0]
        path = library().save(named, name, overwrite, picture)
        return io.NodeOutput(named, ui=_shown(cls, f"saved: {path.name}", named, picture, [("file", str(path))]))


class ConceptInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerInfo",
            display_name="Concept Info",
            description="All about a vector: the model family it fits, its prompts, how it was learned, its "
            "calibration and its measured effect.",
            search_aliases=["metadata", "about", "inspect vector"],
            inputs=[Vector.Input("vector", tooltip="The vector to look at.")],
            outputs=[io.String.Output(display_name="text", tooltip="One line per fact.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vector: Any) -> io.NodeOutput:
        found = vectors_of(vector)
        text = "\n\n".join("\n".join(f"{label}: {value}" for label, value in lines(v)) for v in found)
        return io.NodeOutput(text, ui=_shown(cls, found[0].name, found[0], _preview_of(found[0])))


class ConceptMix(io.ComfyNode):
    MODES = ("weighted sum", "difference (first minus the others)", "first without the others")

    @classmethod
    def define_schema(cls) -> io.Schema:
        extra = []
        for number in (2, 3, 4):
            extra.append(Vector.Input(f"vector_{number}", optional=True, tooltip=f"Vector {number}, if you want one."))
        for number in (1, 2, 3, 4):
            extra.append(
                io.Float.Input(
                    f"weight_{number}", default=1.0, min=-3.0, max=3.0, step=0.05, tooltip=f"Weight of vector {number}."
                )
            )
        return schema(
            node_id="ConceptSteerMix",
            display_name="Concept Mix",
            description="One new vector from up to four: their weighted sum, a difference, or the first with all "
            "taken out that it shares with the others (for example 'woman' without 'long hair').",
            search_aliases=["combine", "merge", "orthogonalize", "subtract", "add vectors"],
            inputs=[
                Vector.Input("vector_1", tooltip="The first vector."),
                io.Combo.Input(
                    "mode", options=list(cls.MODES), default=cls.MODES[0], tooltip="How the vectors are put together."
                ),
                *extra,
            ],
            outputs=[Vector.Output(display_name="vector", tooltip="The mix, a vector like any other.")],
        )

    @classmethod
    def execute(cls, vector_1: Any, mode: str, **given: Any) -> io.NodeOutput:
        parts: list[ConceptVector] = []
        for number in (1, 2, 3, 4):
            value = vector_1 if number == 1 else given.get(f"vector_{number}")
            if value is not None:
                parts += [vector * given.get(f"weight_{number}", 1.0) for vector in vectors_of(value)]
        if mode == cls.MODES[2]:
            return io.NodeOutput(parts[0].orthogonal_to(*parts[1:]))
        result = parts[0]
        for part in parts[1:]:
            result = result - part if mode == cls.MODES[1] else result + part
        return io.NodeOutput(result)


def _preview_of(vector: ConceptVector) -> Image.Image | None:
    """The picture that lies beside the vector's file, if it is in the library."""
    for entry in library().entries():
        picture = entry.path.with_suffix(".png")
        if picture.is_file() and entry.hash == vector.fingerprint:
            with Image.open(picture) as image:
                return image.convert("RGB")
    return None


def _shown(
    cls: Any, title: str, vector: ConceptVector, picture: Image.Image | None, more: list[tuple[str, str]] | None = None
) -> Any:
    rows = [*(more or []), *lines(vector)]
    return ui.PreviewImage(to_image_tensor([card(title, rows, picture)]), cls=cls)


NODES = [LoadConceptVector, SaveConceptVector, ConceptInfo, ConceptMix]
