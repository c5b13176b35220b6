"""What several commands need: the model to work on, the vectors named on the command line, progress bars."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..denoiser import Denoiser
    from ..steering import Steer
    from ..vector import ConceptVector

DTYPES = ("float32", "float16", "bfloat16")
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # pickles too: reading says why they are refused
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SPEC = re.compile(rf"(?P<name>.+?)(?::(?P<strength>{_NUMBER})?)?(?::(?P<start>{_NUMBER})?)?(?::(?P<end>{_NUMBER})?)?")


@dataclass(frozen=True)
class VectorSpec:
    """One --vector: a library name, a hash or a file, with strength and window."""

    name: str
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


def vector_spec(text: str) -> VectorSpec:
    """NAME_OR_FILE[:STRENGTH[:START[:END]]] as an argparse type; a part left empty keeps its default."""
    found = _SPEC.fullmatch(text)
    name = found["name"] if found else ""
    if found is None or ":" in re.sub(r"^[A-Za-z]:(?=[\\/])", "", name):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME_OR_FILE[:STRENGTH[:START[:END]]] with numbers, for example woman:0.8:0:0.6"
        )
    given = {key: float(found[key]) for key in ("strength", "start", "end") if found[key]}
    return VectorSpec(name, **given)


def add_model_options(parser: argparse.ArgumentParser, checkpoint: str = "demo") -> None:
    parser.add_argument(
        "--checkpoint",
        default=checkpoint,
        metavar="PATH",
        help="a diffusers folder or a single .safetensors checkpoint; 'demo' is the embedded model, 'demo-student' its "
        f"one-step student (default: {checkpoint})",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")


def load_checkpoint(name: str, device: str, dtype: str) -> Denoiser:
    """'demo', 'demo-student', a diffusers folder or a .safetensors file as a Denoiser. Errors: ConceptSteerError."""
    import torch

    from ..hosts.diffusers import DiffusersDenoiser, load_denoiser

    number_type: torch.dtype = getattr(torch, dtype)
    place = usable_device(device)
    if name == "demo":
        from ..demo import model

        return DiffusersDenoiser(model.pipeline(device=place, dtype=number_type))
    if name == "demo-student":
        from ..demo import student

        return student.denoiser(device=place, dtype=number_type)
    return load_denoiser(Path(name), device=place, dtype=number_type)


def usable_device(name: str) -> str:
    import torch

    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConceptSteerError(f"The device {name!r} cannot be used ({reason}): try --device cpu.") from error
    return name


def picture_size(denoiser: Denoiser) -> tuple[int, int]:
    """(H, W) in pixels of the pictures that the model draws."""
    import torch

    channels, height, width = denoiser.latent_shape
    with torch.inference_mode():
        pixels = denoiser.decode(torch.zeros(1, channels, 8, 8, device=denoiser.device, dtype=denoiser.dtype))
    return height * pixels.shape[-2] // 8, width * pixels.shape[-1] // 8


def load_vector(name: str) -> tuple[ConceptVector, Path]:
    """A vector and its file: an existing file, or a name or hash in the library. Errors: ConceptSteerError."""
    from ..library import Library, default_folders
    from ..vector import ConceptVector

    path = Path(name).expanduser()
    is_path = any(sep in name for sep in ("/", os.sep))
    if path.suffix.lower() in FILE_SUFFIXES and (is_path or path.exists()):
        return ConceptVector.load(path), path
    entry = Library(default_folders()).find(name)
    return ConceptVector.load(entry.path), entry.path


def draw(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steers: Sequence[Steer] = (),
    *,
    label: str,
    batch: int = 4,
    **settings: Any,
) -> list[Image]:
    """One picture per prompt and seed, with a progress bar. settings: of sampling.sample."""
    import torch

    from ..pictures import to_images
    from ..sampling import sample

    with bar(label) as progress, torch.inference_mode():
        latents = sample(denoiser, prompts, seeds=seeds, steers=steers, batch=batch, progress=progress.at, **settings)
        return [image for part in latents.split(batch) for image in to_images(denoiser.decode(part))]


class bar:
    """A progress bar on stderr, only where that is a terminal. `at(done, total)` moves it; `total` may come late."""

    def __init__(self, label: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=label, total=total, disable=None, leave=False)

    def __enter__(self) -> bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def at(self, done: int, total: int, note: str = "") -> None:
        self._bar.total = total
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
