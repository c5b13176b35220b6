"""Where results go: folders and files checked before the work begins, pictures that carry their settings."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS_KEY = "concept_steer"


def ready_folder(folder: Path) -> Path:
    """Make the folder and try to write there, so that nobody waits for a result that cannot be kept."""
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConceptSteerError(
            f"{folder} is not a folder that can be written to ({reason}): choose another with --out."
        ) from error
    return folder


def ready_files(files: Sequence[Path], overwrite: bool) -> None:
    """Errors: ConceptSteerError when one of the files (of one folder) exists already or cannot be written."""
    taken = [file for file in files if file.exists()]
    if taken and not overwrite:
        raise ConceptSteerError(
            f"{taken[0]} exists already: choose another name with --out, or replace it with --overwrite."
        )
    ready_folder(files[0].parent)


def write_picture(image: Image, path: Path, settings: Mapping[str, Any]) -> Path:
    """A PNG with its settings as JSON in the text chunk "concept_steer", written atomically."""
    from PIL.PngImagePlugin import PngInfo

    from ..vector_file import write_atomic

    texts = PngInfo()
    texts.add_text(SETTINGS_KEY, json.dumps(settings))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    return write_atomic(path, buffer.getvalue(), overwrite=True)
