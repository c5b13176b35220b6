"""What the panels of the web UI's tab share: names of elements, fields, uploaded files, words as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from modules import paths

from ..errors import ConceptSteerError

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]


def slider(name: str, low: float, high: float, usual: float, label: str, step: float = 1) -> Any:
    return gr.Slider(low, high, usual, step=step, label=label, elem_id=element(name))


def files_field(label: str, name: str) -> Any:
    return gr.File(label=label, file_count="multiple", file_types=SUFFIXES, elem_id=element(name))


def paths_of(files: Sequence[Any] | None) -> list[Path]:
    return [path_of(file) for file in files or ()]


def path_of(file: Any) -> Path:
    """Of an uploaded file: gradio 3 gives an object with a name, gradio 4 the name."""
    return Path(getattr(file, "name", file))


def shown_path(path: Path) -> str:
    """As seen from the web UI's folder or from home: not every reader of the page need know the machine's folders."""
    for root, short in ((Path(paths.data_path), ""), (Path.home(), "~")):
        if path.is_relative_to(root):
            return str(Path(short) / path.relative_to(root))
    return str(path)


def element(name: str) -> str:
    return f"concept_steer_{name}"


def in_html(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def failed(error: ConceptSteerError, *uploaded: Path) -> str:
    """uploaded: files that the error may name; where they lie now is nothing to the user."""
    text = str(error)
    for file in uploaded:
        text = text.replace(str(file), file.name)
    return f"<div class='error'>{in_html(text)}</div>"
