"""Concept Steer on a MODEL or on a CONDITIONING."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..concept_steer.hosts.comfy import steer_model
from ..concept_steer.hosts.comfy_conditioning import steer_conditioning
from ..concept_steer.schedule import Schedule
from ..concept_steer.steering import Steer
from .common import Vector, schema, vectors_of

ROWS = {"prompt": "cond", "negative prompt": "uncond", "both": "both"}
OPERATORS = {"add": "add", "remove": "remove", "only where present": "gated"}


def _settings(rows: bool) -> list[Any]:
    inputs: list[Any] = [
        Vector.Input("vector", tooltip="What to steer towards. A list of vectors steers with all of them."),
        io.Float.Input(
            "strength",
            default=1.0,
            min=-3.0,
            max=3.0,
            step=0.05,
            tooltip="1 is the effect it was learned for, 2 twice that, -1 the opposite; 0 changes nothing at all.",
        ),
        io.Float.Input(
            "start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Where steering begins: 0 is the first step."
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Where steering ends: 1 is the finished picture. An early end keeps details, a late start keeps "
            "the composition.",
        ),
        io.Float.Input(
            "fade",
            default=0.0,
            min=0.0,
            max=0.5,
            step=0.01,
            tooltip="How long steering takes to come in after the start and to go out before the end.",
        ),
        io.Combo.Input(
            "operator",
            options=list(OPERATORS),
            default="add",
            tooltip="add: steer towards the concept. remove: take away what is there of it. only where present: add, "
            "but only where the concept shows already (a negative strength then removes it there).",
        ),
    ]
    if rows:
        inputs.append(
            io.Combo.Input(
                "rows",
                options=list(ROWS),
                default="prompt",
                tooltip="Which side of CFG is steered. The prompt is the usual choice.",
            )
        )
    return [
        *inputs,
        io.Mask.Input("mask", optional=True, tooltip="Only this region is steered (white: fully, black: not)."),
    ]


def _steers(
    vector: Any,
    strength: float,
    start: float,
    end: float,
    fade: float,
    operator: str,
    rows: str = "prompt",
    mask: torch.Tensor | None = None,
) -> list[Steer]:
    region = None if mask is None else mask[0] if mask.ndim == 3 else mask
    schedule = Schedule(start, end, fade)
    return [
        Steer(one, strength, schedule, ROWS[rows], region, OPERATORS[operator])  # type: ignore[arg-type]
        for one in vectors_of(vector)
    ]


class ConceptSteer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteer",
            display_name="Concept Steer",
            description="Adds a concept vector to the model while it draws: same prompt, same seed, no change to the "
            "weights. Put as many in a row as you like; their order does not matter.",
            search_aliases=["concept vector", "h-space", "slider", "steering", "attribute", "activation"],
            inputs=[io.Model.Input("model", tooltip="An SD 1.x, SD 2.x, SDXL or demo model."), *_settings(rows=True)],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The steered model, for any sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(steer_model(model, _steers(**settings)))


class ConceptSteerPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerPrompt",
            display_name="Concept Steer (Prompt)",
            description="Attaches a concept vector to one prompt, so that only this prompt is steered, for example one "
            "region of a regional prompt or one time range. Works with any sampler; the model stays as it is.",
            search_aliases=["regional", "conditioning", "area", "prompt steering"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The encoded prompt, before or after setting an area."),
                *_settings(rows=False),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="The prompt with its vector.")],
        )

    @classmethod
    def execute(cls, conditioning: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(steer_conditioning(conditioning, _steers(**settings)))


NODES = [ConceptSteer, ConceptSteerPrompt]
