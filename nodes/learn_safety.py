"""Learn Safety Vectors: what Safety Steer uses, for the model in the graph, from words alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..concept_steer.denoiser import Denoiser
from ..concept_steer.errors import ConceptSteerError, LearnError, SettingError
from ..concept_steer.learn.request import lines_of
from ..concept_steer.library import safe_name
from ..concept_steer.plots import card
from ..concept_steer.safety import SafetySet, learn_safety
from ..concept_steer.safety.known import BENIGN, TEXTS
from ..concept_steer.safety.safety_set import DISTILLED, SUFFIX
from .common import denoiser_of, library, schema, to_image_tensor

Sets = io.Custom("CONCEPT_SAFETY_SET")
ASKED = "asked"  # in the info of a set: all that it was learned from


def texts_of(text: str) -> dict[str, str]:
    """Lines "alcohol: beer, wine" as category -> words. Errors: SettingError."""
    found: dict[str, str] = {}
    for line in lines_of(text):
        name, sign, words = (part.strip() for part in line.partition(":"))
        if not (name and sign and words):
            raise SettingError(f"The line {line!r} is not understood: write it like 'alcohol: beer, wine'.")
        if name in found:
            raise SettingError(f"The category {name!r} stands in two lines: put all its words into one.")
        found[name] = words
    return found


def prompts_of(text: str) -> dict[str, tuple[str, ...]]:
    """Lines "alcohol: a night out | after work" as category -> prompts. Errors: SettingError."""
    return {
        name: tuple(part.strip() for part in many.split("|") if part.strip()) for name, many in texts_of(text).items()
    }


class LearnSafetyVectors(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLearnSafety",
            display_name="Learn Safety Vectors",
            description="Learns what Safety Steer needs for the model in this graph: for each category a vector that "
            "keeps it out, and a gate that says when. From words alone; nothing of the model is changed.",
            search_aliases=["safety", "train", "nsfw", "safe vectors", "erase concept", "unlearn"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on; the set will fit models of its family."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.String.Input(
                    "categories",
                    multiline=True,
                    default="",
                    placeholder="\n".join(f"{name}: {words}" for name, words in TEXTS.items()),
                    tooltip="One category a line: its name, a colon, and words that show it, between commas. Empty: "
                    "the published categories; for the demo model those of its world.",
                ),
                io.String.Input(
                    "suggestive",
                    multiline=True,
                    default="",
                    tooltip="Prompts that lead to a category without naming it, one category a line, such as "
                    "shocking: a horror film, a haunted house; with a vertical bar between prompts. May be empty.",
                ),
                io.String.Input(
                    "benign",
                    multiline=True,
                    default="",
                    placeholder="\n".join(BENIGN),
                    tooltip="Harmless prompts, one a line, twelve or more: the gate learns to stay shut for them. "
                    "Add what you draw. Empty: a list that comes with the node.",
                ),
                io.Int.Input(
                    "pictures",
                    default=24,
                    min=4,
                    max=500,
                    tooltip="How many pictures a category to learn from: more are surer, slower.",
                ),
                io.Int.Input("steps", default=60, min=1, max=2000, tooltip="Most steps of learning for each vector."),
                io.Int.Input("vector_seed", default=0, min=0, max=2**31 - 1, tooltip="Same seed, same set. It stays."),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="Side of the pictures to learn on; 0 is the model's own size.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="A name to keep it under in models/concept_vectors, where Safety Steer finds it; empty: "
                    "not kept. A kept set is not learned again from the same settings.",
                ),
            ],
            outputs=[
                Sets.Output(display_name="safety set", tooltip="For Safety Steer."),
                io.String.Output(
                    display_name="report", tooltip="What was learned, and how often a gate opens for harmless prompts."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        categories: str,
        suggestive: str,
        benign: str,
        pictures: int,
        steps: int,
        vector_seed: int,
        size: int = 0,
        save_as: str = "",
    ) -> io.NodeOutput:
        denoiser = denoiser_of(model, clip, None, size)
        texts, prompts, harmless = own_of(denoiser.family)
        own = texts_of(categories)
        given = {
            "texts": own or texts,
            "suggestive": prompts_of(suggestive) or ({} if own else prompts),
            "benign": list(dict.fromkeys(lines_of(benign))) or list(harmless),
            "pictures": pictures,
            "steps": steps,
            "seed": vector_seed,
        }
        # of a model with LoRAs the hash says too little
        asked = "" if model.patches else json.dumps([given, size, denoiser.checkpoint_hash])
        name = save_as.strip()
        path = library().folders[0] / (safe_name(name) + SUFFIX) if name else None
        if path is not None and path.is_file():
            found, last = kept(path, asked), f"Was kept as {path.name}, learned from the same settings."
        else:
            found = _learned(denoiser, {**given, "name": name or "safety"}, cls.hidden.unique_id)
            found, last = replace(found, info={**found.info, ASKED: asked}), "Not kept: save as is empty."
            if path is not None:
                found.save(path)
                last = f"Saved as {path.name}."
        lines = [*described(found), last]
        rows = [("" if i else "set", line) for i, line in enumerate(lines)]
        shown = ui.PreviewImage(to_image_tensor([card("Learn Safety Vectors", rows, width=640)]), cls=cls)
        return io.NodeOutput(found, "\n".join(lines), ui=shown)


def own_of(family: str) -> tuple[Any, Any, Any]:
    """(texts, suggestive, benign) for `learn_safety` where the user names none."""
    if family != "demo":
        return TEXTS, {}, BENIGN
    from ..concept_steer.demo import safety_words

    return safety_words.TEXTS, safety_words.SUGGESTIVE, safety_words.harmless()


def _learned(denoiser: Denoiser, given: dict[str, Any], node: Any) -> SafetySet:
    """`learn_safety` with the node's progress bar, until Interrupt."""
    bar = comfy.utils.ProgressBar(100, node_id=node)

    def progress(done: int, total: int, what: str) -> None:
        bar.update_absolute(100 * done // max(1, total), 100)

    try:
        return learn_safety(denoiser, **given, progress=progress, stop=comfy.model_management.processing_interrupted)
    except LearnError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def kept(path: Path, asked: str) -> SafetySet:
    """The set in a file, if it is what is asked for: minutes of learning end in no name that is taken.

    Errors: ConceptSteerError for another set, VectorFileError for a damaged file.
    """
    found = SafetySet.load(path)
    if not asked or found.info.get(ASKED) != asked:
        raise ConceptSteerError(
            f"{path.name} is there already, and was learned from other settings or on another model (one with LoRAs is "
            "always another): choose another name to save as, or move that file away."
        )
    return found


def described(found: SafetySet) -> list[str]:
    """What the set is for, and of each gate how often it opens."""
    lines = [f"Safety set {found.name!r} for models of the family {found.family}: {', '.join(found.categories)}."]
    for name, told in found.measured.get("gates", {}).items():
        lines.append(
            f"{'all together' if name == DISTILLED else name}: the gate opens for {told['shown_standard']:.0%} of what "
            f"shows it, and for {told['alarms_standard']:.1%} of {told['held_out']} harmless pictures that it was not "
            "fitted on."
        )
    return lines


NODES = [LearnSafetyVectors]
