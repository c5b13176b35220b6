"""The file of one concept vector: safetensors with one tensor named "vector", everything else in string metadata.

Reading checks everything before use and never opens a pickle; writing is atomic. Keys: modelspec.* (Stability's
ModelSpec), ss_base_model_version and sshs_model_hash (A1111 / kohya), and our own under "hspace.".
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import VectorFileError
from .family import family as family_of

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20
SUFFIX = ".safetensors"
DTYPES = ("F32", "F16", "BF16")
NDIMS = {1: "(C,)", 2: "(T, C)", 3: "(C, H, W)", 4: "(T, C, H, W)"}
MODELSPEC_INFO = ("description", "author", "date", "license", "usage_hint", "tags")
RESERVED_INFO = ("format_version", "site", "family", "channels", "timesteps", "title")


def to_bytes(
    tensor: Tensor,
    *,
    family: str,
    title: str,
    site: str,
    channels: int,
    timesteps: tuple[float, ...],
    info: Mapping[str, str],
) -> bytes:
    """The whole file as bytes. `tensor`: fp32, contiguous, on the CPU."""
    kind = family_of(family)
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": kind.architecture,
        "modelspec.title": title,
        "ss_base_model_version": kind.ss_base,
        "sshs_model_hash": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        "hspace.format_version": str(FORMAT_VERSION),
        "hspace.site": site,
        "hspace.family": family,
        "hspace.channels": str(channels),
        "hspace.timesteps": json.dumps(list(timesteps)),
    }
    for key, value in info.items():
        metadata[f"modelspec.{key}" if key in MODELSPEC_INFO else f"hspace.{key}"] = value
    return safetensors.torch.save({"vector": tensor}, metadata)


def read(path: Path) -> dict[str, Any]:
    """The checked fields of a file: tensor (fp32), family, title, site, timesteps, info. Errors: VectorFileError."""
    data = read_bytes(path)
    header = header_of(path, data)
    meta = header.pop("__metadata__", None)
    meta = meta if isinstance(meta, dict) else {}
    version = _check_kind(path, header, meta)
    if version > FORMAT_VERSION:
        raise VectorFileError(
            f"{path} is a concept vector of format version {version}; this version of Concept Steer reads up to "
            f"{FORMAT_VERSION}. Update Concept Steer to use it."
        )
    _check_tensor_entry(path, header["vector"])
    try:
        tensor = safetensors.torch.load(data)["vector"]
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    return {"tensor": tensor.to(torch.float32), **_fields(path, meta, tuple(tensor.shape))}


def write_atomic(path: Path, data: bytes, *, overwrite: bool) -> Path:
    """Write `data` beside `path`, then rename, so that nobody ever meets half a file. Errors: VectorFileError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not overwrite and path.exists():
            raise VectorFileError(f"{path} exists already: choose another name, or allow overwriting.")
        # not tempfile: its files are readable by their owner only, which a shared library folder does not want
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VectorFileError(
            f"{path} cannot be written ({reason}): make sure that {path.parent} is a folder you may write to, "
            "or save elsewhere."
        ) from error
    return path


def read_bytes(path: Path) -> bytes:
    """The whole file. Errors: VectorFileError for a folder, too large a file, or one that cannot be read."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise VectorFileError(
                f"{path} is a folder; a concept vector is one {SUFFIX} file: name the file inside it."
            )
        if not stat.S_ISREG(found.st_mode):
            raise VectorFileError(f"{path} is not an ordinary file; a concept vector is one {SUFFIX} file.")
        if found.st_size > MAX_BYTES:
            raise VectorFileError(
                f"{path} has {found.st_size / 2**20:.0f} MiB, more than the {MAX_BYTES // 2**20} MiB a concept vector "
                "may have; it is probably a checkpoint or a LoRA. Choose a concept vector."
            )
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise VectorFileError(f"{path} does not exist: check the name, or list the library's vectors.") from error
    except (OSError, ValueError) as error:
        raise VectorFileError(f"{path} cannot be read ({error}): check its rights, or copy it again.") from error
    return data


def header_of(path: Path, data: bytes) -> dict[str, Any]:
    """The safetensors header as JSON. Errors: VectorFileError for a pickle or a damaged file."""
    length = int.from_bytes(data[:8], "little")
    plausible = len(data) > 8 and data[8:9] == b"{"
    # a safetensors header of the right length may also begin with these bytes: its "{" tells them apart
    if not plausible and (data[:1] == b"\x80" or data[:2] == b"PK"):
        raise VectorFileError(
            f"{path} is a pickle (.pt, .pth, .ckpt, .bin), which can run code when loaded, so it was never opened. "
            "Turn a published vector table into safe files with `concept-steer import`."
        )
    if not plausible:
        raise _damaged(path, "no safetensors header at its start")
    if length > len(data) - 8:
        raise _damaged(path, f"its header claims {length} bytes, but the whole file has {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not readable JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _check_kind(path: Path, header: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    missing = [k for k in ("hspace.format_version", "hspace.family", "hspace.channels") if k not in meta]
    if len(missing) == 3 or "vector" not in header:
        raise VectorFileError(
            f"{path} is not a concept vector: it looks like {_looks_like(header, meta)}. A concept vector has one "
            "tensor named 'vector' and metadata such as hspace.format_version and hspace.family."
        )
    if missing:
        raise VectorFileError(
            f"{path} lacks the metadata {', '.join(missing)}, without which it cannot be told which model it fits. "
            "Save it again with Concept Steer, or ask its author for a complete file."
        )
    if len(header) > 1:
        extra = ", ".join(sorted(k for k in header if k != "vector")[:5])
        raise VectorFileError(
            f"{path} holds more tensors than the one named 'vector' ({extra}): save one concept a file."
        )
    version = str(meta["hspace.format_version"])
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise VectorFileError(
            f"{path} has the format version {version!r}; expected a whole number such as {FORMAT_VERSION}."
        )
    return int(version)


def _check_tensor_entry(path: Path, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        raise _damaged(path, "its header does not describe the tensor")
    if entry.get("dtype") not in DTYPES:
        raise VectorFileError(
            f"{path} holds numbers of type {entry.get('dtype')}; expected one of {', '.join(DTYPES)}. "
            "Convert it to float32 and save it again."
        )
    if len(entry["shape"]) not in NDIMS:
        raise VectorFileError(
            f"{path} holds a tensor of {len(entry['shape'])} dimensions {tuple(entry['shape'])}; expected one of "
            f"{', '.join(NDIMS.values())}."
        )


def _fields(path: Path, meta: Mapping[str, str], shape: tuple[int, ...]) -> dict[str, Any]:
    found = shape[0] if len(shape) in (1, 3) else shape[1]
    if meta["hspace.channels"] != str(found):
        raise VectorFileError(
            f"{path} says it has {meta['hspace.channels']} channels, but its tensor {shape} has {found}: the file was "
            "changed after it was saved. Get it again from its source."
        )
    try:
        timesteps = json.loads(meta.get("hspace.timesteps", "[]"))
        if not isinstance(timesteps, list):
            raise ValueError("not a list")
        steps = tuple(float(t) for t in timesteps)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise VectorFileError(
            f"{path} has the timesteps {str(meta['hspace.timesteps'])[:80]!r}; expected a JSON list such as [999, 500]."
        ) from error
    info = {k[7:]: v for k, v in meta.items() if k.startswith("hspace.") and k[7:] not in RESERVED_INFO and k[7:]}
    info |= {k: meta[f"modelspec.{k}"] for k in MODELSPEC_INFO if f"modelspec.{k}" in meta}
    return {
        "family": meta["hspace.family"],
        "title": meta.get("modelspec.title", ""),
        "site": meta.get("hspace.site", "mid"),
        "timesteps": steps,
        "info": info,
    }


def _looks_like(header: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    keys = list(header)
    signs = (
        ("a LoRA", any("lora_" in k or ".lora" in k or ".hada_" in k or ".lokr_" in k for k in keys)),
        (
            "a checkpoint",
            any(k.startswith(("model.diffusion_model.", "conditioner.", "cond_stage_model.")) for k in keys),
        ),
        ("a UNet", any(k.startswith(("down_blocks.", "input_blocks.", "mid_block.")) for k in keys)),
        ("a VAE", any(k.startswith(("decoder.", "encoder.")) for k in keys)),
        ("a textual inversion", any(k in ("emb_params", "clip_l", "clip_g") for k in keys)),
        ("a LoRA", "ss_network_module" in meta),
        ("an empty file", not keys),
        ("a bare tensor without metadata", keys == ["vector"]),
    )
    return next((name for name, sign in signs if sign), f"something else (tensors {', '.join(sorted(keys)[:3])})")


def _damaged(path: Path, reason: str) -> VectorFileError:
    return VectorFileError(f"{path} is damaged or not a {SUFFIX} file ({reason}): copy or download it again.")
