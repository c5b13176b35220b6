"""The web UI's API: learn a vector, learn to erase. Pictures come in and go out as base64; names are never paths."""

from __future__ import annotations

import base64
import binascii
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConceptSteerError, SettingError
from ..geom_erasing.request import ErasingRequest
from ..learn.request import LearnRequest
from .webui_erasing import erase_queued
from .webui_learning import Learned, learn_queued

MOST_PICTURES = 100
MOST_TO_ERASE = 1000
MOST_BYTES = 64 * 2**20  # of one picture file


def learn(body: dict[str, Any]) -> dict[str, Any]:
    """POST: the fields of LearnRequest, and name, overwrite, pictures, without. Answers when it is learned.

    /sdapi/v1/progress tells how far it is and /sdapi/v1/interrupt ends it with the best so far, as for pictures.
    """
    from fastapi import HTTPException

    from . import webui

    with tempfile.TemporaryDirectory() as folder:
        try:
            request, options = asked(body, Path(folder))
            done = learn_queued(request, into=webui.library(), **options)
        except ConceptSteerError as error:
            raise HTTPException(422, str(error).replace(folder + os.sep, "")) from error
    return answer(done)


def erase(body: dict[str, Any]) -> dict[str, Any]:
    """POST: the fields of ErasingRequest, and overwrite and pictures. Answers when it is learned, as `learn`."""
    from fastapi import HTTPException

    with tempfile.TemporaryDirectory() as folder:
        try:
            fields = dict(body)
            overwrite = fields.pop("overwrite", False)
            if not isinstance(overwrite, bool):
                raise SettingError(f"overwrite is true or false, not {overwrite!r}.")
            pictures = _files(fields.pop("pictures", []), "pictures", Path(folder), MOST_TO_ERASE)
            done = erase_queued(ErasingRequest.of(fields), pictures, overwrite=overwrite)
        except ConceptSteerError as error:
            raise HTTPException(422, str(error).replace(folder + os.sep, "")) from error
    return {
        "name": done.name,
        "interrupted": done.interrupted,
        "summary": done.words(),
        "images": [_png(picture) for picture in done.pictures],
    }


def asked(body: Mapping[str, Any], folder: Path) -> tuple[LearnRequest, dict[str, Any]]:
    """The request and the options of `learn_queued`; pictures are written into `folder`. Errors: SettingError."""
    fields = dict(body)
    name, overwrite = fields.pop("name", ""), fields.pop("overwrite", False)
    if not isinstance(name, str) or not isinstance(overwrite, bool):
        raise SettingError(f"name is a text and overwrite true or false, not {name!r} and {overwrite!r}.")
    sets = {key: _files(fields.pop(key, []), key, folder) for key in ("pictures", "without")}
    return LearnRequest.of(fields), {"name": name, "overwrite": overwrite, **sets}


def answer(done: Learned) -> dict[str, Any]:
    """Ready for JSON. images: before and after, and the curve, as PNG in base64."""
    return {
        "name": done.name,
        "interrupted": done.interrupted,
        "summary": done.words(),
        "report": done.result.report(),
        "images": [_png(picture) for picture in done.pictures],
    }


def _files(given: Any, what: str, folder: Path, most: int = MOST_PICTURES) -> list[Path]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given) or len(given) > most:
        raise SettingError(f"{what} is a list of up to {most} pictures in base64.")
    files = []
    for number, text in enumerate(given, 1):
        try:
            data = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
        except (binascii.Error, ValueError):
            raise SettingError(f"{what}, number {number}: this is not a picture in base64.") from None
        if len(data) > MOST_BYTES:
            raise SettingError(f"{what}, number {number}: the file has more than {MOST_BYTES // 2**20} MB.")
        files.append(folder / f"{what}, number {number}")
        files[-1].write_bytes(data)
    return files


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
