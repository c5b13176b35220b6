"""Measured figures and their files: NAME.json for machines, NAME.md with readable tables, NAME-*.png plots."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from ..vector_file import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

KEYS = ("method", "metric", "value", "low", "high", "n", "command")
Section = tuple[str, str]  # heading, Markdown


@dataclass(frozen=True)
class Figure:
    """One measured number with its 95 % interval.

    value None: not reached, or not defined; `low` is then what is known to be exceeded, if anything is. low, high None:
    no interval (or none on that side). n: observations behind it. command: what measures it again. extra: further keys,
    such as the concept. Numbers that are not finite become None, since JSON has no word for them.
    """

    method: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    command: str
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("value", "low", "high"):
            number = getattr(self, key)
            if number is not None:
                object.__setattr__(self, key, float(number) if math.isfinite(number) else None)
        clash = [key for key in self.extra if key in KEYS]
        if clash:
            raise ConceptSteerError(f"A figure's further keys cannot be named {', '.join(clash)}.")

    def row(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in KEYS}, **self.extra}

    def text(self) -> str:
        """For a cell of a table: "0.97 (0.91 to 1)", "not reached in 1200", or a dash."""
        if self.value is None:
            return "-" if self.low is None else f"not reached in {_short(self.low)}"
        if self.low is None and self.high is None:
            return _short(self.value)
        ends = ["?" if end is None else _short(end) for end in (self.low, self.high)]
        return f"{_short(self.value)} ({ends[0]} to {ends[1]})"


def _short(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def write(
    folder: Path,
    name: str,
    figures: Sequence[Figure],
    *,
    title: str,
    sections: Iterable[Section],
    plots: Mapping[str, Image] | None = None,
) -> list[Path]:
    """NAME.json, NAME.md (title, sections, the plots) and NAME-PLOT.png, each written atomically; the paths.

    Errors: ConceptSteerError when the folder cannot be written.
    """
    images = dict(plots or {})
    lines = [f"# {title}", ""]
    for heading, text in sections:
        lines += [f"## {heading}", "", text.strip(), ""]
    for plot in images:
        lines += [f"![{plot}]({name}-{plot}.png)", ""]
    rows = ",\n".join(" " + json.dumps(figure.row(), ensure_ascii=False, allow_nan=False) for figure in figures)
    files = {f"{name}.json": f"[\n{rows}\n]\n".encode(), f"{name}.md": "\n".join(lines).encode()}
    for plot, image in images.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[f"{name}-{plot}.png"] = buffer.getvalue()
    return [write_atomic(folder / file, data, overwrite=True) for file, data in files.items()]


def read(path: Path) -> list[Figure]:
    """The figures of a NAME.json. Errors: ConceptSteerError, which names the file and what is wrong with it."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConceptSteerError(f"{path} cannot be read as a list of figures: {error}") from error
    if not isinstance(rows, list):
        raise ConceptSteerError(f"{path} holds {type(rows).__name__}, expected a list of figures.")
    found = []
    for number, row in enumerate(rows):
        missing = [key for key in KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise ConceptSteerError(f"{path}: figure {number + 1} lacks {', '.join(missing)}.")
        extra = {key: value for key, value in row.items() if key not in KEYS}
        found.append(Figure(**{key: row[key] for key in KEYS}, extra=extra))
    return found


def read_sections(path: Path) -> list[Section]:
    """The sections of a NAME.md without plots. Errors: ConceptSteerError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConceptSteerError(f"{path} cannot be read: {error}") from error
    parts = [part.partition("\n") for part in ("\n" + text).split("\n## ")[1:]]
    return [(heading, body.strip()) for heading, _, body in parts]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def pivot(
    figures: Iterable[Figure],
    columns: Mapping[str, str],
    *,
    label: str = "method",
    of: Callable[[Figure], str] = lambda figure: figure.method,
) -> str:
    """A table with one row per `of(figure)` in order of appearance; columns: metric -> heading, absent ones dashed."""
    table: dict[str, dict[str, str]] = {}
    for figure in figures:
        if figure.metric in columns:
            table.setdefault(of(figure), {})[figure.metric] = figure.text()
    body = [[name, *(cells.get(metric, "-") for metric in columns)] for name, cells in table.items()]
    return markdown([label, *columns.values()], body)
