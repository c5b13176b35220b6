"""Learn Attribute and Load Attribute: what Fair Sampling balances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..concept_steer.errors import LibraryError, SettingError
from ..concept_steer.fairness import Attribute, learn_attribute
from ..concept_steer.fairness.attributes import SUFFIX
from ..concept_steer.fairness.known import DEFINITIONS, ROLES
from ..concept_steer.library import safe_name
from .common import library, schema

Attributes = io.Custom("CONCEPT_ATTRIBUTE")
SCORE, DIFFERENCE = "the model's own predictions (best)", "difference of means (fastest)"
EMPTY = "(no attributes yet)"


def values_of(text: str) -> dict[str, tuple[str, ...]]:
    """One value a line, "woman = a woman {} | a female {}". Errors: SettingError."""
    found: dict[str, tuple[str, ...]] = {}
    for line in (line.strip() for line in text.splitlines()):
        label, sign, rest = (part.strip() for part in line.partition("="))
        if line and not (label and sign and rest):
            raise SettingError(f"The line {line!r} is not understood: write it like 'woman = a woman {{}}'.")
        if line:
            found[label] = tuple(part.strip() for part in rest.split("|"))
    return found


def files() -> dict[str, Path]:
    """The attributes in the folders of concept vectors, by name; of equal names the first folder's."""
    found: dict[str, Path] = {}
    for folder in library().folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else ():
            found.setdefault(path.name.removesuffix(SUFFIX), path)
    return found


def _file(name: str) -> Path:
    found = files()
    if name not in found:
        folders = ", ".join(str(folder) for folder in library().folders)
        raise LibraryError(
            f"There is no attribute {name!r} (there are: {', '.join(found) or 'none'}) in {folders}. Make one with "
            "Learn Attribute and its save_as."
        )
    return found[name]


class LearnAttribute(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        gender = "\n".join(f"{label} = {' | '.join(many)}" for label, many in DEFINITIONS["gender"].items())
        return schema(
            node_id="ConceptSteerLearnAttribute",
            display_name="Learn Attribute",
            description="Learns an attribute for Fair Sampling: a vector for each of its values, and a gate that knows "
            "when a prompt names the attribute already. Uses prompts only; nothing of the model is changed.",
            search_aliases=["fairness", "bias", "gender", "skin tone", "diversity", "train"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on; the attribute will fit models of its family."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.String.Input(
                    "name", default="gender", tooltip="The attribute's name, as targets and phrases use it."
                ),
                io.String.Input(
                    "values",
                    multiline=True,
                    default=gender,
                    tooltip="One value a line: its label, an equals sign, how a prompt says it, with two curly braces "
                    "where the role goes; other ways to say it after a vertical bar.",
                ),
                io.String.Input(
                    "roles",
                    multiline=True,
                    default="\n".join(ROLES),
                    tooltip="Roles to learn on, one a line, three or more. The last third judges the gate.",
                ),
                io.Combo.Input(
                    "method",
                    options=[SCORE, DIFFERENCE],
                    default=SCORE,
                    tooltip="The first learns until strength 1 does what the prompt does; the second takes a mean.",
                ),
                io.Int.Input(
                    "vector_seed", default=0, min=0, max=2**31 - 1, tooltip="Same seed, same attribute. It stays."
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="Side of the pictures to learn on; 0 is the model's own size.",
                ),
                io.String.Input(
                    "save_as", default="", tooltip="A name to keep it under in models/concept_vectors; empty: not kept."
                ),
            ],
            outputs=[
                Attributes.Output(display_name="attribute", tooltip="For Fair Sampling."),
                io.String.Output(display_name="report", tooltip="What was learned, and how often the gate is right."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        name: str,
        values: str,
        roles: str,
        method: str,
        vector_seed: int,
        size: int = 0,
        save_as: str = "",
    ) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_denoiser import ComfyDenoiser

        path = library().folders[0] / (safe_name(save_as.strip()) + SUFFIX) if save_as.strip() else None
        bar = comfy.utils.ProgressBar(100, node_id=cls.hidden.unique_id)

        def watch(what: str, done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(100 * done // total, 100)

        found = learn_attribute(
            ComfyDenoiser(model, clip, None, size or None),
            name.strip(),
            values_of(values),
            [line.strip() for line in roles.splitlines() if line.strip()],
            method="difference" if method == DIFFERENCE else "score",
            seed=vector_seed,
            watch=watch,
        )
        lines = [f"{found.name}: {', '.join(found.labels)}, learned by {found.info['method']}."]
        measured = found.gate.measured if found.gate else {}
        lines.append(
            f"Its gate on roles it never saw: AUC {measured['auc']:.3f}, accuracy {measured['accuracy']:.1%}, at "
            f"{measured['rows_per_neutral_prompt']:.0f} encoder rows a prompt."
        )
        if path is not None and not (path.is_file() and Attribute.load(path).fingerprint == found.fingerprint):
            found.save(path)
        if path is not None:
            lines.append(f"Saved as {path.name}.")
        return io.NodeOutput(found, "\n".join(lines))


class LoadAttribute(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLoadAttribute",
            display_name="Load Attribute",
            description="An attribute that Learn Attribute or the command line kept in models/concept_vectors.",
            search_aliases=["fairness", "gender", "skin tone"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(files()) or [EMPTY],
                    tooltip="The file's name. Press R in ComfyUI to see new files.",
                )
            ],
            outputs=[Attributes.Output(display_name="attribute", tooltip="For Fair Sampling.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return Attribute.load(_file(name)).fingerprint

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(Attribute.load(_file(name)))


NODES = [LearnAttribute, LoadAttribute]
