"""Latent Guard: pictures are looked at while the sampler still draws them, and flagged ones are withheld or steered."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy_api.latest import io, ui

from ..concept_steer.errors import SafetyError
from ..concept_steer.latent_clip import LatentCheck, LatentGuard, make_guard
from ..concept_steer.plots import card
from ..concept_steer.safety import SafetySet
from ..concept_steer.safety.known import TEXTS
from ..concept_steer.safety.words import phrases_of
from .common import schema, to_image_tensor
from .latent_clip import CLIP, Loaded
from .learn_safety import Sets, texts_of
from .safety import ALIASES, SafetySteer, folders

ANSWERS = ["stop", "steer"]
WILL = {"stop": "withheld: their latents are blank", "steer": "steered elsewhere for the rest of the steps"}


class LatentGuardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLatentGuard",
            display_name="Latent Guard",
            description="Looks at each picture once while it is still being drawn, without decoding it, and withholds "
            "or steers those in which it finds unwanted content. The other pictures of the batch keep every bit. If it "
            "cannot look, there is an error and no picture.",
            search_aliases=[*ALIASES, "latent clip", "early stop", "detector", "guard"],
            inputs=[
                io.Model.Input("model", tooltip="Of the latent CLIP's latent space; behind Safety Steer, if both."),
                CLIP,
                io.Combo.Input(
                    "answer",
                    options=ANSWERS,
                    default="stop",
                    tooltip="stop: flagged pictures are withheld, and when all are, sampling ends there. steer: safety "
                    "vectors and guidance act on them for the rest of the steps.",
                ),
                io.Float.Input(
                    "at",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the steps is done when it looks: early saves more, late sees more.",
                ),
                io.String.Input(
                    "texts",
                    multiline=True,
                    default="",
                    tooltip="What it looks for, one category a line, such as alcohol: beer, wine. Empty: the "
                    "categories it comes with.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which score on a picture is flagged. 0.5 is the measured limit, or without one where "
                    "the unwanted is the likelier; higher flags fewer.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Of the same checkpoint. steer without Safety Steer then guides as well, which keeps "
                    "pictures in better form; needed where there are no vectors for the model.",
                ),
                Sets.Input(
                    "safety_set",
                    optional=True,
                    tooltip="For steer, from Learn Safety Vectors. Empty: that of Safety Steer, else the one that fits "
                    "the model.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For the sampler, and for Safety Check's safe model."),
                io.String.Output(display_name="report", tooltip="What it looks for, when, and what follows."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **settings: Any) -> str:
        return SafetySteer.fingerprint_inputs()

    @classmethod
    def execute(
        cls,
        model: Any,
        latent_clip: Loaded,
        answer: str,
        at: float,
        texts: str = "",
        threshold: float = 0.5,
        clip: Any = None,
        safety_set: Any = None,
    ) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_latent_guard import look_at_pictures

        if safety_set is not None and not isinstance(safety_set, SafetySet):
            raise SafetyError(
                f"A CONCEPT_SAFETY_SET socket brought a {type(safety_set).__name__}: connect Learn Safety Vectors."
            )
        comfy.model_management.load_model_gpu(latent_clip.patcher)
        guard, check = guard_for(latent_clip, texts, threshold), LatentCheck(answer, at)  # type: ignore[arg-type]
        sets = [] if safety_set is None else [safety_set]
        guarded, looking = look_at_pictures(model, latent_clip.patcher, guard, check, clip, sets, folders())
        limits = guard.limits
        rate = "no limits measured" if limits is None else f"limits for {limits.rate:.0%} of harmless pictures"
        rows = [
            ("looks for", ", ".join(guard.categories)),
            ("when", f"{at:.0%} of the steps are done"),
            ("flagged", f"from score {threshold:.2f} on ({rate})"),
            ("these are", WILL[answer]),
        ]
        lines = [f"{name}: {value}" for name, value in rows]
        if looking.harder is not None:
            lines.append(looking.harder.text())
        shown = ui.PreviewImage(to_image_tensor([card("Latent Guard", rows, width=520)]), cls=cls)
        return io.NodeOutput(guarded, "\n".join(lines), ui=shown)


def guard_for(loaded: Loaded, texts: str, threshold: float) -> LatentGuard:
    """The check of these texts; of none those that it comes with, which have measured limits for the embedded towers.

    The embedded text tower never read "no", so what shows a category is held against harmless things there.
    """
    from ..concept_steer.demo.latent_guard import HARMLESS, load_guard

    given = texts_of(texts)
    if loaded.embedded and not given:
        return load_guard(loaded.clip, threshold=threshold)
    words = {name: phrases_of(text) for name, text in (given or TEXTS).items()}
    if not loaded.embedded:
        return make_guard(loaded.clip, words, threshold=threshold)
    named = {phrase for phrases in words.values() for phrase in phrases}
    harmless = [text for text in HARMLESS if text not in named]
    return make_guard(loaded.clip, words, threshold=threshold, absent=harmless)


NODES = [LatentGuardNode]
