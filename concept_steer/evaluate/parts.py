"""Results of a long measurement, one small JSON file each: what is there already is not done again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConceptSteerError
from ..vector_file import write_atomic


class Parts:
    """A folder of results that were all made with the same settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # tuples become lists, as in the files
        self.made = 0

    def get(self, name: str, make: Callable[[], dict[str, Any]], **own: Any) -> dict[str, Any]:
        """The result of that name: read, or else made and written. own: further settings, of this result alone.

        Errors: ConceptSteerError for a result of other settings.
        """
        settings = {**self.settings, **json.loads(json.dumps(own))}
        path = self.folder / f"{_file_name(name)}.json"
        if path.is_file():
            return self._read(path, settings)
        result = make()
        text = json.dumps({"settings": settings, "result": result})
        write_atomic(path, text.encode(), overwrite=True)
        self.made += 1
        return json.loads(text)["result"]

    def _read(self, path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            settings, result = stored["settings"], stored["result"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConceptSteerError(f"{path} is not a result of this measurement ({error}): delete it.") from error
        keys = sorted({*settings, *wanted})
        other = [key for key in keys if settings.get(key) != wanted.get(key)]
        if other:
            key = other[0]
            raise ConceptSteerError(
                f"{path} was measured with {key} = {settings.get(key)!r}, now it is {wanted.get(key)!r}: "
                f"name another folder with --out, or delete {self.folder}."
            )
        return result


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
