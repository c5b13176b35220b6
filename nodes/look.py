"""What the nodes share that look into a model: their sockets, the reader behind them, and how results are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..concept_steer.analysis.audit import AuditSettings
from ..concept_steer.analysis.reading import Reader
from ..concept_steer.analysis.word_list import WordList, name_of
from ..concept_steer.demo.auditing import usual_words
from ..concept_steer.denoiser import Denoiser
from ..concept_steer.learn.request import lines_of
from .common import denoiser_of, to_image_tensor
from .watch import Watch

MODEL = io.Model.Input("model", tooltip="The model to look into. It is not changed.")
CLIP = io.Clip.Input("clip", tooltip="Its text encoder.")
WORDS = io.String.Input(
    "words", multiline=True, default="", tooltip="One a line; empty braces stand for a person. Empty: the usual ones."
)
PROMPTS = io.String.Input("prompts", multiline=True, default="", tooltip="One a line. Empty: the usual roles.")
PICTURE = io.Image.Output(display_name="picture", tooltip="The chart.")
REPORT = io.String.Output(display_name="report", tooltip="The same in words and figures.")


@contextmanager
def interruptible() -> Iterator[None]:
    """A reading that Interrupt ended ends the graph too, as ComfyUI expects it."""
    try:
        yield
    except KeyboardInterrupt:
        raise comfy.model_management.InterruptProcessingException from None


class Look(Watch):
    """A node's bar for one reading; Interrupt ends it, and nothing is kept."""

    def read(self, reader: Reader, prompts: list[str]) -> dict[str, torch.Tensor]:
        with interruptible():
            return reader.read(prompts, lambda done, total: self.at(99 * done / total))


def begin(cls: Any, model: Any, clip: Any, seeds: int, predicted: bool = False) -> tuple[Denoiser, Look, Reader]:
    denoiser = denoiser_of(model, clip, None, 0)
    watch = Look(cls.hidden.unique_id, None)
    standard = AuditSettings().defaults if predicted else AuditSettings().space
    settings = replace(standard, seeds=seeds, neutral=usual_words(denoiser.family).neutral)
    return denoiser, watch, Reader(denoiser, settings, batch=16, stop=watch.stop)


def shown(cls: Any, watch: Watch, image: Image.Image, lines: list[str]) -> io.NodeOutput:
    watch.last(image)
    tensor = to_image_tensor([image])
    return io.NodeOutput(tensor, "\n".join(lines), ui=ui.PreviewImage(tensor, cls=cls))


def table_of(words: str, usual_list: WordList) -> dict[str, str]:
    given = {name_of(word): word.replace("{}", usual_list.neutral) for word in lines_of(words)}
    return given or usual_list.directions()


def prompts_of(text: str, usual_list: WordList) -> dict[str, str]:
    return {line: line for line in lines_of(text)} or {role: usual_list.prompt(role) for role in usual_list.roles}
