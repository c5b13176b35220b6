"""What a scan found, as a file: one line of JSON for the scan, then one for each picture. Read strictly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from ..errors import LearnError
from ..vector_file import write_atomic

Fractions = tuple[float, float, float, float]  # left, top, right, bottom, as shares of width and height
FORMAT = 1
MAX_BYTES, MAX_LINE, MAX_PICTURES = 2**28, 2**20, 2_000_000
MAX_CAPTION, MAX_CONCEPTS, MAX_BOXES, MAX_SIDE = 2**16, 32, 1000, 2**17
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Found:
    """One picture: its file, its caption, and the boxes of each concept that a detector found in it.

    boxes: left, top, right, bottom in 0..1, by concept; a clean picture has none. sha256: of the file. size: width and
    height in pixels. scores: of every concept looked for, 0..1. located: the caption with location tokens, or None.
    """

    file: Path
    caption: str
    boxes: Mapping[str, Sequence[Fractions]]
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    scores: Mapping[str, float] = field(default_factory=dict)
    located: str | None = None


@dataclass(frozen=True)
class Header:
    """folder: the pictures'. detectors: each with name and threshold, and the fingerprint of a model file.

    complete: False when the scan was stopped before its last picture.
    """

    folder: Path
    detectors: Sequence[Mapping[str, Any]]
    bins: int | None = None
    complete: bool = True


def write_found(path: Path, header: Header, found: Sequence[Found]) -> Path:
    """Atomically, over an older one; files are named relative to the header's folder. Errors: VectorFileError."""
    first = {
        "concept_steer_found": FORMAT,
        "folder": str(header.folder),
        "detectors": [dict(one) for one in header.detectors],
        "bins": header.bins,
        "complete": header.complete,
    }
    lines = [json.dumps(first, ensure_ascii=False), *(_line(header.folder, one) for one in found)]
    return write_atomic(path, ("\n".join(lines) + "\n").encode("utf-8"), overwrite=True)


def _line(folder: Path, found: Found) -> str:
    told = {
        "file": found.file.relative_to(folder).as_posix(),
        "sha256": found.sha256,
        "caption": found.caption,
        "size": list(found.size),
        "boxes": {name: [list(box) for box in boxes] for name, boxes in found.boxes.items()},
        "scores": dict(found.scores),
    }
    return json.dumps(told if found.located is None else {**told, "located": found.located}, ensure_ascii=False)


def read_found(path: Path, folder: Path | None = None) -> list[Found]:
    """The pictures of a scan's found.jsonl. folder: where they are now; None takes the folder that was scanned.

    Errors: LearnError, which names the line. Names that lead out of the folder are refused.
    """
    return read_scan(path, folder)[1]


def read_scan(path: Path, folder: Path | None = None) -> tuple[Header, list[Found]]:
    """As `read_found`, with the scan's own line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LearnError(f"{path} is larger than {MAX_BYTES // 2**20} MB: no scan writes that.")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LearnError(f"{path} cannot be read ({reason}): expected the found.jsonl of a scan.") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(rows) > MAX_PICTURES:
        raise LearnError(f"{path} has {len(rows)} lines; at most {MAX_PICTURES} are read.")
    parsed = [(number, _parsed(path, number, line)) for number, line in rows]
    if not parsed or parsed[0][1].get("concept_steer_found") != FORMAT:
        raise LearnError(
            f"{path} is not the found.jsonl of a scan: its first line must say 'concept_steer_found': {FORMAT}. Make "
            "it with concept-steer erase scan."
        )
    header = _header(path, parsed[0][1], folder)
    found = [_found(f"{path}, line {number}", one, header.folder) for number, one in parsed[1:]]
    names = {one.file for one in found}
    if len(names) < len(found):
        raise LearnError(f"{path} names a picture twice: scan the folder anew.")
    return header, found


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise LearnError(f"{path}, line {number} is longer than {MAX_LINE} characters.")
    try:
        one = json.loads(line, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise LearnError(f"{path}, line {number} is not JSON ({error}).") from error
    if not isinstance(one, dict):
        raise LearnError(f"{path}, line {number} is not a JSON object.")
    return one


def _refused(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _header(path: Path, one: dict[str, Any], folder: Path | None) -> Header:
    named, detectors, bins = one.get("folder"), one.get("detectors"), one.get("bins")
    right = (
        (isinstance(named, str) and bool(named) and "\0" not in named)
        and (isinstance(detectors, list) and len(detectors) <= MAX_CONCEPTS)
        and all(isinstance(each, dict) for each in detectors)
        and (bins is None or type(bins) is int)
        and isinstance(one.get("complete"), bool)
    )
    if not right:
        raise LearnError(f"{path}, line 1 does not say which folder was scanned with which detectors: scan it anew.")
    return Header(folder or Path(str(named)), detectors or [], bins, bool(one["complete"]))


def _found(where: str, one: dict[str, Any], folder: Path) -> Found:
    caption, hash_, located = one.get("caption"), one.get("sha256"), one.get("located")
    if not isinstance(caption, str) or len(caption) > MAX_CAPTION:
        raise LearnError(f"{where}: 'caption' must be a text of at most {MAX_CAPTION} characters.")
    if located is not None and (not isinstance(located, str) or len(located) > MAX_CAPTION):
        raise LearnError(f"{where}: 'located' must be a text of at most {MAX_CAPTION} characters.")
    if not isinstance(hash_, str) or not _HASH.fullmatch(hash_):
        raise LearnError(f"{where}: 'sha256' must be 64 hexadecimal digits.")
    size = one.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= MAX_SIDE for n in size):
        raise LearnError(f"{where}: 'size' must be width and height in pixels.")
    boxes = _table(where, "boxes", one.get("boxes"))
    scores = _table(where, "scores", one.get("scores"))
    return Found(
        folder / _name(where, one.get("file")),
        caption,
        {name: _boxes(where, name, each) for name, each in boxes.items()},
        hash_,
        (size[0], size[1]),
        {name: _share(f"{where}: the score of {name!r}", value) for name, value in scores.items()},
        located,
    )


def _name(where: str, name: Any) -> str:
    """A relative name in either system's sense, without a way up."""
    right = isinstance(name, str) and 0 < len(name) <= 1024 and name.isprintable() and "\\" not in name
    if not right or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or PureWindowsPath(name).drive:
        raise LearnError(f"{where}: 'file' must be the name of a picture in the folder, not {str(name)[:80]!r}.")
    if ".." in PurePosixPath(name).parts:
        raise LearnError(f"{where}: the file {name[:80]!r} leads out of the folder, so nothing is read.")
    return str(name)


def _table(where: str, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_CONCEPTS:
        raise LearnError(f"{where}: {what!r} must be a mapping of at most {MAX_CONCEPTS} concepts.")
    if not all(0 < len(name) <= 64 and name.isprintable() for name in value):
        raise LearnError(f"{where}: the names of concepts in {what!r} must have 1 to 64 printable characters.")
    return value


def _boxes(where: str, name: str, value: Any) -> list[Fractions]:
    if not isinstance(value, list) or len(value) > MAX_BOXES:
        raise LearnError(f"{where}: the boxes of {name!r} must be a list of at most {MAX_BOXES}.")
    found = []
    for box in value:
        if not isinstance(box, list) or len(box) != 4:
            raise LearnError(f"{where}: a box of {name!r} is not left, top, right, bottom.")
        left, top, right, bottom = (_share(f"{where}: a side of a box of {name!r}", side) for side in box)
        if not (left < right and top < bottom):
            raise LearnError(f"{where}: a box of {name!r} has no area ({left:g}, {top:g}, {right:g}, {bottom:g}).")
        found.append((left, top, right, bottom))
    return found


def _share(what: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not 0 <= value <= 1
    ):
        raise LearnError(f"{what} must be a number from 0 to 1, not {str(value)[:40]}.")
    return float(value)
