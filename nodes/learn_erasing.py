"""Learn Erasing (Geom-Erasing): what a model paints unasked, learned from pictures by where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..concept_steer.errors import LearnError
from ..concept_steer.geom_erasing.detectors import KNOWN
from ..concept_steer.geom_erasing.learning import ErasingResult
from ..concept_steer.geom_erasing.reading import encode
from ..concept_steer.geom_erasing.request import EMBEDDINGS, LORAS, TOKENS, WAYS, Erasing, ErasingRequest
from ..concept_steer.geom_erasing.settings import Examples
from ..concept_steer.pictures import stacked
from .common import denoiser_of, schema, to_image_tensor, to_pictures, to_pixels
from .watch import Watch

KEYS = {words: key for key, words in WAYS.items()}


class LearnErasing(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLearnErasing",
            display_name="Learn Erasing",
            description="Learns what nobody asked for (watermarks, QR codes, text) from pictures in which a detector "
            "finds it: as words for the negative prompt, as a LoRA, or both. Interrupt keeps what is learned. The "
            "model that is connected stays as it is.",
            search_aliases=["Geom-Erasing", "watermark", "remove text", "QR code", "unlearn", "textual inversion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE: it reads the pictures."),
                io.Image.Input(
                    "images",
                    tooltip="Pictures, some of them with the thing: at least 4, better 50. For a LoRA clean ones too.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="What the pictures show, one a line, or one line for all. The thing itself is not named.",
                ),
                io.Combo.Input(
                    "detector",
                    options=list(KNOWN),
                    default="watermark",
                    tooltip="What looks for it. Those of the demo model begin with demo; others need packages and say "
                    "which.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    tooltip="How sure the detector must be. Lower finds more, and more that is not there.",
                ),
                io.String.Input(
                    "concept", default="", tooltip="The thing's name in words. Empty: what the detector calls it."
                ),
                io.Combo.Input(
                    "way",
                    options=list(KEYS),
                    default=WAYS[TOKENS],
                    tooltip="Tokens: words for the negative prompt, the model stays. With LoRA: learns the pictures "
                    "too, without the thing. Masked: a LoRA from all but the thing, used without words.",
                ),
                io.Int.Input(
                    "bins", default=4, min=1, max=8, tooltip="Places a side: 4 means 16 words for where it is."
                ),
                io.Int.Input("steps", default=400, min=1, max=20000, tooltip="Steps of learning."),
                io.Int.Input("batch", default=4, min=1, max=64, tooltip="Pictures a step: steadier, more memory."),
                io.Int.Input("rank", default=16, min=1, max=256, tooltip="Of the LoRA, where there is one."),
                io.Int.Input(
                    "token_seed", default=0, min=0, max=2**31 - 1, tooltip="Same seed, same result. It stays."
                ),
                io.String.Input(
                    "name", default="", tooltip="Of the files and in prompts. Empty: no- and the thing's name."
                ),
                io.Boolean.Input(
                    "save",
                    default=True,
                    tooltip="Keep it as a file: the embedding with ComfyUI's embeddings, the LoRA with its LoRAs.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Off: a file of that name is an error, so that nothing is lost."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="With the LoRA on it, if there is one."),
                io.String.Output(
                    display_name="embedding", tooltip="The embedding's name, for Erase Prompt; empty without tokens."
                ),
                io.String.Output(display_name="report", tooltip="What was found, learned and kept, in words."),
                io.Image.Output(display_name="found", tooltip="Where the detector found it, in boxes."),
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
        images: torch.Tensor,
        captions: str,
        detector: str,
        threshold: float,
        concept: str,
        way: str,
        bins: int,
        steps: int,
        batch: int,
        rank: int,
        token_seed: int,
        name: str = "",
        save: bool = True,
        overwrite: bool = False,
    ) -> io.NodeOutput:
        request = ErasingRequest(
            detector, threshold, concept, captions, KEYS[way], bins, steps, batch, rank, token_seed, name
        )
        watch = Watch(cls.hidden.unique_id, None)
        folders = {kind: Path(folder_paths.get_folder_paths(kind)[0]) for kind in (EMBEDDINGS, LORAS)}
        work = Erasing(request, watch, folders if save else None, overwrite)
        images = _whole_cells(images)
        texts = request.captions_of(len(images))
        pictures = to_pictures(images)
        work.look(pictures.__getitem__, texts, comfy.model_management.throw_exception_if_processing_interrupted)
        denoiser = denoiser_of(model, clip, vae, 0)
        result = _learned(work, denoiser, Examples(encode(denoiser, to_pixels(images)), texts, work.boxes))
        changed = _with_lora(model, result)
        told = work.keep()
        after = work.preview.sheet(result.tokens, "before and after", denoiser_of(changed, clip, vae, 0))
        where = work.where()
        watch.last(stacked([after, where]))
        watch.finish()
        shown = [to_image_tensor([one]) for one in (after, where)]
        saved = [image for one in shown for image in ui.PreviewImage(one, cls=cls).as_dict()["images"]]
        return io.NodeOutput(
            changed,
            "" if result.tokens is None else work.name,
            "\n".join(told),
            shown[1],
            ui={"images": saved, "animated": (False,)},
        )


def _learned(work: Erasing, denoiser: Any, examples: Examples) -> ErasingResult:
    try:
        return work.learn(denoiser, examples)
    except LearnError:
        if work.watch.interrupted:  # before its first step: there is nothing to keep
            raise comfy.model_management.InterruptProcessingException from None
        raise


def _with_lora(model: Any, result: ErasingResult) -> Any:
    if result.lora is None:
        return model
    from ..concept_steer.hosts.comfy_lora import with_lora

    return with_lora(model, result.lora)


def _whole_cells(images: torch.Tensor) -> torch.Tensor:
    """Cut at the edges to multiples of 8 pixels, as the VAE does it: boxes are then where the latent has them."""
    height, width = (side // 8 * 8 for side in images.shape[1:3])
    top, left = ((side - kept) // 2 for side, kept in zip(images.shape[1:3], (height, width), strict=True))
    return images[:, top : top + height, left : left + width]


NODES = [LearnErasing]
