"""Load Demo Model, and the judges of its pictures."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..concept_steer.demo import judges, model, student
from ..concept_steer.plots import card
from .common import schema, to_image_tensor, to_pixels


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLoadDemo",
            display_name="Load Demo Model (Concept Steer)",
            description="The small model that comes with Concept Steer (128 px emoji art, no download): try every node "
            "with it, in seconds, also without a graphics card. Use 128 x 128, 20 steps, CFG 4.",
            search_aliases=["checkpoint", "tiny model", "embedded model", "emoji", "example model"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The demo UNet; family 'demo'."),
                io.Clip.Output(display_name="CLIP", tooltip="Its text encoder."),
                io.Vae.Output(display_name="VAE", tooltip="Its VAE, 8 pixels per latent cell."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        return model.file_hash()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..concept_steer.hosts import comfy_demo

        return io.NodeOutput(*comfy_demo.load())


class LoadDemoStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLoadDemoStudent",
            display_name="Load Demo Student (Concept Steer)",
            description="The demo model's student: it draws in 1 step at CFG 1, so that Optimise Noise runs in seconds "
            "without a graphics card. Use 128 x 128.",
            search_aliases=["checkpoint", "turbo", "one-step", "distilled", "example model"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The student's UNet; family 'demo'."),
                io.Clip.Output(display_name="CLIP", tooltip="Its text encoder, the demo model's."),
                io.Vae.Output(display_name="VAE", tooltip="Its VAE, the demo model's."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        return model.file_hash(student.STUDENT_FILE)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..concept_steer.hosts import comfy_demo

        return io.NodeOutput(*comfy_demo.load(one_step=True))


@lru_cache(maxsize=1)
def _judges() -> judges.Judges:
    return judges.Judges()


class JudgePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerJudge",
            display_name="Judge Pictures (Demo)",
            description="Counts what the demo model's judges see in a batch of its pictures: gender presentation, skin "
            "tone, role, expression, and marks that nobody asked for. Only for pictures of the demo model.",
            search_aliases=["classify", "measure", "count", "attribute share"],
            inputs=[
                io.Image.Input("images", tooltip="Pictures of the demo model."),
                io.Combo.Input(
                    "attribute",
                    options=list(judges.CLASSES),
                    default="gender",
                    tooltip="Which attribute to count; the report shows its classes.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Shares in words."),
                io.Float.Output(display_name="largest share", tooltip="The share of the most frequent class."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: torch.Tensor, attribute: str) -> io.NodeOutput:
        verdict = _judges()(to_pixels(images))
        shares = {name: verdict.share(attribute, name) for name in judges.CLASSES[attribute]}
        seen = sorted(((share, name) for name, share in shares.items() if share), reverse=True)
        report = ", ".join(f"{name} {share:.0%}" for share, name in seen)
        rows = [(name, f"{share:.0%} ({round(share * len(verdict))} of {len(verdict)})") for share, name in seen]
        shown: Any = ui.PreviewImage(to_image_tensor([card(f"{attribute} (judged)", rows, width=420)]), cls=cls)
        return io.NodeOutput(report, seen[0][0], ui=shown)


NODES = [LoadDemoModel, LoadDemoStudent, JudgePictures]
