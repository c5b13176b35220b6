"""What was learned of a thing and its places, as a textual-inversion embedding: one word for a negative prompt.

The file is the standard one: a tensor (n, width) under the embedding's name, or `clip_l` and `clip_g` for SDXL. Its
rows are the thing's own words and then the location tokens, place by place, so that the one word stands for "the
thing, anywhere". ComfyUI and AUTOMATIC1111 read it from their folder of embeddings, diffusers by
load_textual_inversion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import LearnError
from ..vector_file import write_atomic
from .grid import check_bins, token

SDXL = ("clip_l", "clip_g")
FORMAT = "1"
ROOM = 75  # tokens of a prompt
MAX_BYTES = 16 * 2**20
MAX_HEADER = 2**16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(name: str) -> str:
    """`name` itself when a prompt can call an embedding by it. Errors: LearnError."""
    if not _NAME.fullmatch(name):
        raise LearnError(
            f"{name!r} cannot be the name of an embedding: take up to 64 letters, digits, '-', '_' or '.'."
        )
    return name


@dataclass(frozen=True)
class LocationTokens:
    """name: the embedding's word. concept: the thing's. words: its token vectors (m, width) by text encoder.

    places: the learned tokens, (bins * bins, width) by text encoder: "clip_l", and for SDXL "clip_g" too.
    """

    name: str
    concept: str
    bins: int
    words: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_bins(self.bins)
        if self.words.keys() != self.places.keys() or not self.words:
            raise LearnError(f"The embedding {self.name!r} must have words and places for the same text encoders.")
        for key, rows in self.places.items():
            width = self.words[key].shape[-1]
            if rows.shape != (self.bins**2, width) or self.words[key].ndim != 2:
                raise LearnError(
                    f"The embedding {self.name!r} needs {self.bins**2} places of {width} numbers, found "
                    f"{tuple(rows.shape)}."
                )
            if not bool(torch.isfinite(rows).all() and torch.isfinite(self.words[key]).all()):
                raise LearnError(f"The embedding {self.name!r} holds values that are not finite (NaN or infinity).")

    def __len__(self) -> int:
        """How many of a prompt's 75 tokens it takes."""
        return len(next(iter(self.words.values()))) + self.bins**2

    @property
    def rows(self) -> dict[str, Tensor]:
        """All its vectors, (n, width) by text encoder."""
        return {key: torch.cat([self.words[key], self.places[key]]) for key in self.words}

    def vocabulary(self) -> dict[str, dict[str, Tensor]]:
        """What a text reader needs: the word itself, and the token of each place."""
        own = {token(i, self.concept): {k: v[i : i + 1] for k, v in self.places.items()} for i in range(self.bins**2)}
        return {self.name: self.rows, **own}

    def save(self, path: Path, overwrite: bool = False) -> Path:
        """Write the embedding's file atomically. Errors: VectorFileError."""
        rows = {key: value.detach().cpu().float().contiguous() for key, value in self.rows.items()}
        named = rows if len(rows) > 1 else {self.name: next(iter(rows.values()))}
        about = {
            "geom_erasing.format": FORMAT,
            "geom_erasing.name": self.name,
            "geom_erasing.concept": self.concept,
            "geom_erasing.bins": str(self.bins),
            "geom_erasing.info": json.dumps(dict(self.info)),
        }
        return write_atomic(path, safetensors.torch.save(named, about), overwrite=overwrite)

    @staticmethod
    def load(path: Path) -> LocationTokens:
        """An embedding that `save` wrote. Errors: LearnError, which names the file and what is wrong with it."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MB")
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            about = json.loads(data[8 : 8 + length].decode("utf-8")).get("__metadata__", {})
            if about.get("geom_erasing.format") != FORMAT:
                raise ValueError("it does not say that it is one")
            stored = safetensors.torch.load(data)
            bins = check_bins(int(about["geom_erasing.bins"]))
            keys = SDXL if set(stored) == set(SDXL) else ("clip_l",)
            if len(stored) != len(keys):
                raise ValueError(f"it holds the tensors {', '.join(sorted(stored)[:5])}")
            rows = dict(zip(keys, (stored[k] for k in keys) if len(keys) > 1 else stored.values(), strict=True))
            if any(value.ndim != 2 or len(value) <= bins**2 for value in rows.values()):
                raise ValueError(f"it has too few rows for {bins} x {bins} places")
            info = {str(key): str(value) for key, value in json.loads(about["geom_erasing.info"]).items()}
            return LocationTokens(
                about["geom_erasing.name"],
                about["geom_erasing.concept"],
                bins,
                {key: value[: -(bins**2)].float() for key, value in rows.items()},
                {key: value[-(bins**2) :].float() for key, value in rows.items()},
                info,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise LearnError(
                f"{path} is not an embedding that Learn Erasing wrote ({error}): choose another file, or learn it anew."
            ) from error


def kept_in(folders: Sequence[Path]) -> dict[str, Path]:
    """The embeddings that `save` wrote into folders and their subfolders, by the name that a prompt calls them by.

    Only the files' headers are read, and only these tell: others' embeddings are left out.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")):
            if _is_ours(path):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                return False
            header = json.loads(file.read(length).decode("utf-8"))
        return header.get("__metadata__", {}).get("geom_erasing.format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
