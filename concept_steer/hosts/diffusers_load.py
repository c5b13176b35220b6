"""Load a Stable Diffusion or SDXL pipeline from disk: never from the network, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import ConceptSteerError

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# What diffusers raises for files that are missing, incomplete or of another model.
LOADING = (OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError)


def load_pipeline(path: str | Path, device: str, dtype: torch.dtype) -> Any:
    """A StableDiffusionPipeline or StableDiffusionXLPipeline in eval mode on `device`; errors name the file."""
    path = Path(path)
    try:
        import diffusers
    except ImportError as error:
        raise ConceptSteerError(
            "This needs the diffusers library, which is not installed. Run: pip install concept-steer[diffusers]"
        ) from error
    if path.is_dir():
        pipe = _from_folder(diffusers, path, dtype)
    elif path.suffix == ".safetensors" and path.is_file():
        pipe = _from_file(diffusers, path, dtype)
    else:
        found = "is another kind of file" if path.exists() else "does not exist"
        raise ConceptSteerError(
            f"{path} {found}. Expected a diffusers folder (with model_index.json) or a single .safetensors checkpoint."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _from_folder(diffusers: Any, path: Path, dtype: torch.dtype) -> Any:
    index = path / "model_index.json"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConceptSteerError(
            f"{index} cannot be read ({error}). Expected a diffusers folder as save_pretrained writes it."
        ) from error
    name = content.get("_class_name")
    if name not in PIPELINES:
        raise ConceptSteerError(f"{path} holds a {name}; expected a {' or a '.join(PIPELINES)}.")
    # Pictures are checked by this package's own safety features, not by a second model.
    options: dict[str, Any] = _precision(dtype)
    if "safety_checker" in content:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        return getattr(diffusers, name).from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, **options
        )
    except LOADING as error:
        raise ConceptSteerError(
            f"The diffusers folder {path} could not be loaded: {error} Weights must be .safetensors files."
        ) from error


def _from_file(diffusers: Any, path: Path, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ConceptSteerError(f"{path} is not a readable safetensors file: {error}") from error
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise ConceptSteerError(
            f"{path} is not a full checkpoint: it has no model.diffusion_model weights (a LoRA, a VAE, a vector?)."
        )
    name = PIPELINES[any(key.startswith("conditioner.embedders.") for key in keys)]
    configs = path.with_suffix("")
    options: dict[str, Any] = _precision(dtype)
    if (configs / "model_index.json").is_file():
        options["config"] = str(configs)
    try:
        return getattr(diffusers, name).from_single_file(str(path), local_files_only=True, **options)
    except LOADING as error:
        raise ConceptSteerError(
            f"{path} could not be loaded from disk alone: {error} A single file carries no configs or tokenizer: put "
            f"the model's diffusers config files (model_index.json and the sub folders, without weights) in the "
            f"folder {configs}, or convert the checkpoint to a diffusers folder."
        ) from error


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    return {} if dtype == torch.float32 else {"torch_dtype": dtype}
