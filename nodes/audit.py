"""Audit Checkpoint: what a model takes for granted, as a page of its own in the output folder and a picture here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from ..concept_steer.analysis.audit import AuditSettings, audit, percent
from ..concept_steer.analysis.audit_files import fresh_folder, write_audit
from ..concept_steer.analysis.audit_page import summary_picture
from ..concept_steer.analysis.word_list import from_lines
from ..concept_steer.demo.auditing import DemoJudge, usual_words
from .common import denoiser_of, schema, to_image_tensor
from .learn import SIZE
from .watch import Watch

FOLDER = "concept_steer_audit"
ROLES = io.String.Input(
    "roles", multiline=True, default="", tooltip="One a line, without article. Empty: the usual list (WinoBias)."
)
ATTRIBUTES = io.String.Input(
    "attributes",
    multiline=True,
    default="",
    tooltip="One a line: name, colon, values with templates, semicolons between them. Empty: gender, skin tone, age.",
)
WORDS = io.String.Input(
    "words", multiline=True, default="", optional=True, tooltip="Further words, one a line. Empty: the usual ones."
)
SEEDS = io.Int.Input("seeds", default=8, min=1, max=64, tooltip="Noises that each prompt is read from.")


class Progress(Watch):
    """A node's bar; Interrupt ends reading, and nothing is kept."""

    def told(self, what: str, done: int, total: int) -> None:
        self.at(percent(what, done, total))


class AuditCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerAudit",
            display_name="Audit Checkpoint",
            description="Reads from a model what it takes for granted when a prompt names a role and nothing else. "
            "Writes a page with charts, pictures and figures into the output folder.",
            search_aliases=["bias", "fairness", "analysis", "report", "stereotypes", "check model"],
            inputs=[
                io.Model.Input("model", tooltip="The model to look into. It is not changed."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="To draw the sample pictures."),
                io.String.Input("name", default="this model", tooltip="What the page calls the model."),
                ROLES,
                ATTRIBUTES,
                SEEDS,
                io.Int.Input("findings", default=4, min=0, max=24, tooltip="Strongest findings shown with pictures."),
                io.Int.Input("samples", default=8, min=0, max=64, tooltip="Pictures of each; 0 draws none."),
                io.Boolean.Input(
                    "fix", default=False, tooltip="Learn vectors that counter the leans, and read again with them on."
                ),
                SIZE,
                WORDS,
            ],
            outputs=[
                io.Image.Output(display_name="summary", tooltip="Each attribute's chart."),
                io.String.Output(display_name="report", tooltip="The strongest leans in a few lines."),
                io.String.Output(display_name="page", tooltip="Where the page lies: open it in a browser."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        name: str,
        roles: str,
        attributes: str,
        seeds: int,
        findings: int,
        samples: int,
        fix: bool,
        size: int,
        words: str = "",
    ) -> io.NodeOutput:
        denoiser = denoiser_of(model, clip, vae, size)
        listed = from_lines(usual_words(denoiser.family), roles, attributes, words)
        watch = Progress(cls.hidden.unique_id, None)
        standard = AuditSettings()
        settings = replace(
            standard,
            defaults=replace(standard.defaults, seeds=seeds),
            space=replace(standard.space, seeds=seeds),
            strongest=findings,
            samples=samples,
        )
        judge = DemoJudge() if denoiser.family == "demo" else None
        try:
            found = audit(
                denoiser,
                listed,
                settings=settings,
                name=name.strip() or "this model",
                judge=judge,
                fix=fix,
                progress=watch.told,
                stop=watch.stop,
            )
        except KeyboardInterrupt:
            raise comfy.model_management.InterruptProcessingException from None
        folder = fresh_folder(Path(folder_paths.get_output_directory()) / FOLDER)
        page = write_audit(found, folder)[-1]
        picture = summary_picture(found)
        watch.last(picture)
        shown = to_image_tensor([picture])
        return io.NodeOutput(shown, found.summary(), str(page), ui=ui.PreviewImage(shown, cls=cls))


NODES = [AuditCheckpoint]
