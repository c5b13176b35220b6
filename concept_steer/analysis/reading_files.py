"""Readings on disk: a small file for each prompt, which several processes may write at once."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConceptSteerError


def ready(folder: Path, about: Mapping[str, Any]) -> Path:
    """The folder of one kind of reading, with a note for people of what is in it. Errors: ConceptSteerError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "about.json").exists():
            (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConceptSteerError(f"{folder} cannot be written ({reason}): choose another cache.") from None
    return folder


def file_of(folder: Path | None, prompt: str) -> Path | None:
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return None if folder is None else folder / digest[:2] / f"{digest[2:]}.npy"


def load(path: Path | None, seeds: int) -> Tensor | None:
    """A stored reading; None where there is none, or a damaged one, which is then read anew."""
    if path is None or not path.exists():
        return None
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = array.dtype == np.float32 and array.ndim == 2 and len(array) == seeds and bool(np.isfinite(array).all())
    return torch.from_numpy(array) if sound else None


def store(path: Path | None, h: Tensor) -> None:
    """Atomic, but not forced to the disk: what a power cut takes is read again."""
    if path is None:
        return
    part = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "xb") as file:
            np.save(file, h.contiguous().numpy(), allow_pickle=False)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise ConceptSteerError(f"{path} cannot be written ({reason}): make room, or choose another cache.") from None
