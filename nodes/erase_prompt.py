"""Erase Prompt: the negative prompt that keeps out what Learn Erasing learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..concept_steer.errors import LearnError, SettingError
from ..concept_steer.geom_erasing.embedding import ROOM, LocationTokens, kept_in
from ..concept_steer.geom_erasing.using import check_fit
from ..concept_steer.plots import card
from .common import schema, to_image_tensor

NONE = "(no embeddings yet)"
EMBEDDING = "embedding:"  # how a prompt calls one


class ErasePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerErasePrompt",
            display_name="Erase Prompt",
            description="The negative prompt that keeps out what Learn Erasing learned: your words, then the embedding "
            "that stands for the thing and all its places. Connect it to the text of a CLIP Text Encode node.",
            search_aliases=["Geom-Erasing", "negative prompt", "watermark", "remove text", "embedding"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that will read the prompt: its tokens are counted."),
                io.String.Input("text", multiline=True, default="", tooltip="Your negative prompt. May be empty."),
                io.Combo.Input(
                    "embedding",
                    options=sorted(_embeddings()) or [NONE],
                    tooltip="One that Learn Erasing saved. Others are not listed: type those into the text.",
                ),
                io.String.Input(
                    "learned",
                    optional=True,
                    force_input=True,
                    tooltip="The embedding that Learn Erasing gives, in its stead. An empty name adds nothing.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="For the text of a CLIP Text Encode node."),
                io.String.Output(display_name="tokens", tooltip="Which tokens the prompt takes, of the 75."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, embedding: str) -> bool | str:
        return True  # the list is as old as the page: what is not there is said when it runs

    @classmethod
    def fingerprint_inputs(cls, embedding: str, **given: Any) -> str:
        path = _embeddings().get(embedding)
        return "" if path is None else f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, clip: Any, text: str, embedding: str, learned: str | None = None) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_text import VECTOR, ComfyText, tokens_of

        name = embedding if learned is None else learned.strip()
        parts, rows = [text.strip().rstrip(",")], []
        if name:
            found = _embedding(name)
            check_fit(found, ComfyText(clip))
            parts.append(EMBEDDING + name)
            words = len(found) - found.bins**2
            rows.append((name, f"{found.concept!r} ({words}) and {found.bins} x {found.bins} places ({found.bins**2})"))
        prompt = ", ".join(part for part in parts if part)
        chunks = tokens_of(clip, prompt)
        count = sum(map(len, chunks))
        if len(chunks) > 1:
            raise SettingError(
                f"The negative prompt takes {count} tokens, and {ROOM} fit: a second part would be read by itself, and "
                "the places would be torn apart. Use fewer words of your own."
            )
        own = [token for token in chunks[0] if token != VECTOR]
        rows.insert(0, ("your words", f"{' '.join(own) or 'none'} ({len(own)})"))
        rows.append(("together", f"{count} of {ROOM} tokens"))
        shown = ui.PreviewImage(to_image_tensor([card("Erase Prompt", rows, width=520)]), cls=cls)
        return io.NodeOutput(prompt, "\n".join(f"{label}: {value}" for label, value in rows), ui=shown)


def _embeddings() -> dict[str, Path]:
    return kept_in([Path(folder) for folder in folder_paths.get_folder_paths("embeddings")])


def _embedding(name: str) -> LocationTokens:
    """Errors: LearnError when there is none of this name."""
    known = _embeddings()
    if name not in known:
        folders = ", ".join(folder_paths.get_folder_paths("embeddings"))
        raise LearnError(
            f"There is no embedding {name!r} that Learn Erasing saved in {folders}: turn its `save` on and run it, or "
            "choose another."
        )
    return LocationTokens.load(known[name])


NODES = [ErasePrompt]
