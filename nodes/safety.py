"""Safety Steer and Safety Check: the safety switch while pictures are drawn, and a look at finished ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..concept_steer.errors import SafetyError
from ..concept_steer.plots import card
from ..concept_steer.safety import SafetySet, SafetySettings, check, load_detector
from ..concept_steer.safety.check import withheld
from ..concept_steer.safety.safety_set import SHIPPED, SUFFIX
from ..concept_steer.safety.switch import SafetyPlan
from . import learn_safety
from .common import library, schema, to_image_tensor, to_pictures
from .learn_safety import Sets, texts_of
from .safety_runs import last_look, last_run, told_of

METADATA = "concept_steer_safety"  # the text field in PNG files: number of the Safety Check -> its report
LEVELS = ["off", "gentle", "standard", "strict"]
METHODS = {"automatic": "auto", "learned vectors": "vectors", "Safe Latent Diffusion": "sld", "both": "both"}
DEMO = "demo judges"
DETECTORS = {"OpenNSFW": "opennsfw", "NudeNet": "nudenet", "Q16": "q16", DEMO: "demo", "none": ""}
ON_FLAG = ["mark", "blur", "withhold"]
ALIASES = ["safety", "safe", "nsfw", "nsfw filter", "content filter", "safe mode", "child safe", "censor"]


def names_of(text: str) -> tuple[str, ...]:
    """Names between commas and line ends."""
    return tuple(name.strip() for line in text.splitlines() for name in line.split(",") if name.strip())


def folders() -> list[Path]:
    """Where safety sets are looked for: the library, then what ships with the demo model."""
    return [*library().folders, SHIPPED]


class SafetySteer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerSafety",
            display_name="Safety Steer",
            description="One switch that keeps pictures away from unwanted content while they are drawn, without black "
            "squares: learned vectors that act only where a concept shows, or Safe Latent Diffusion. If it cannot "
            "work, there is an error and no picture.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x, SDXL or demo model; its own steering stays on."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint; Safe Latent Diffusion needs it."),
                io.Combo.Input(
                    "level",
                    options=LEVELS,
                    default="standard",
                    tooltip="How strongly. off hands on the very same model.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="automatic",
                    tooltip="automatic: learned vectors and guidance where there are vectors for this kind of model "
                    "(no more work for harmless pictures), else Safe Latent Diffusion (half again the work).",
                ),
                io.String.Input(
                    "categories",
                    default="",
                    tooltip="Names of categories, between commas or on lines. Empty: all of them.",
                ),
                io.String.Input(
                    "texts",
                    multiline=True,
                    default="",
                    tooltip="What a category means, one a line, such as alcohol: beer, wine. Only Safe Latent "
                    "Diffusion reads it. Empty: the words it comes with.",
                ),
                Sets.Input(
                    "safety_set",
                    optional=True,
                    tooltip="From Learn Safety Vectors. Empty: the one in models/concept_vectors, or shipped, that "
                    "fits the model.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For any sampler."),
                io.String.Output(display_name="report", tooltip="What is kept out, and how."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **settings: Any) -> str:
        """A set that was added or exchanged counts."""
        found = [path for folder in folders() if folder.is_dir() for path in sorted(folder.rglob(f"*{SUFFIX}"))]
        return repr([(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in found])

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        level: str,
        method: str,
        categories: str = "",
        texts: str = "",
        safety_set: Any = None,
    ) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_safety import safe

        if safety_set is not None and not isinstance(safety_set, SafetySet):
            raise SafetyError(
                f"A CONCEPT_SAFETY_SET socket brought a {type(safety_set).__name__}: connect Learn Safety Vectors."
            )
        settings = SafetySettings(level, METHODS[method], names_of(categories), texts_of(texts))  # type: ignore[arg-type]
        steered, plan = safe(model, clip, settings, [] if safety_set is None else [safety_set], folders())
        shown = ui.PreviewImage(to_image_tensor([card("Safety Steer", _rows(plan), width=520)]), cls=cls)
        return io.NodeOutput(steered, plan.text(), ui=shown)


def _rows(plan: SafetyPlan) -> list[tuple[str, str]]:
    """On the node, so that nothing acts, or fails to act, unseen."""
    if not plan.acts:
        return [("level", "off: nothing is kept out")]
    rows = [("level", plan.settings.level), ("categories", ", ".join(plan.categories) or "all")]
    if plan.set is not None and plan.steers:
        rows.append(("vectors", f"{plan.set.name}, {len(plan.steers)} gated"))
    if plan.guide is not None:
        where = "where a gate opens, " if plan.gated else ""
        rows.append(("guidance", f"{where}Safe Latent Diffusion away from {plan.guide.text}"))
    return rows


class SafetyCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerSafetyCheck",
            display_name="Safety Check",
            description="Looks at finished pictures with a detector. A flagged one is marked, blurred or withheld, the "
            "others of the batch stay. If the detector cannot judge, there is an error and no picture.",
            search_aliases=[*ALIASES, "safety checker", "nudenet", "classifier", "blur"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures to look at."),
                io.Combo.Input(
                    "detector",
                    options=list(DETECTORS),
                    default="OpenNSFW",
                    tooltip="The first three are installed beside ComfyUI; the message says how. demo judges: for "
                    "pictures of the demo model only. none: no picture is looked at, only safe model reports.",
                ),
                io.Combo.Input(
                    "on_flag",
                    options=ON_FLAG,
                    default="withhold",
                    tooltip="What becomes of a flagged picture: kept and reported, blurred for good, or replaced by a "
                    "plain card. Drawing it again is not possible in here.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which score on a picture is flagged. 0 is the detector's own.",
                ),
                io.Model.Input(
                    "safe_model",
                    optional=True,
                    tooltip="The model of Safety Steer or Latent Guard that drew these pictures: the report then says "
                    "how often its gate acted, and what Latent Guard withheld gets its card.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="All pictures of the batch, in order."),
                io.Boolean.Output(
                    display_name="flags", tooltip="For each picture, whether it was flagged.", is_output_list=True
                ),
                io.String.Output(display_name="report", tooltip="What was found, and what was done."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, images: torch.Tensor, detector: str, on_flag: str, threshold: float = 0.0, safe_model: Any = None
    ) -> io.NodeOutput:
        if not bool(torch.isfinite(images).all()):
            raise SafetyError("The pictures hold values that are no numbers (NaN), so no detector can judge them.")
        ran = None if safe_model is None else last_run(safe_model, detector == DEMO)
        look = None if safe_model is None else last_look(safe_model, len(images))
        if not DETECTORS[detector] and ran is None and look is None:
            raise SafetyError(
                "Safety Check has nothing to check: no detector is chosen, and safe_model is not connected. Choose a "
                "detector, or connect the MODEL of Safety Steer or Latent Guard."
            )
        settings = SafetySettings(
            "off" if ran is None else ran.plan.settings.level,
            on_flag=on_flag,  # type: ignore[arg-type]
            detector=DETECTORS[detector],  # type: ignore[arg-type]
            threshold=threshold or None,
        )
        looks = load_detector(settings.detector, settings.threshold) if settings.detector else None
        found = check(to_pictures(images), looks, settings)
        result = images[..., :3].clone()  # what is not flagged keeps every bit of its float values
        for number, done in enumerate(found.report.done):
            if done in ("blurred", "withheld"):
                result[number] = to_image_tensor([found.images[number]])[0].to(result)
        flags = found.flags
        if look is not None:
            flags = [mine or early for mine, early in zip(flags, look.flagged, strict=True)]
            for number in (i for i, gone in enumerate(look.withheld) if gone):
                result[number] = to_image_tensor([withheld(to_pictures(images[number : number + 1])[0])])[0].to(result)
        report, text = told_of(found.report, ran, look, len(images))
        if isinstance(cls.hidden.extra_pnginfo, dict):
            cls.hidden.extra_pnginfo.setdefault(METADATA, {})[str(cls.hidden.unique_id)] = report
        scores = zip(found.report.done, found.report.scores, strict=True)
        rows = [(f"picture {i}", f"{done}, score {score:.2f}") for i, (done, score) in enumerate(scores)]
        rows = [("" if i else "report", line) for i, line in enumerate(text.splitlines()[:20])] + rows[:16]
        shown = ui.PreviewImage(to_image_tensor([card("Safety Check", rows, width=520)]), cls=cls)
        return io.NodeOutput(result, flags, text, ui=shown)


NODES = [SafetySteer, SafetyCheck, *learn_safety.NODES]
