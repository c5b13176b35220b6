"""The public checkpoints of Latent-CLIP, read without running what may be in them, and kept as safetensors.

They are what OpenCLIP's training script saves (epoch_34.pt): {"epoch", "name", "state_dict", "optimizer", "scaler"}
with "module." before every key, numpy scalars in the optimizer's state, and the VAE's encoder in the picture tower.
`convert` reads one once, checks it, and writes the two towers with their vocabulary as one file of ours.
"""

from __future__ import annotations

import inspect
import json
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConceptSteerError
from ..vector_file import write_atomic
from .model import CONFIGS, ClipConfig, LatentClipModel, TowerSize
from .spaces import LatentSpace, check_space, space
from .tokenizer import ClipTokenizer

VERSION = 1
SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
HEAD_WIDTH = 64  # OpenCLIP's, in both towers of every ViT-B
MAX_BYTES = 8 * 2**30
IN_FILE, HERE = "visual.latent_vit.", "visual."
PARTS_OF_VAE = ("visual.vae_encoder.", "visual.vae_quant_conv.")
CONVERT = "concept-steer latent-clip convert"


def numpy_globals() -> list[Any]:
    """What a pickled numpy scalar names: its constructor, under numpy's old and new name, and its number types."""
    constructor = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    named = [(constructor, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*named, np.dtype, *numbers]


def _with_numpy_scalars(path: Path) -> AbstractContextManager[Any]:
    """Allows those and nothing else, for one reading. Errors: ConceptSteerError where torch is too old for it."""
    allow = getattr(torch.serialization, "safe_globals", None)
    # names beside the objects came a version after safe_globals itself
    if allow is None or "tuple" not in str(inspect.signature(torch.serialization.add_safe_globals)).lower():
        raise ConceptSteerError(
            f"{path} holds numpy scalars, which torch {torch.__version__} cannot read safely: convert it where torch "
            f"is 2.6 or newer (`{CONVERT}`); the converted file can be used with this one."
        )
    return allow(numpy_globals())


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """A public checkpoint's two towers, with the names of `LatentClipModel`; the VAE and the optimizer left out.

    .pt files are read with weights_only (tensors, plain containers and numpy scalars: no code runs). Errors:
    ConceptSteerError, which names the file, what was found in it, and what was expected.
    """
    path = Path(path)
    found = _load(path)
    stored = found.get("state_dict", found) if isinstance(found, Mapping) else None
    tensors = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)} if isinstance(stored, Mapping) else {}
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if not any(key.startswith(IN_FILE) for key in tensors):
        raise ConceptSteerError(
            f"{path} is not a latent CLIP: expected weights named {IN_FILE}..., but found {_looks_like(tensors)}. The "
            "public ones are latent-clip-b-8-512-34b-80k and latent-clip-b-4-512-plus-34b-80k, file epoch_34.pt."
        )
    kept = {key: value for key, value in tensors.items() if not key.startswith(PARTS_OF_VAE)}
    return {key.replace(IN_FILE, HERE, 1): value.detach() for key, value in kept.items()}


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ConceptSteerError(f"{path} is not a file: name a public checkpoint (epoch_34.pt).")
    if path.stat().st_size > MAX_BYTES:
        raise ConceptSteerError(f"{path} is larger than {MAX_BYTES // 2**30} GiB, too large for a latent CLIP.")
    try:
        if path.suffix == SUFFIX:
            return safetensors.torch.load_file(path)
        try:
            return _unpickled(path, nullcontext())
        except pickle.UnpicklingError as error:
            if "numpy" not in str(error):
                raise
            return _unpickled(path, _with_numpy_scalars(path))
    except ConceptSteerError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise ConceptSteerError(
            f"{path} holds more than tensors and plain numbers ({reason}), or is damaged. It may contain code, so it "
            "was not loaded: get the public checkpoint from its authors, or a safetensors file."
        ) from error
    except Exception as error:  # on damaged files torch's reader raises whatever its parser stumbles over
        raise ConceptSteerError(f"{path} is damaged or no checkpoint ({error}): copy or download it again.") from error


def _unpickled(path: Path, allowed: AbstractContextManager[Any]) -> Any:
    # torch.load itself may be replaced: AUTOMATIC1111's refuses what newer versions of torch saved
    with allowed:
        return torch.serialization.load(
            str(path), map_location="cpu", weights_only=True, mmap=True if zipfile.is_zipfile(path) else None
        )


def config_of(state: Mapping[str, Tensor], source: str = "The checkpoint") -> ClipConfig:
    """The sizes of a model, from its weights. Errors: ConceptSteerError when they are not those of a latent CLIP."""
    try:
        width, channels, patch, _ = state["visual.conv1.weight"].shape
        text_width, embed = state["text_projection"].shape
        vocabulary = state["token_embedding.weight"].shape[0]
        cells = state["visual.positional_embedding"].shape[0] - 1
        config = ClipConfig(
            embed,
            TowerSize(width, _layers(state, "visual.transformer."), width // HEAD_WIDTH),
            TowerSize(text_width, _layers(state, "transformer."), text_width // HEAD_WIDTH),
            patch=patch,
            size=round(cells**0.5) * patch,
            channels=channels,
            vocabulary=vocabulary,
            context=state["positional_embedding"].shape[0],
        )
    except (KeyError, ValueError) as error:
        raise ConceptSteerError(f"{source} is not a whole latent CLIP: {error} is missing or misshapen.") from error
    if width % HEAD_WIDTH or text_width % HEAD_WIDTH or (config.size // patch) ** 2 != cells:
        raise ConceptSteerError(
            f"{source} has towers {width} and {text_width} wide with {cells} patches; expected multiples of "
            f"{HEAD_WIDTH} and a square number of patches, as the published {', '.join(CONFIGS)} have."
        )
    return config


def _layers(state: Mapping[str, Tensor], stem: str) -> int:
    stem += "resblocks."
    return 1 + max(int(key[len(stem) :].partition(".")[0]) for key in state if key.startswith(stem))


def build(
    state: Mapping[str, Tensor], config: ClipConfig, space: LatentSpace, tokenizer: ClipTokenizer, source: str
) -> LatentClipModel:
    """The model with these weights, in evaluation mode, frozen. Errors: ConceptSteerError where they do not fit."""
    if len(tokenizer) != config.vocabulary:
        raise ConceptSteerError(
            f"{source} knows {config.vocabulary} tokens, but the vocabulary has {len(tokenizer)}: it belongs to "
            "another model. Name CLIP's own with --tokenizer."
        )
    if config.channels != space.channels:
        raise ConceptSteerError(
            f"{source} reads latents of {config.channels} channels, but those of {space.words()} have {space.channels}."
        )
    with torch.device("meta"):
        model = LatentClipModel(config, space, tokenizer)
    try:
        model.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ConceptSteerError(f"{source} does not have the weights of a latent CLIP: {lines[:400]}") from error
    return model.eval().requires_grad_(False)


def convert(
    path: Path | str, out: Path | str, tokenizer: ClipTokenizer, *, space_name: str = "sdxl", overwrite: bool = False
) -> LatentClipModel:
    """A public checkpoint as one safetensors file: both towers, sizes, latent space and vocabulary. Atomic.

    space_name: whose latents it was trained on; both published ones on SDXL's (with the VAE sdxl-vae-fp16-fix), which
    the checkpoint itself does not say. The model, as `load_latent_clip` would give it. Errors: ConceptSteerError.
    """
    path, out = Path(path), Path(out)
    if out.suffix != SUFFIX:
        raise ConceptSteerError(f"{out} must end in {SUFFIX}.")
    state = read_checkpoint(path)
    config = config_of(state, str(path))
    model = build(state, config, space(space_name), tokenizer, str(path))
    title = next((name for name, known in CONFIGS.items() if known == config), "Latent-CLIP")
    write_atomic(out, safetensors.torch.save(_contiguous(state), _metadata(model, title)), overwrite=overwrite)
    return model


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in state.items()}


def _metadata(model: LatentClipModel, title: str) -> dict[str, str]:
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "latent-clip",
        "modelspec.title": title,
        "latent_clip.version": str(VERSION),
        "latent_clip.config": json.dumps(model.config.as_dict()),
        "latent_clip.space": model.space.name,
        "latent_clip.scaling": repr(model.space.scaling),
        "tokenizer.vocab": json.dumps(model.tokenizer.vocabulary, ensure_ascii=False, separators=(",", ":")),
        "tokenizer.merges": "\n".join(model.tokenizer.merges),
    }


def load_latent_clip(
    path: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LatentClipModel:
    """A converted latent CLIP, ready to use. Errors: ConceptSteerError, which says what the file is instead."""
    path = Path(path)
    if not path.is_file():
        raise ConceptSteerError(f"{path} is not a file: name a latent CLIP, as `{CONVERT}` writes it, or 'demo'.")
    if path.suffix in PICKLES:
        raise ConceptSteerError(
            f"{path} is a pickle, which is not read each time: convert it once with `{CONVERT} {path.name} --out FILE`."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if "latent_clip.config" not in about:
                raise ConceptSteerError(
                    f"{path} is not a latent CLIP of ours: it lacks the metadata latent_clip.config. Convert a public "
                    f"checkpoint with `{CONVERT}`."
                )
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConceptSteerError(f"{path} is damaged or no safetensors file ({error}): convert it again.") from error
    if not (about.get("latent_clip.version", "").isdigit() and int(about["latent_clip.version"]) <= VERSION):
        raise ConceptSteerError(f"{path} comes from a newer version of Concept Steer: update it.")
    try:
        config = ClipConfig.from_dict(json.loads(about["latent_clip.config"]))
        known = space(about["latent_clip.space"])
        found = LatentSpace(**{**vars(known), "scaling": float(about["latent_clip.scaling"])})
        tokenizer = ClipTokenizer(json.loads(about["tokenizer.vocab"]), about["tokenizer.merges"].split("\n"))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConceptSteerError(f"{path} is damaged ({error!r} in its metadata): convert it again.") from error
    check_space(known, found, str(path))
    return build(state, config, known, tokenizer, str(path)).to(device=device, dtype=dtype)


def _looks_like(tensors: Mapping[str, Tensor]) -> str:
    keys = list(tensors)
    if not keys:
        return "no tensors"
    if any(key.startswith("visual.") for key in keys):
        return "a CLIP for pixels"
    return f"others ({', '.join(sorted(keys)[:3])})"
