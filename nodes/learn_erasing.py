"""Learn Erasing (Geom-Erasing): what a model paints unasked, learned from pictures by where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..concept_steer.errors import LearnError, SettingError
from ..concept_steer.geom_erasing import lora
from ..concept_steer.geom_erasing.dataset import Scan, detect
from ..concept_steer.geom_erasing.dataset_report import covered_share, sheet
from ..concept_steer.geom_erasing.detectors import KNOWN, detector_of
from ..concept_steer.geom_erasing.embedding import LocationTokens, check_name
from ..concept_steer.geom_erasing.found_file import Found
from ..concept_steer.geom_erasing.learning import ErasingResult, learn_erasing
from ..concept_steer.geom_erasing.preview import ErasingPreview
from ..concept_steer.geom_erasing.reading import encode
from ..concept_steer.geom_erasing.settings import ErasingSettings, Examples
from ..concept_steer.learn.request import lines_of
from ..concept_steer.learn.watch import PREVIEWS
from ..concept_steer.library import safe_name
from ..concept_steer.pictures import stacked
from .common import denoiser_of, schema, to_image_tensor, to_pictures, to_pixels
from .watch import Watch

TOKENS, BOTH, MASKED = "tokens (model removal)", "tokens + LoRA (data removal)", "masked LoRA (no words needed)"
AT_ONCE = 8  # pictures a detector is given
LOOKING = 10  # percent of the bar that looking for the thing takes
SHOWN = 4  # pictures of the live preview


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
                    options=[TOKENS, BOTH, MASKED],
                    default=TOKENS,
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
        judge = detector_of(detector, threshold)
        own = str(getattr(judge, "concept", detector))
        concept = concept.strip() or own
        name = safe_name(check_name(name.strip() or "no-" + "-".join(concept.lower().split())))
        settings = ErasingSettings(
            bins=bins,
            steps=steps,
            batch=batch,
            rank=0 if way == TOKENS else rank,
            way="masked" if way == MASKED else "told",
            seed=token_seed,
        )
        paths = _paths(name, way, overwrite) if save else {}
        watch = _Watch(cls.hidden.unique_id)
        images = _whole_cells(images)
        texts = _captions(captions, len(images))
        pictures = to_pictures(images)
        found = watch.looking(pictures, texts, lambda some, told: detect(some, told, [judge]))
        boxes = [one.boxes.get(own, []) for one in found]
        denoiser = denoiser_of(model, clip, vae, 0)
        examples = Examples(encode(denoiser, to_pixels(images)), texts, boxes)
        result = watch.learned(denoiser, examples, concept, name, settings)
        changed = _with_lora(model, result)
        told = [_seen(boxes, concept), *result.summary().splitlines(), *_kept(result, paths, overwrite)]
        after = watch.preview.sheet(result.tokens, "before and after", denoiser_of(changed, clip, vae, 0))
        where = _sheet(pictures, found, own)
        watch.last(stacked([after, where]))
        watch.finish()
        shown = [to_image_tensor([one]) for one in (after, where)]
        saved = [image for one in shown for image in ui.PreviewImage(one, cls=cls).as_dict()["images"]]
        return io.NodeOutput(
            changed,
            "" if result.tokens is None else name,
            "\n".join(told),
            shown[1],
            ui={"images": saved, "animated": (False,)},
        )


class _Watch(Watch):
    """Looking for the thing, then learning, on one bar with live pictures; Interrupt keeps what is learned."""

    preview: Any

    def __init__(self, node_id: Any) -> None:
        super().__init__(node_id, None)

    def looking(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        look: Callable[[Sequence[Image.Image], Sequence[str]], list[Found]],
    ) -> list[Found]:
        """What is in the pictures; their files' names are their numbers."""
        found: list[Found] = []
        for first in range(0, len(images), AT_ONCE):
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = slice(first, first + AT_ONCE)
            found += look(images[part], captions[part])
            self.at(LOOKING * min(len(found) / len(images), 1))
        return [
            Found(Path(f"picture {i + 1}"), one.caption, one.boxes, "", one.size, one.scores)
            for i, one in enumerate(found)
        ]

    def learned(
        self, denoiser: Any, examples: Examples, concept: str, name: str, settings: ErasingSettings
    ) -> ErasingResult:
        prompts = list(dict.fromkeys([*(examples.captions[i] for i in examples.spoiled), *examples.captions]))
        seeds = [settings.seed + 1000 + i for i in range(SHOWN)]
        self.preview = ErasingPreview(denoiser, [prompts[i % len(prompts)] for i in range(SHOWN)], seeds)

        def progress(step: int, steps: int, loss: float, tokens: Callable[[], LocationTokens]) -> None:
            words, image = f"step {step} of {steps}, loss {loss:.3f}", None
            if step % max(1, steps // PREVIEWS) == 0 and not self.stop():
                image = self.preview.sheet(tokens() if settings.way == "told" else None, words)
            self.at(LOOKING + (100 - LOOKING) * step / steps, image, words)

        try:
            self.preview.begin()
            return learn_erasing(
                denoiser, examples, concept, name=name, settings=settings, progress=progress, stop=self.stop
            )
        except LearnError:
            if self.interrupted:  # before its first step: there is nothing to keep
                raise comfy.model_management.InterruptProcessingException from None
            raise


def _paths(name: str, way: str, overwrite: bool) -> dict[str, Path]:
    """Where the parts are kept. Errors: SettingError for a name that is taken: before minutes of learning."""
    kinds = {TOKENS: ("embeddings",), BOTH: ("embeddings", "loras"), MASKED: ("loras",)}[way]
    found = {kind: Path(folder_paths.get_folder_paths(kind)[0]) / f"{name}.safetensors" for kind in kinds}
    taken = [str(path) for path in found.values() if path.exists()]
    if taken and not overwrite:
        raise SettingError(f"{taken[0]} is there already: choose another name, or turn `overwrite` on.")
    return found


def _kept(result: ErasingResult, paths: dict[str, Path], overwrite: bool) -> list[str]:
    if not paths:
        return ["Not kept: save is off."]
    if result.tokens is not None:
        result.tokens.save(paths["embeddings"], overwrite)
    if result.lora is not None:
        about = {
            "concept": result.concept,
            "steps": str(len(result.losses)),
            "way": "told" if result.tokens is not None else "masked",
        }
        lora.save(result.lora, paths["loras"], about, overwrite)
    return [f"Saved: {', '.join(f'{kind}/{path.name}' for kind, path in paths.items())}."]


def _with_lora(model: Any, result: ErasingResult) -> Any:
    if result.lora is None:
        return model
    from ..concept_steer.hosts.comfy_lora import with_lora

    return with_lora(model, result.lora)


def _captions(text: str, count: int) -> list[str]:
    """Errors: SettingError when there are neither none, nor one, nor one for each picture."""
    lines = lines_of(text) or [""]
    if len(lines) not in (1, count):
        raise SettingError(
            f"{count} pictures came with {len(lines)} captions: write one line for all of them, or one for each."
        )
    return lines * count if len(lines) == 1 else lines


def _whole_cells(images: torch.Tensor) -> torch.Tensor:
    """Cut at the edges to multiples of 8 pixels, as the VAE does it: boxes are then where the latent has them."""
    height, width = (side // 8 * 8 for side in images.shape[1:3])
    top, left = ((side - kept) // 2 for side, kept in zip(images.shape[1:3], (height, width), strict=True))
    return images[:, top : top + height, left : left + width]


def _seen(boxes: Sequence[Any], concept: str) -> str:
    mine = [covered_share(one) for one in boxes if one]
    told = f"{concept!r} was found in {len(mine)} of {len(boxes)} pictures ({len(mine) / len(boxes):.0%})"
    return told + (f"; where it is, it covers {sum(mine) / len(mine):.0%} of the picture." if mine else ".")


def _sheet(pictures: Sequence[Image.Image], found: Sequence[Found], concept: str) -> Image.Image:
    images = {one.file: picture for one, picture in zip(found, pictures, strict=True)}
    return sheet(Scan(found, (), 0, [concept], True, Path()), Path(), images)


NODES = [LearnErasing]
