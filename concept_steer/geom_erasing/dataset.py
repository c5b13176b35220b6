"""Look through a folder of pictures for what nobody asked for: what was found where, with captions, for learning.

Nothing of the user's files is changed: all that a scan writes goes into a folder of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import LearnError
from ..pictures import READ, UNREADABLE, as_seen, save
from ..safety.detectors import Box, Detector, verdicts_of
from ..vector_file import write_atomic
from .found_file import MAX_CAPTION, MAX_PICTURES, Found, Fractions, Header, read_found, read_scan, write_found

__all__ = ["Found", "Scan", "detect", "read_found", "scan"]

FORMATS = (*READ, ".bmp", ".tif", ".tiff")
TABLE = "metadata.jsonl"  # captions of a whole folder: {"file_name": ..., "text": ...} a line
FOUND, REPORT, SHEET, CAPTIONS = "found.jsonl", "report.txt", "sheet.jpg", "captions"
AT_ONCE = 8
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Scan:
    """skipped: files that could not be read, each with the reason. uncaptioned: pictures without any caption.

    concepts: what was looked for. complete: False when it was stopped early. out: where found.jsonl, report.txt and
    sheet.jpg are, and with bins captions/NAME.txt.
    """

    found: Sequence[Found]
    skipped: Sequence[tuple[str, str]]
    uncaptioned: int
    concepts: Sequence[str]
    complete: bool
    out: Path


def detect(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    detectors: Sequence[Detector],
    files: Sequence[Path] | None = None,
) -> list[Found]:
    """What the detectors find in pictures, each with its caption: for pictures that are in memory.

    files: their names; by default numbers. Errors: LearnError when captions do not fit; SafetyError for what a detector
    raises, which is never taken for a clean picture.
    """
    if len(captions) != len(images):
        raise LearnError(
            f"{len(images)} pictures came with {len(captions)} captions: each needs one, which may be empty."
        )
    if not detectors:
        raise LearnError("No detector was named: name at least one, for example qr.")
    names = files if files is not None else [Path(f"{number:06d}") for number in range(len(images))]
    boxes: list[dict[str, list[Fractions]]] = [{} for _ in images]
    scores: list[dict[str, float]] = [{} for _ in images]
    for detector in detectors:
        for i, verdict in enumerate(verdicts_of(detector, images, None, so="the scan stops")):
            own = getattr(detector, "concept", None)
            told = {own: verdict.score} if own else verdict.categories
            for name, score in told.items():
                scores[i][name] = max(scores[i].get(name, 0.0), min(1.0, max(0.0, float(score))))
            for label, box in verdict.boxes:
                boxes[i].setdefault(own or label, []).append(_fractions(box, images[i].size))
    return [
        Found(name, caption, mine, "", image.size, told)
        for name, caption, mine, image, told in zip(names, captions, boxes, images, scores, strict=True)
    ]


def _fractions(box: Box, size: tuple[int, int]) -> Fractions:
    """Pixels to shares, clipped to the picture; a detector that points outside of it gets its edge."""
    width, height = size
    left, top = (min(max(0, low), side - 1) for low, side in zip(box[:2], size, strict=True))
    right = min(width, max(left + 1, box[0] + box[2]))
    bottom = min(height, max(top + 1, box[1] + box[3]))
    return left / width, top / height, right / width, bottom / height


def scan(
    folder: Path,
    detectors: Sequence[Detector],
    out: Path,
    *,
    caption: str | None = None,
    bins: int | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Scan:
    """Look at every picture in `folder` and its subfolders; write what was found into `out`.

    Captions: NAME.txt beside the picture, else its line in the folder's metadata.jsonl, else `caption`, else none.
    bins: also write captions with location tokens of a grid of bins x bins. stop: asked before each picture; what was
    looked at until then is kept, and the same scan goes on from there. Errors: LearnError when the folder holds no
    picture that can be read, or nothing was found in any (the report is written all the same); SafetyError.
    """
    folder, out = folder.expanduser().absolute(), out.expanduser()
    files = _pictures_of(folder, out)
    table = _table(folder)
    about = [_about(detector) for detector in detectors]
    known = _known(out / FOUND, folder, about)
    found: list[Found] = []
    skipped: list[tuple[str, str]] = []
    complete, uncaptioned = True, 0
    for first in range(0, len(files), AT_ONCE):
        if stop is not None and stop():
            complete = False
            break
        part = files[first : first + AT_ONCE]
        seen = _looked(folder, part, detectors, table, caption, known, skipped)
        uncaptioned += sum(not one.caption for one in seen)
        found += [one if bins is None else replace(one, located=_located(one, bins)) for one in seen]
        if progress is not None:
            progress(first + len(part), len(files), f"{sum(bool(one.boxes) for one in found)} found")
    if not found:
        if not complete:
            raise KeyboardInterrupt
        name, reason = skipped[0]
        raise LearnError(f"None of the {len(files)} pictures in {folder} can be read; the first, {name}: {reason}.")
    concepts = sorted({name for one in found for name in (*one.scores, *one.boxes)})
    result = Scan(found, skipped, uncaptioned, concepts, complete, out)
    _write(result, Header(folder, about, bins, complete))
    if complete and not any(one.boxes for one in found):
        raise LearnError(
            f"Nothing was found in {len(found)} pictures of {folder} (looked for: {', '.join(concepts)}). If something "
            f"is there, lower the detector's threshold or name another detector; the report is {out / REPORT}."
        )
    return result


def _pictures_of(folder: Path, out: Path) -> list[Path]:
    if not folder.is_dir():
        raise LearnError(f"{folder} is not a folder: name the one that holds the pictures.")
    if out.resolve() == folder.resolve():
        raise LearnError(f"{out} holds the pictures: what the scan writes must go into another folder.")
    try:
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in FORMATS
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        )
    except OSError as error:
        raise LearnError(f"{folder} cannot be read ({error.strerror}).") from error
    inside = out.resolve()
    files = [path for path in files if inside not in path.resolve().parents]
    if not files:
        raise LearnError(f"{folder} holds no pictures: put some there that end in {', '.join(FORMATS)}.")
    if len(files) > MAX_PICTURES:
        raise LearnError(f"{folder} holds {len(files)} pictures; scan at most {MAX_PICTURES} at once.")
    return files


def _about(detector: Detector) -> dict[str, Any]:
    """What decides whether an earlier scan's findings still hold."""
    told = {"name": detector.name, "threshold": getattr(detector, "threshold", None)}
    mark = getattr(detector, "fingerprint", None)
    return told if mark is None else {**told, "fingerprint": mark}


def _known(path: Path, folder: Path, about: Sequence[dict[str, Any]]) -> dict[tuple[Path, str], Found]:
    """The findings of an earlier scan of the same folder with the same detectors, by file and hash."""
    if not path.is_file():
        return {}
    try:
        header, found = read_scan(path)
    except LearnError:
        return {}  # another version's, or damaged: looked at anew and replaced
    if list(header.detectors) != list(about) or header.folder != folder:
        return {}
    return {(one.file, one.sha256): one for one in found}


def _looked(
    folder: Path,
    files: Sequence[Path],
    detectors: Sequence[Detector],
    table: dict[str, str],
    default: str | None,
    known: dict[tuple[Path, str], Found],
    skipped: list[tuple[str, str]],
) -> list[Found]:
    """The findings of some files in their order; those that cannot be read are named in `skipped`."""
    ready: dict[Path, Found] = {}
    fresh: list[tuple[Path, str, str, Image.Image]] = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            text = _caption(file, name, table, default)
            data = file.read_bytes()
            mark = hashlib.sha256(data).hexdigest()
            if (file, mark) in known:
                ready[file] = replace(known[file, mark], caption=text, located=None)
            else:
                fresh.append((file, mark, text, as_seen(io.BytesIO(data))))
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            skipped.append((name, " ".join(reason.split())[:200]))
    if fresh:
        seen = detect([one[3] for one in fresh], [one[2] for one in fresh], detectors, [one[0] for one in fresh])
        ready |= {one.file: replace(one, sha256=new[1]) for one, new in zip(seen, fresh, strict=True)}
    return [ready[file] for file in files if file in ready]


def _caption(file: Path, name: str, table: dict[str, str], default: str | None) -> str:
    """Errors: ValueError, OSError."""
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return table.get(name, default or "")
    text = " ".join(beside.read_text(encoding="utf-8-sig").split())
    if len(text) > MAX_CAPTION:
        raise ValueError(f"its caption, {beside.name}, is longer than {MAX_CAPTION} characters")
    return text


def _table(folder: Path) -> dict[str, str]:
    """The captions in metadata.jsonl, by name. Errors: LearnError, which names the line."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    found = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LearnError(f"{path} cannot be read ({error}): it must be text (UTF-8).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            name, text = one["file_name"], one["text"] if "text" in one else one["caption"]
            if not isinstance(name, str) or not isinstance(text, str) or len(text) > MAX_CAPTION:
                raise TypeError("both must be texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LearnError(
                f'{path}, line {number} is not {{"file_name": ..., "text": ...}} ({error}): mend or remove it.'
            ) from error
        found[name] = " ".join(text.split())
    return found


def _located(found: Found, bins: int) -> str:
    """The caption with each found concept's name and the location tokens of the places it covers."""
    from .grid import located_caption

    text = found.caption
    for concept, boxes in found.boxes.items():
        text = located_caption(text, concept, boxes, bins)
    return text


def _write(result: Scan, header: Header) -> None:
    from .dataset_report import sheet, text

    write_found(result.out / FOUND, header, result.found)
    write_atomic(result.out / REPORT, text(result, header).encode("utf-8"), overwrite=True)
    for one in result.found:
        if one.located is not None:
            target = result.out / CAPTIONS / one.file.relative_to(header.folder).with_suffix(".txt")
            write_atomic(target, (one.located + "\n").encode("utf-8"), overwrite=True)
    save(sheet(result, header.folder), result.out / SHEET)
