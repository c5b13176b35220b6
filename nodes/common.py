"""What all node files share: the vector socket, the library's folders, pictures to and from tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..concept_steer.denoiser import Denoiser
from ..concept_steer.errors import ConceptSteerError
from ..concept_steer.library import Library
from ..concept_steer.vector import ConceptVector

CATEGORY = "Concept Steer"
FOLDER = "concept_vectors"
Vector = io.Custom("CONCEPT_VECTOR")
SHORT = 10  # hex digits of the hash that stand beside a name
EMPTY = "(no vectors yet)"


def schema(**fields: Any) -> io.Schema:
    """io.Schema with the keywords that this version of ComfyUI knows (search words came later than the rest)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    fields.setdefault("category", CATEGORY)
    return io.Schema(**{key: value for key, value in fields.items() if key in known})


def register_folder() -> None:
    """`models/concept_vectors`, made at first start; folders of extra_model_paths.yaml are kept, and come first."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    paths = list(folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0])
    if own not in paths:
        paths.append(own)
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
    os.makedirs(own, exist_ok=True)


def library() -> Library:
    """ComfyUI's folders of concept vectors, then the vectors that come with the pack."""
    shipped = Path(__file__).resolve().parents[1] / "vectors"
    return Library([*folder_paths.get_folder_paths(FOLDER), *([shipped] if shipped.is_dir() else [])])


def choices() -> list[str]:
    """Names with the first digits of the content's hash, by which a file is found again after a rename."""
    return [f"{entry.name} [{entry.hash[:SHORT]}]" for entry in library().entries()] or [EMPTY]


def chosen(choice: str) -> tuple[ConceptVector, Path]:
    """The vector a choice means and its file: by name, else by hash. Errors: LibraryError, VectorFileError."""
    if choice == EMPTY:
        folders = ", ".join(str(folder) for folder in library().folders)
        raise ConceptSteerError(
            f"There are no concept vectors yet. Learn one, or put a .safetensors file into {folders}."
        )
    name, _, rest = choice.rpartition(" [")
    digest = rest.removesuffix("]")
    name = name if name and rest.endswith("]") else choice
    names = {entry.name: entry for entry in library().entries()}
    entry = names.get(name)
    if entry is None and name != choice and digest:
        entry = next((e for e in names.values() if e.hash.startswith(digest)), None)
    entry = entry or library().find(name)
    return ConceptVector.load(entry.path), entry.path


def vectors_of(value: Any) -> list[ConceptVector]:
    """One vector or a list of them, from a CONCEPT_VECTOR socket."""
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    for vector in found:
        if not isinstance(vector, ConceptVector):
            raise ConceptSteerError(
                f"A CONCEPT_VECTOR socket brought a {type(vector).__name__}: connect a node that gives vectors, "
                "such as Load Concept Vector or Learn Concept."
            )
    return found


def to_image_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size -> IMAGE (B, H, W, 3), fp32 in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).float() / 255


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """IMAGE (B, H, W, C) in 0..1 -> (B, 3, H, W) in [-1, 1]."""
    return images[..., :3].movedim(-1, 1).float().clamp(0, 1) * 2 - 1


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """IMAGE (B, H, W, C) -> PIL pictures."""
    array = (images[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def denoiser_of(model: Any, clip: Any, vae: Any, size: int) -> Denoiser:
    """What learning works on. size: of its pictures in pixels, 0 for the model's own."""
    from ..concept_steer.hosts.comfy_denoiser import ComfyDenoiser

    return ComfyDenoiser(model, clip, vae, size or None)
