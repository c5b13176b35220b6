"""Vectors published by others: one table with a column per concept, and a JSON file with the columns' names.

The authors of self-discovered concept vectors (Li et al. 2311.17216, the repository InterpretDiffusion) publish such a
table: the weight of a Linear layer, (1280*8*8, n), with {"female": 0, "male": 1, ...}.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import ConceptSteerError, VectorFileError
from .family import family as family_of
from .library import Library, safe_name
from .vector import ConceptVector
from .vector_file import SUFFIX

MAX_TABLE_BYTES = 4 * 2**30


def import_table(
    path: Path | str,
    names: Path | str | Mapping[str, int],
    *,
    height: int,
    width: int,
    family: str,
    out: Library | Path | str,
    prefix: str = "",
) -> list[ConceptVector]:
    """Save one vector (C, height, width) per named column of a table, and return them in the order of the names.

    path: .pt/.pth (read with weights_only, so no code runs) or .safetensors, holding a state dict with one matrix
    (C*height*width, n) or (n, C*height*width), or such a tensor itself. names: name -> column, or its JSON file.
    height, width: of the map, 8 x 8 for 512 pixels. out: a library or a folder; files are named prefix + name.
    Everything is checked before the first file is written. Errors: ConceptSteerError, which names the file.
    """
    path, columns = Path(path), _columns(names)
    if height < 1 or width < 1:
        raise ConceptSteerError(f"The map of {path} cannot be {height} x {width}: for 512 pixels it is 8 x 8.")
    channels = family_of(family).channels
    table = _table(path, _read(path), channels * height * width, f"{channels} x {height} x {width}")
    outside = {name: c for name, c in columns.items() if not 0 <= c < table.shape[1]}
    if outside:
        raise ConceptSteerError(
            f"{path} has {table.shape[1]} columns, numbered from 0, but the names ask for {outside}: "
            "these names belong to another table."
        )
    library = out if isinstance(out, Library) else Library([Path(out)])
    vectors = {}
    for name, column in columns.items():
        info = {"method": "imported", "source": f"{path.name}, column {column}"}
        try:
            file_name = safe_name(prefix + name)
            tensor = table[:, column].reshape(channels, height, width)
            vectors[file_name] = ConceptVector(tensor, family, title=prefix + name, info=info)
        except ConceptSteerError as error:
            raise VectorFileError(f"{path}, column {column} ({name}): {error}") from error
        if (library.folders[0] / (file_name + SUFFIX)).exists():
            raise ConceptSteerError(
                f"{path}: the library has a vector {file_name!r} already; give a prefix, or move the old one away."
            )
    for file_name, vector in vectors.items():
        library.save(vector, file_name)
    return list(vectors.values())


def _columns(names: Path | str | Mapping[str, int]) -> dict[str, int]:
    source = "The names" if isinstance(names, Mapping) else str(names)
    if isinstance(names, Mapping):
        found: Any = dict(names)
    else:
        try:
            found = json.loads(Path(names).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConceptSteerError(
                f"{source} cannot be read as JSON ({error}); expected something like {{'woman': 0}}."
            ) from error
    good = isinstance(found, dict) and all(isinstance(c, int) and not isinstance(c, bool) for c in found.values())
    if not good or not found or not all(isinstance(n, str) for n in found):
        raise ConceptSteerError(f"{source} must give a column number for each name, such as {{'woman': 0, 'man': 1}}.")
    return found


def _read(path: Path) -> Any:
    try:
        if not path.is_file():
            raise VectorFileError(f"{path} is not a file: name the .pt, .pth or {SUFFIX} file that holds the table.")
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise VectorFileError(
                f"{path} is larger than {MAX_TABLE_BYTES // 2**30} GiB, too large for a vector table."
            )
        if path.suffix == SUFFIX:
            return safetensors.torch.load_file(path)
        if path.suffix in (".pt", ".pth"):
            # torch.load itself may be replaced: AUTOMATIC1111's refuses what newer versions of torch saved
            return torch.serialization.load(path, map_location="cpu", weights_only=True)
    except VectorFileError:
        raise
    except pickle.UnpicklingError as error:
        raise VectorFileError(
            f"{path} holds more than plain tensors, or is damaged. It may contain code, so it was not loaded: "
            "ask its author for a state dict or a safetensors file."
        ) from error
    except Exception as error:  # on damaged files torch's unpickler raises whatever its parser stumbles over
        raise VectorFileError(f"{path} is damaged or not a table ({error}): copy or download it again.") from error
    raise VectorFileError(f"{path} has the suffix {path.suffix!r}; a vector table is a .pt, .pth or {SUFFIX} file.")


def _table(path: Path, found: Any, size: int, words: str) -> Tensor:
    """The table as (size, n)."""
    for key in ("state_dict", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    items = {"the tensor": found} if isinstance(found, Tensor) else found if isinstance(found, Mapping) else {}
    tensors = {str(k): v for k, v in items.items() if isinstance(v, Tensor)}
    fitting = {
        k: v
        for k, v in tensors.items()
        if v.ndim == 2 and size in v.shape and v.is_floating_point() and v.numel() > 0 and v.layout == torch.strided
    }
    if len(fitting) != 1:
        shapes = ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in list(tensors.items())[:8]) or "no tensors"
        raise VectorFileError(
            f"{path} must hold exactly one table of floats with {size} ({words}) numbers per concept, but "
            f"{len(fitting)} of its tensors fit: {shapes}. Check the family and the height and width of the map."
        )
    key, table = next(iter(fitting.items()))
    bias = tensors.get(key.removesuffix("weight") + "bias") if key.endswith("weight") else None
    if bias is not None and bool((bias != 0).any()):
        raise VectorFileError(f"{path} has a bias beside its table, so its columns alone are not the vectors.")
    return table if table.shape[0] == size else table.T
