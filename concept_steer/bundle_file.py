"""Files that hold several tensors which belong together (an attribute, a safety set): safetensors, checked, no code.

The tensors lie in the file as they are, the rest as JSON in its metadata. Single vectors have their own format, see
vector_file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import ConceptSteerError, VectorFileError
from .family import family as family_of
from .vector_file import MAX_BYTES, header_of, read_bytes, write_atomic

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """One kind of such file. kind: "attribute"; noun: with its article; made_by: how one gets such a file."""

    kind: str
    noun: str
    suffix: str
    architecture: str
    made_by: str
    version: int = 1

    @property
    def key(self) -> str:
        return f"hspace.{self.kind}"

    def write(
        self, path: Path | str, tensors: Mapping[str, Tensor], about: Any, *, title: str, family: str, overwrite: bool
    ) -> Path:
        """Atomically. Errors: VectorFileError for another suffix, too much, or a place that cannot be written."""
        path = Path(path)
        if not path.name.endswith(self.suffix):
            raise VectorFileError(f"{path} must end in {self.suffix}: {self.noun} is saved in no other format.")
        known = family_of(family)
        data = safetensors.torch.save(
            dict(tensors),
            {
                "modelspec.sai_model_spec": "1.0.0",
                "modelspec.architecture": f"{known.architecture.partition('/')[0]}/{self.architecture}",
                "modelspec.title": title,
                "ss_base_model_version": known.ss_base,
                f"{self.key}_version": str(self.version),
                "hspace.family": family,
                self.key: json.dumps(about),
            },
        )
        if len(data) > MAX_BYTES:
            raise VectorFileError(
                f"{path} would have {len(data) / 2**20:.0f} MiB, more than {MAX_BYTES // 2**20} MiB: "
                "use vectors of the form (C,)."
            )
        return write_atomic(path, data, overwrite=overwrite)

    def read(self, path: Path | str, parse: Callable[[Any, dict[str, Tensor], str], T]) -> T:
        """parse(about, tensors, family) of a file whose frame has been checked.

        Errors: VectorFileError, which names the file and says what is wrong with it; also for what `parse` finds.
        """
        path = Path(path)
        data = read_bytes(path)
        meta = header_of(path, data).get("__metadata__") or {}
        if self.key not in meta or "hspace.family" not in meta:
            raise VectorFileError(
                f"{path} is not {self.noun}: it lacks the metadata {self.key}. Such a file is named "
                f"NAME{self.suffix} and made by {self.made_by}."
            )
        version = meta.get(f"{self.key}_version", "")
        if not (version.isascii() and version.isdigit() and int(version[:9]) <= self.version):
            raise VectorFileError(
                f"{path} is {self.noun} of format version {version or 'unknown'}; this version of Concept Steer reads "
                f"up to {self.version}. Update Concept Steer to use it."
            )
        try:
            return parse(json.loads(meta[self.key]), safetensors.torch.load(data), meta["hspace.family"])
        except ConceptSteerError as error:
            raise VectorFileError(f"{path}: {error}") from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VectorFileError(f"{path} is damaged ({error!r}): copy it again, or learn it again.") from error
