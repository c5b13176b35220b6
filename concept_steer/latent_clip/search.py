"""A folder of latents or pictures, searched by text. Latents are read as they are, pictures through the VAE.

Latent files: .safetensors and ComfyUI's .latent with one tensor (C, H, W) or (B, C, H, W), and .npy arrays of that
shape; never a pickle. Our own say in their metadata which latent space they are of and whether they are scaled;
ComfyUI's are unscaled and do not say of which model; for the others the caller says both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConceptSteerError
from ..pictures import READ, read_pictures
from ..vector_file import write_atomic
from .model import LatentClip
from .ranking import worth
from .scoring import Scores, encode_batches
from .spaces import LatentSpace, check_space, space

LATENTS = (".safetensors", ".latent", ".npy")
NAMES = ("latents", "latent_tensor", "samples")  # ours, ComfyUI's, others'
COMFY_MARK = "latent_format_version_0"
MAX_BYTES = 2**30
Encode = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [-1, 1] -> scaled latents
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Stated:
    """What the caller says of files that do not say it themselves."""

    space: str | None = None
    scaled: bool | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """A folder's contents as unit vectors (N, D): of each its file, and its number in that file."""

    files: tuple[Path, ...]
    places: tuple[int, ...]
    vectors: Tensor


@dataclass(frozen=True)
class Hit:
    """One result: the file, the number of the latent in it (from 0), and its value as in `Ranking`."""

    file: Path
    place: int
    value: float


def save_latents(latents: Tensor, path: Path, of: LatentSpace, *, overwrite: bool = False, **about: str) -> Path:
    """Scaled latents (C, H, W) or (B, C, H, W) as a .safetensors file that says of which space they are. Atomic."""
    of.check(latents if latents.ndim == 4 else latents[None], str(path))
    metadata = {"latent.space": of.name, "latent.scaled": "true", **about}
    data = safetensors.torch.save({"latents": latents.detach().cpu().contiguous()}, metadata)
    return write_atomic(path, data, overwrite=overwrite)


def read_latents(path: Path, wanted: LatentSpace, stated: Stated = Stated()) -> Tensor:
    """The scaled latents of a file, (B, C, H, W) fp32.

    Errors: ConceptSteerError when the file is damaged, no latent, or does not say enough and `stated` neither;
    FamilyMismatch, naming both, when it is of another latent space.
    """
    tensor, name, is_scaled = _read(path)
    if tensor.ndim == 3:
        tensor = tensor[None]
    name = name or stated.space
    is_scaled = stated.scaled if is_scaled is None else is_scaled
    if name is None:
        raise ConceptSteerError(
            f"{path} does not say of which model its latents are, and another model's would give wrong scores without "
            f"a sign of it. Say it with --space (this latent CLIP reads {wanted.name})."
        )
    if is_scaled is None:
        raise ConceptSteerError(
            f"{path} does not say whether its latents are scaled: say --scaled (as the UNet sees them) or --unscaled "
            "(as the VAE gives them)."
        )
    check_space(wanted, wanted if name == wanted.name else space(name), str(path))
    return wanted.scaled(tensor, is_scaled, str(path))


def _read(path: Path) -> tuple[Tensor, str | None, bool | None]:
    """The tensor, its space's name and whether it is scaled, as far as the file says."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConceptSteerError(f"{path} is larger than {MAX_BYTES // 2**30} GiB, too large for latents.")
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.dtype not in (np.float16, np.float32, np.float64):
                raise ConceptSteerError(f"{path} holds {array.dtype} numbers; expected float16, float32 or float64.")
            return torch.from_numpy(array), None, None
        with safe_open(str(path), framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            keys = set(file.keys())
            name = next((name for name in NAMES if name in keys), None)
            if name is None:
                raise ConceptSteerError(
                    f"{path} holds no latents: expected a tensor named {', '.join(NAMES)}, found "
                    f"{', '.join(sorted(keys)[:3]) or 'none'}."
                )
            tensor = file.get_tensor(name)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ConceptSteerError(f"{path} cannot be read as latents ({error}): make it anew, or take it away.") from None
    if name == "latent_tensor" and COMFY_MARK not in keys:
        raise ConceptSteerError(f"{path} is a latent of an old ComfyUI at a scale of its own: save it there anew.")
    said = {"true": True, "false": False}.get(about.get("latent.scaled", ""))
    return tensor, about.get("latent.space"), False if name == "latent_tensor" else said


def files_of(folder: Path) -> list[Path]:
    """The latents and pictures of a folder, by name. Errors: ConceptSteerError, which names the folder."""
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in LATENTS + READ and not p.name.startswith("."))
    except OSError as error:
        raise ConceptSteerError(f"{folder} is not a folder that can be read ({error.strerror}).") from None
    if not files:
        raise ConceptSteerError(
            f"{folder} holds neither latents nor pictures: put some there that end in {', '.join(LATENTS + READ)}."
        )
    return files


def index(
    clip: LatentClip,
    files: Sequence[Path],
    *,
    encode: Encode | None = None,
    size: tuple[int, int] = (512, 512),
    stated: Stated = Stated(),
    batch: int = 16,
    progress: Told | None = None,
) -> Index:
    """Every latent of the files as a unit vector. encode, size: a VAE and its pictures' (H, W), where pictures are.

    Errors: ConceptSteerError, which names the file; also for pictures without `encode`.
    """
    names: list[Path] = []
    places: list[int] = []
    parts: list[Tensor] = []
    for done, file in enumerate(files):
        latents = _latents_of(file, clip.space, encode, size, stated)
        parts.append(encode_batches(clip, latents, batch))
        names += [file] * len(latents)
        places += range(len(latents))
        if progress is not None:
            progress(done + 1, len(files))
    return Index(tuple(names), tuple(places), torch.cat(parts))


def _latents_of(
    file: Path, wanted: LatentSpace, encode: Encode | None, size: tuple[int, int], stated: Stated
) -> Tensor:
    if file.suffix.lower() in LATENTS:
        return read_latents(file, wanted, stated)
    if file.suffix.lower() not in READ:
        raise ConceptSteerError(
            f"{file} is neither a latent nor a picture: expected a file that ends in {', '.join(LATENTS + READ)}."
        )
    if encode is None:
        raise ConceptSteerError(f"{file} is a picture: to read it, name the model whose VAE is {wanted.title}.")
    with torch.no_grad():
        return encode(read_pictures([file], size)).float()


def search(clip: LatentClip, found: Index, text: str, *, against: Sequence[str] = (), count: int = 10) -> list[Hit]:
    """The `count` best for a text, best first. against: texts that a good one should fit less."""
    texts = [text, *against]
    values = worth(Scores(tuple(texts), found.vectors @ clip.encode_text(texts).cpu().T, clip.scale))
    order = values.sort(descending=True, stable=True).indices.tolist()[:count]
    return [Hit(found.files[i], found.places[i], float(values[i])) for i in order]
