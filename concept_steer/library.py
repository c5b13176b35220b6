"""Where vectors live: folders, names, hashes. A name is looked up among the files found; it is never used as a path."""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConceptSteerError, LibraryError
from .vector import ConceptVector
from .vector_file import SUFFIX, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

_FORBIDDEN = '<>:"/\\|?*'
_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{10,64}")
_LONGEST = 120
ATTRIBUTE_SUFFIX = ".attribute.safetensors"
SAFETY_SUFFIX = ".safety.safetensors"


@dataclass(frozen=True)
class Entry:
    """One file of the library. name: relative to its folder, with "/" between folders and without suffix."""

    name: str
    path: Path

    @cached_property
    def hash(self) -> str:
        """The vector's fingerprint; "" for a file that cannot be read (loading it says why)."""
        try:
            return ConceptVector.load(self.path).fingerprint
        except ConceptSteerError:
            return ""


class Library:
    """The vectors in some folders, the first of which is where new ones are saved (made when missing)."""

    def __init__(self, folders: Sequence[Path | str]) -> None:
        if not folders:
            raise LibraryError("A library needs at least one folder to look for vectors in.")
        self.folders = tuple(Path(f).expanduser().absolute() for f in folders)

    @staticmethod
    def default_folders() -> tuple[Path, ...]:
        """See the function of the same name."""
        return default_folders()

    def entries(self) -> list[Entry]:
        """All *.safetensors in the folders and their sub folders, by name; of equal names the first folder's.

        Files that begin with a dot and links that leave their folder are left out. Errors: LibraryError.
        """
        found: dict[str, Entry] = {}
        for folder in self.folders:
            for entry in _scan(folder):
                found.setdefault(entry.name, entry)
        return [found[name] for name in sorted(found, key=lambda n: (n.casefold(), n))]

    def find(self, name_or_hash: str) -> Entry:
        """The entry of that name ("woman", "people/woman"), or else of that hash (at least 10 digits), renamed or not.

        Errors: LibraryError, with the closest names and the folders searched.
        """
        name = name_or_hash.removesuffix(SUFFIX)
        for part in [name] if name.startswith("/") else name.split("/"):
            safe_name(part)
        entries = self.entries()
        for entry in entries:
            if entry.name == name:
                return entry
        if _HASH.fullmatch(name.lower()):
            same = {e.hash: e for e in reversed(entries) if e.hash.startswith(name.lower())}
            if len(same) == 1:
                return next(iter(same.values()))
            if same:
                names = ", ".join(e.name for e in same.values())
                raise LibraryError(f"The hash {name!r} fits several vectors ({names}): give more of its digits.")
        raise LibraryError(self._unknown(name, [e.name for e in entries]))

    def load(self, name_or_hash: str) -> ConceptVector:
        """Errors: LibraryError when it is not found, VectorFileError when the file is not right."""
        return ConceptVector.load(self.find(name_or_hash).path)

    def save(self, vector: ConceptVector, name: str, overwrite: bool = False, preview: Image | None = None) -> Path:
        """Write <first folder>/<name>.safetensors, and the preview picture as <name>.png beside it. Both are atomic.

        Errors: LibraryError for a name that may not be one, VectorFileError when writing fails or the name is taken.
        """
        path = self.folders[0] / (safe_name(name.removesuffix(SUFFIX)) + SUFFIX)
        picture = path.with_name(path.name.removesuffix(SUFFIX) + ".png")
        data = b""
        if preview is not None:
            buffer = io.BytesIO()
            preview.save(buffer, "PNG")
            data = buffer.getvalue()
            if picture.exists() and not overwrite:
                raise LibraryError(f"{picture} exists already: choose another name, or allow overwriting.")
        vector.save(path, overwrite=overwrite)
        if preview is not None:
            write_atomic(picture, data, overwrite=overwrite)
        return path

    def _unknown(self, name: str, names: Sequence[str]) -> str:
        plain = {n.rsplit("/", 1)[-1].casefold(): n for n in reversed(names)} | {n.casefold(): n for n in names}
        close = dict.fromkeys(
            plain[k] for k in difflib.get_close_matches(name.casefold(), list(plain), n=4, cutoff=0.5)
        )
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        folders = ", ".join(str(f) for f in self.folders)
        return (
            f"There is no concept vector {name!r} among the {len(names)} found. {hint}Searched: {folders}. "
            f"Put the {SUFFIX} file into one of these folders."
        )


def default_folders() -> tuple[Path, ...]:
    """The folders of CONCEPT_STEER_VECTORS, ~/.concept-steer/vectors, and the vectors shipped beside the package."""
    named = [Path(f) for f in os.environ.get("CONCEPT_STEER_VECTORS", "").split(os.pathsep) if f.strip()]
    shipped = Path(__file__).resolve().parents[1] / "vectors"
    folders = [*named, Path("~/.concept-steer/vectors"), *([shipped] if shipped.is_dir() else [])]
    return tuple(dict.fromkeys(f.expanduser().absolute() for f in folders))


def safe_name(name: str) -> str:
    """`name` itself when it may name a file on any system. Errors: LibraryError, also for what looks like a path."""
    reason = _unsafe(name)
    if reason:
        raise LibraryError(
            f"{str(name)[: _LONGEST + 20]!r} cannot name a concept vector: {reason}. "
            "Use a plain name such as 'woman', or one from the library's list."
        )
    return name


def _unsafe(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        return "it is empty, or has an empty part"
    if name in (".", "..") or "/" in name or "\\" in name or re.match(r"[A-Za-z]:", name) or name.startswith("~"):
        return "it is a path"
    if name.startswith("."):
        return "it begins with a dot"
    if not name.isprintable():
        return "it has control characters"
    if bad := [c for c in _FORBIDDEN if c in name]:
        return f"it has the character {bad[0]!r}"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if _WINDOWS.fullmatch(name):
        return "Windows reserves it"
    if len(name) > _LONGEST or len(name.encode("utf-8", "replace")) > 240:
        return f"it is longer than {_LONGEST} characters"
    return ""


def _scan(folder: Path) -> list[Entry]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise LibraryError(
            f"{folder} is a file, but the library needs a folder there: move it away, or name another folder."
        )
    root = folder.resolve()
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not _unsafe(f))
        for file in sorted(files):
            path = Path(place) / file
            inside = path.resolve().is_relative_to(root)
            # sets of vectors, see fairness/attributes.py and safety/safety_set.py
            if path.name.endswith((ATTRIBUTE_SUFFIX, SAFETY_SUFFIX)):
                continue
            if path.suffix == SUFFIX and inside and path.is_file() and not _unsafe(path.stem):
                found.append(Entry(path.relative_to(folder).with_suffix("").as_posix(), path))
    return found
