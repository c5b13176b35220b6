"""`concept-steer show`, `list` and `import`: the vectors one has."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from .help import Commands, command, positive
from .models import load_vector

if TYPE_CHECKING:
    from ..vector import ConceptVector

SHORT = 10  # hex digits


def add_show(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands, common, "show", _show, help="tell all about one vector", description="All about a vector."
    )
    parser.add_argument("vector", metavar="FILE_OR_NAME", help="a .safetensors file, or a name or hash in the library")
    parser.add_argument("--json", action="store_true", help="for programs")


def add_list(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "list",
        _list,
        help="list the vectors in the library",
        description="The vectors in the library's folders: those of CONCEPT_STEER_VECTORS, ~/.concept-steer/vectors,\n"
        "and the shipped ones.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def add_import(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "import",
        _import,
        help="turn a published vector table into vector files",
        description="Turn a table of vectors (the weight of a Linear layer, C*H*W x n, as InterpretDiffusion\n"
        "publishes it) into one safetensors file per concept. Pickled files are read without running any code.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .pt, .pth or .safetensors file")
    parser.add_argument("--names", type=Path, required=True, metavar="JSON", help='{"woman": 0, "man": 1, ...}')
    parser.add_argument("--height", type=positive, required=True, help="of the map; 8 for 512 pixels")
    parser.add_argument("--width", type=positive, required=True)
    parser.add_argument("--family", required=True, help="sd1, sd2, sdxl ...: the model they were learned on")
    parser.add_argument("--prefix", default="", help="put before each name")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the library's first folder")


def _show(args: argparse.Namespace) -> int:
    vector, path = load_vector(args.vector)
    print(json.dumps(_about(vector, path), indent=1, ensure_ascii=False) if args.json else _in_words(vector, path))
    return 0


def _about(vector: ConceptVector, path: Path) -> dict[str, Any]:
    return {
        "file": str(path),
        "title": vector.title,
        "family": vector.family,
        "site": vector.site,
        "shape": list(vector.tensor.shape),
        "channels": vector.channels,
        "timesteps": list(vector.timesteps),
        "norm": vector.norm,
        "fingerprint": vector.fingerprint,
        "info": dict(sorted(vector.info.items())),
    }


def _in_words(vector: ConceptVector, path: Path) -> str:
    from ..describe import lines

    found = lines(vector, path)
    wide = max(len(label) for label, _ in found) + 2
    indent = "\n" + " " * wide
    return "\n".join(f"{label:<{wide}}{value.replace(chr(10), indent)}" for label, value in found)


def _list(args: argparse.Namespace) -> int:
    from ..library import Library, default_folders

    library = Library(default_folders())
    found = [_row(entry.name, entry.path) for entry in library.entries()]
    if args.json:
        print(
            json.dumps({"folders": [str(f) for f in library.folders], "vectors": found}, indent=1, ensure_ascii=False)
        )
        return 0
    columns = ("name", "title", "family", "method", "hash")
    table = [columns, *(tuple(row[c] or "-" for c in columns) for row in found if "error" not in row)]
    if len(table) > 1:
        wide = [max(len(line[i]) for line in table) for i in range(len(columns))]
        for line in table:
            print("  ".join(text.ljust(w) for text, w in zip(line, wide, strict=True)).rstrip())
    else:
        print("No concept vectors yet: `concept-steer learn` makes one.")
    for bad in (row for row in found if "error" in row):
        print(f"{bad['name']}: {bad['error']}")
    print("Folders searched:")
    for i, folder in enumerate(library.folders):
        marks = ["new ones are saved here"] * (i == 0) + ["not there yet"] * (not folder.is_dir())
        print(f"  {folder}" + (f" ({', '.join(marks)})" if marks else ""))
    return 0


def _row(name: str, path: Path) -> dict[str, str]:
    from ..vector import ConceptVector

    try:
        vector = ConceptVector.load(path)
    except ConceptSteerError as error:  # one bad file must not hide the others
        return {"name": name, "path": str(path), "error": str(error)}
    return {
        "name": name,
        "title": vector.title,
        "family": vector.family,
        "method": vector.info.get("method", ""),
        "hash": vector.fingerprint[:SHORT],
        "path": str(path),
    }


def _import(args: argparse.Namespace) -> int:
    from ..importer import import_table
    from ..library import Library, default_folders

    library = Library([args.out] if args.out else default_folders())
    made = import_table(
        args.file,
        args.names,
        height=args.height,
        width=args.width,
        family=args.family,
        out=library,
        prefix=args.prefix,
    )
    for vector in made:
        print(f"{vector.title}  {vector.fingerprint[:SHORT]}  norm {vector.norm:.4g}")
    print(f"{len(made)} vectors saved in {library.folders[0]}")
    return 0
