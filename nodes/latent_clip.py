"""Load Latent CLIP, Score Latents and Pick Best Latents: pictures judged before they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..concept_steer.demo import latent_clip as embedded
from ..concept_steer.demo.model import file_hash
from ..concept_steer.errors import LibraryError, SettingError
from ..concept_steer.latent_clip import LatentClipModel, check_space, load_latent_clip, order_latents, score, space_of
from ..concept_steer.learn.request import lines_of
from ..concept_steer.plots import card
from .common import schema, to_image_tensor

FOLDER = "latent_clip"
EMBEDDED = "demo (embedded)"
Judge = io.Custom("LATENT_CLIP")
CLIP = Judge.Input("latent_clip", tooltip="From Load Latent CLIP; one for the VAE that these latents are of.")
SAMPLES = io.Latent.Input("samples", tooltip="A batch of latents, as a sampler gives them.")
MODEL = io.Model.Input(
    "model", optional=True, tooltip="The model that drew them: another latent space is then an error that names both."
)
MANY = 32  # rows of a table that is shown


@dataclass(frozen=True)
class Loaded:
    """What a LATENT_CLIP socket carries: the towers, and what lets ComfyUI move them to and from the card.

    embedded: whether they are the demo model's own, which come with measured limits for Latent Guard.
    """

    clip: LatentClipModel
    patcher: Any
    embedded: bool = False


def files() -> dict[str, Path]:
    """The converted latent CLIPs in models/latent_clip, and in the folders that extra_model_paths.yaml names so."""
    paths = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0]
    found: dict[str, Path] = {}
    for folder in (*map(Path, paths), Path(folder_paths.models_dir) / FOLDER):
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            found.setdefault(path.name, path)
    return found


def _file(name: str) -> Path:
    found = files()
    if name not in found:
        raise LibraryError(
            f"There is no latent CLIP {name!r} in {Path(folder_paths.models_dir) / FOLDER} (there are: "
            f"{', '.join(found) or 'none'}). Convert one with `concept-steer latent-clip convert`."
        )
    return found[name]


def scaled(loaded: Loaded, samples: dict[str, Any], model: Any) -> torch.Tensor:
    """A LATENT's latents as the UNet sees them. Errors: FamilyMismatch, ConceptSteerError for another latent space."""
    clip = loaded.clip
    if model is not None:
        from ..concept_steer.hosts.comfy import family_of

        family = family_of(model)[0]
        check_space(clip.space, space_of(family), f"The model ({family})")
    latents = clip.space.scaled(samples["samples"], False, "The latents of this socket")
    comfy.model_management.load_model_gpu(loaded.patcher)
    return latents


def shown(cls: Any, title: str, rows: Sequence[tuple[str, str]]) -> Any:
    """The table on the node, as a picture."""
    rest = [("", f"and {len(rows) - MANY} more")] if len(rows) > MANY else []
    return ui.PreviewImage(to_image_tensor([card(title, [*rows[:MANY], *rest], width=520)]), cls=cls)


class LoadLatentClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerLoadLatentClip",
            display_name="Load Latent CLIP",
            description="A CLIP that reads latents instead of pictures: the demo model's own, or a published one that "
            "was converted into models/latent_clip.",
            search_aliases=["judge", "score", "reward", "aesthetic", "clip score"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[EMBEDDED, *files()],
                    tooltip="The file's name. Press R in ComfyUI to see new files.",
                )
            ],
            outputs=[
                Judge.Output(
                    display_name="latent clip",
                    tooltip="For Score Latents, Pick Best Latents, Optimise Noise and Latent Guard.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return file_hash() if name == EMBEDDED else f"{name} {_file(name).stat().st_mtime_ns}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        from comfy.model_patcher import ModelPatcher

        clip = embedded.load() if name == EMBEDDED else load_latent_clip(_file(name))
        place = comfy.model_management.get_torch_device()
        patcher = ModelPatcher(clip, place, torch.device("cpu"))
        return io.NodeOutput(Loaded(clip, patcher, name == EMBEDDED))


class ScoreLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerScoreLatents",
            display_name="Score Latents",
            description="How well each latent of a batch fits each of some texts, before anything is decoded.",
            search_aliases=["clip score", "judge", "classify", "zero-shot", "reward"],
            inputs=[
                CLIP,
                SAMPLES,
                io.String.Input("texts", multiline=True, default="", tooltip="One a line; several are held together."),
                MODEL,
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A line for each latent: cosines and probabilities."),
                io.Float.Output(display_name="score", tooltip="The mean cosine of the batch with the first text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent_clip: Loaded, samples: dict[str, Any], texts: str, model: Any = None) -> io.NodeOutput:
        found = score(latent_clip.clip, scaled(latent_clip, samples, model), lines_of(texts))
        rows = []
        for cosines, chances in zip(found.cosines.tolist(), found.probabilities.tolist(), strict=True):
            parts = zip(found.texts, cosines, chances, strict=True)
            rows.append(", ".join(f"{text} {cosine:.3f} ({chance:.0%})" for text, cosine, chance in parts))
        named = [(f"{number + 1}", row) for number, row in enumerate(rows)]
        report = "\n".join(f"{name}: {row}" for name, row in named)
        return io.NodeOutput(report, float(found.cosines[:, 0].mean()), ui=shown(cls, "scores", named))


class PickBestLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerPickLatents",
            display_name="Pick Best Latents",
            description="Keeps the latents of a batch that fit a text best, best first, so that only those are "
            "decoded. Draw many with a batch of Empty Latent Image.",
            search_aliases=["best of n", "rank", "select seed", "rerank", "reward"],
            inputs=[
                CLIP,
                SAMPLES,
                io.String.Input("text", multiline=True, default="", tooltip="What they are ranked by: your prompt."),
                io.Int.Input("count", default=2, min=1, max=4096, tooltip="How many are kept."),
                io.String.Input(
                    "avoid",
                    multiline=True,
                    default="",
                    tooltip="One a line: texts that a good one should fit less than the first. Empty: none.",
                ),
                MODEL,
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The best, best first."),
                io.String.Output(display_name="report", tooltip="All of the batch with their scores, best first."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, latent_clip: Loaded, samples: dict[str, Any], text: str, count: int, avoid: str, model: Any = None
    ) -> io.NodeOutput:
        if not text.strip():
            raise SettingError("There is no text to rank the latents by: type your prompt into `text`.")
        latents = scaled(latent_clip, samples, model)
        found = order_latents(latent_clip.clip, latents, range(len(latents)), text.strip(), lines_of(avoid))
        kept = found.best(count).seeds
        rows = [(f"{place + 1}", f"{value:.3f}") for place, value in zip(found.seeds, found.values, strict=True)]
        report = "\n".join(f"{name}: {value}" for name, value in rows)
        return io.NodeOutput(_picked(samples, list(kept)), report, ui=shown(cls, "best first", rows))


def _picked(samples: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """A LATENT with these rows only: latents, their masks where each has its own, and their places in the batch."""
    count = len(samples["samples"])
    places = samples.get("batch_index", list(range(count)))
    out = {**samples, "samples": samples["samples"][rows], "batch_index": [places[row] for row in rows]}
    mask = samples.get("noise_mask")
    if mask is not None and len(mask) == count:
        out["noise_mask"] = mask[rows]
    return out


NODES = [LoadLatentClip, ScoreLatents, PickBestLatents]
