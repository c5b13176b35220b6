"""What may be balanced: an attribute (gender) with its values (woman, man), a vector for each, a gate, and their file.

One file an attribute, NAME.attribute.safetensors: the tensors of all values and of the gate, the rest in its metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..bundle_file import Bundle
from ..errors import ConceptSteerError
from ..library import ATTRIBUTE_SUFFIX
from ..vector import ConceptVector
from .gate import Gate, GateDecision
from .templates import checked_template

SUFFIX = ATTRIBUTE_SUFFIX
FILE = Bundle(
    kind="attribute",
    noun="an attribute",
    suffix=SUFFIX,
    architecture="concept-attribute",
    made_by="`concept-steer fair --learn` or by the node Learn Attribute",
)


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
        return FILE.write(
            path, self._tensors(), self._about(), title=self.name, family=self.family, overwrite=overwrite
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"value.{i}": value.vector.tensor for i, value in enumerate(self.values.values())}
        return tensors if self.gate is None else {**tensors, "gate": self.gate.directions}

    def _about(self) -> dict[str, Any]:
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
        return about if self.gate is None else {**about, "gate": self.gate.told()}

    @classmethod
    def load(cls, path: Path | str) -> Attribute:
        """Read and check one file. Errors: VectorFileError, which names the file and says what is wrong with it."""
        return FILE.read(path, _parsed)


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
