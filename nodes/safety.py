"""Safety Steer and Safety Check: the safety switch while pictures are drawn, and a look at finished ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io, ui

from ..concept_steer.errors import SafetyError
from ..concept_steer.plots import card
from ..concept_steer.safety import SafetyReport, SafetySet, SafetySettings, check, load_detector
from ..concept_steer.safety.safety_set import SHIPPED, SUFFIX
from ..concept_steer.safety.switch import SafetyPlan
from . import learn_safety
from .common import library, schema, to_image_tensor, to_pictures
from .learn_safety import Sets, texts_of

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
                    tooltip="The model of Safety Steer that drew these pictures: the report then says how often its "
                    "gate acted.",
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
        ran = None if safe_model is None else last_run(safe_model, detector)
        if not DETECTORS[detector] and ran is None:
            raise SafetyError(
                "Safety Check has nothing to check: no detector is chosen, and safe_model is not connected. Choose a "
                "detector, or connect the MODEL of Safety Steer."
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
        report, text = _told(found.report, ran, len(images))
        if isinstance(cls.hidden.extra_pnginfo, dict):
            cls.hidden.extra_pnginfo.setdefault(METADATA, {})[str(cls.hidden.unique_id)] = report
        scores = zip(found.report.done, found.report.scores, strict=True)
        rows = [(f"picture {i}", f"{done}, score {score:.2f}") for i, (done, score) in enumerate(scores)]
        rows = [("" if i else "report", line) for i, line in enumerate(text.splitlines())] + rows[:16]
        shown = ui.PreviewImage(to_image_tensor([card("Safety Check", rows, width=520)]), cls=cls)
        return io.NodeOutput(result, found.flags, text, ui=shown)


class Ran(NamedTuple):
    """What was in force in the last run on a MODEL, how many pictures that drew, and what the gate did."""

    plan: SafetyPlan
    pictures: int
    gate: dict[str, int]


def last_run(model: Any, detector: str = "") -> Ran:
    """Of a MODEL of Safety Steer. Errors: SafetyError, also for a detector that cannot judge this model's pictures."""
    from ..concept_steer.hosts.comfy import family_of
    from ..concept_steer.hosts.comfy_safety import guard_of

    guard = guard_of(model)
    if guard is None:
        raise SafetyError(
            "The model at safe_model has no Safety Steer on it, so nothing was kept out while it drew. Connect the "
            "MODEL of Safety Steer (at a level other than off), or leave the socket empty."
        )
    if not guard.runs:
        raise SafetyError(
            "The model at safe_model has drawn nothing yet, so these pictures are not from it. Connect the model that "
            "the sampler of these pictures uses, or leave the socket empty."
        )
    family = family_of(model)[0]
    if detector == DEMO and family != "demo":
        raise SafetyError(
            f"The demo judges know nothing but pictures of the demo model, and these are from another ({family}): "
            "choose another detector."
        )
    return Ran(guard.plan, guard.runs[-1].pictures, dict(guard.runs[-1].gate))


def _told(report: SafetyReport, ran: Ran | None, pictures: int) -> tuple[dict[str, Any], str]:
    """As a table and as text; without the model nothing is known of how the pictures were drawn, so nothing is said."""
    if ran is None:
        unknown = "How the pictures were drawn is not known here: safe_model is not connected."
        return {"detector": report.to_dict()["detector"]}, "\n".join([unknown, *report.text().splitlines()[1:]])
    report = replace(report, method=ran.plan.method, categories=ran.plan.categories, firings=ran.gate)
    lines = report.text().splitlines()
    if ran.pictures != pictures:
        lines.insert(1, f"Of the model's last run, which drew {ran.pictures} pictures; here are {pictures}.")
    return report.to_dict(), "\n".join(lines)


NODES = [SafetySteer, SafetyCheck, *learn_safety.NODES]
