"""What may be balanced: an attribute (gender) with its values (woman, man), a vector for each, a gate, and their file.

One file an attribute, NAME.attribute.safetensors: the tensors of all values and of the gate, the rest in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ConceptSteerError, VectorFileError
from ..family import family as family_of
from ..library import ATTRIBUTE_SUFFIX
from ..vector import ConceptVector
from ..vector_file import MAX_BYTES, _header, _read_bytes, write_atomic
from .gate import Gate, GateDecision
from .templates import checked_template

SUFFIX = ATTRIBUTE_SUFFIX
FORMAT_VERSION = 1
KEY = "hspace.attribute"


@dataclass(frozen=True)
class Value:
    """One value of an attribute: its vector, how prompts name it ("a woman {}"), and the strength it is used at."""

    vector: ConceptVector
    phrases: tuple[str, ...] = ()
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute by name, its values by label (at least two, all of one model family), and its gate if it has one.

    info: further texts, such as how the gate did on roles it never saw. Errors: ConceptSteerError.
    """

    name: str
    values: Mapping[str, Value]
    gate: Gate | None = None
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        object.__setattr__(self, "info", MappingProxyType(dict(self.info)))
        for text in (self.name, *self.values):
            if not text.strip() or set(text) & set(":=,\n"):
                raise ConceptSteerError(f"{text!r} cannot name an attribute or a value: use words without : = and ,")
        if len(self.values) < 2:
            raise ConceptSteerError(f"The attribute {self.name!r} has {len(self.values)} values: it needs two or more.")
        if len({value.vector.family for value in self.values.values()}) > 1:
            found = ", ".join(f"{label}: {value.vector.family}" for label, value in self.values.items())
            raise ConceptSteerError(f"The vectors of {self.name!r} are of different model families ({found}).")
        for value in self.values.values():
            for phrase in value.phrases:
                checked_template(phrase)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def family(self) -> str:
        return next(iter(self.values.values())).vector.family

    @property
    def fingerprint(self) -> str:
        """Of all that changes pictures: vectors, strengths, gate."""
        parts = [(label, value.vector.fingerprint, value.strength) for label, value in self.values.items()]
        return f"{self.name}:{parts}:{self.gate.fingerprint if self.gate else ''}"

    def decides(self, denoiser: Any, prompt: str) -> GateDecision:
        """Whether the prompt names a value already; without a gate it never does, and the decision says so."""
        return GateDecision.without_gate() if self.gate is None else self.gate.decides(denoiser, prompt)

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write one file, atomically. Errors: VectorFileError."""
        path = Path(path)
        if not path.name.endswith(SUFFIX):
            raise VectorFileError(f"{path} must end in {SUFFIX}: attributes are saved in no other format.")
        data = safetensors.torch.save(self._tensors(), self._metadata())
        if len(data) > MAX_BYTES:
            raise VectorFileError(
                f"{path} would have {len(data) / 2**20:.0f} MiB, more than {MAX_BYTES // 2**20} MiB: use (C,) vectors."
            )
        return write_atomic(path, data, overwrite=overwrite)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"value.{i}": value.vector.tensor for i, value in enumerate(self.values.values())}
        return tensors if self.gate is None else {**tensors, "gate": self.gate.directions}

    def _metadata(self) -> dict[str, str]:
        kind = family_of(self.family)
        values = [
            {
                "label": label,
                "title": value.vector.title,
                "phrases": list(value.phrases),
                "strength": value.strength,
                "site": value.vector.site,
                "timesteps": list(value.vector.timesteps),
                "info": dict(value.vector.info),
            }
            for label, value in self.values.items()
        ]
        about = {"name": self.name, "values": values, "info": dict(self.info)}
        if self.gate is not None:
            about["gate"] = self.gate.told()
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": kind.architecture.partition("/")[0] + "/concept-attribute",
            "modelspec.title": self.name,
            "ss_base_model_version": kind.ss_base,
            "hspace.attribute_version": str(FORMAT_VERSION),
            "hspace.family": self.family,
            KEY: json.dumps(about),
        }

    @classmethod
    def load(cls, path: Path | str) -> Attribute:
        """Read and check one file. Errors: VectorFileError, which names the file and says what is wrong with it."""
        path = Path(path)
        data = _read_bytes(path)
        meta = _header(path, data).get("__metadata__") or {}
        if KEY not in meta or "hspace.family" not in meta:
            raise VectorFileError(
                f"{path} is not an attribute: it lacks the metadata {KEY}. An attribute is a file NAME{SUFFIX}, made "
                "by `concept-steer fair --learn` or by the node Learn Attribute."
            )
        version = meta.get("hspace.attribute_version", "")
        if not (version.isascii() and version.isdigit() and int(version[:9]) <= FORMAT_VERSION):
            raise VectorFileError(
                f"{path} is an attribute of format version {version or 'unknown'}; this version of Concept Steer reads "
                f"up to {FORMAT_VERSION}. Update Concept Steer to use it."
            )
        try:
            return _parsed(json.loads(meta[KEY]), safetensors.torch.load(data), meta["hspace.family"])
        except ConceptSteerError as error:
            raise VectorFileError(f"{path}: {error}") from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VectorFileError(f"{path} is damaged ({error!r}): copy it again, or learn it again.") from error


def _parsed(about: Any, tensors: dict[str, Tensor], family: str) -> Attribute:
    wanted = {f"value.{i}" for i in range(len(about["values"]))} | ({"gate"} if "gate" in about else set())
    if set(tensors) != wanted:
        raise ConceptSteerError(f"it holds the tensors {sorted(tensors)}, expected {sorted(wanted)}.")
    values = {}
    for i, told in enumerate(about["values"]):
        timesteps = tuple(told["timesteps"])
        vector = ConceptVector(tensors[f"value.{i}"], family, told["title"], told["site"], timesteps, told["info"])
        values[str(told["label"])] = Value(vector, tuple(map(str, told["phrases"])), float(told["strength"]))
    if len(values) != len(about["values"]):
        raise ConceptSteerError("two of its values have one label.")
    gate = None
    if "gate" in about:
        directions = tensors["gate"].to(torch.float32)
        channels = next(iter(values.values())).vector.channels
        if tuple(directions.shape) != (len(values), channels):
            raise ConceptSteerError(f"its gate is {tuple(directions.shape)}, expected {(len(values), channels)}.")
        gate = Gate.parsed(about["gate"], directions, family)
    return Attribute(str(about["name"]), values, gate, {str(k): str(v) for k, v in about["info"].items()})
