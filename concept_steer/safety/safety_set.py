"""What the switch uses for a model family: a gated safe vector per category, one distilled from all, and their file.

One file a set, NAME.safety.safetensors: all tensors, and the rest as JSON in its metadata. It holds no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..bundle_file import Bundle
from ..errors import ConceptSteerError, SafetyError
from ..family import check
from ..library import SAFETY_SUFFIX, default_folders
from ..schedule import Schedule
from ..steering import Steer
from ..vector import ConceptVector
from ..vector_file import header_of, read_bytes
from .gate import Firings, Presence

SUFFIX = SAFETY_SUFFIX
FILE = Bundle(
    kind="safety",
    noun="a safety set",
    suffix=SUFFIX,
    architecture="safety-set",
    made_by="`concept-steer learn-safety` or by the node Learn Safety Vectors",
)
DISTILLED = "all"  # in the file, the one from all categories
STEERED = ("gentle", "standard", "strict")


@dataclass(frozen=True)
class Strength:
    """What a level means: how much of the vector is added where the gate is open, and the gate's threshold."""

    strength: float
    threshold: float


@dataclass(frozen=True, eq=False)
class SafeConcept:
    """One category: the words it was learned from, the vector that is added, and the gate that says when.

    levels: by name of a level, strength and threshold. Errors: SafetyError.
    """

    name: str
    text: str
    vector: ConceptVector
    presence: Presence
    levels: Mapping[str, Strength]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", MappingProxyType(dict(self.levels)))
        if tuple(sorted(self.levels)) != tuple(sorted(STEERED)):
            raise SafetyError(f"{self.name!r} has the levels {sorted(self.levels)}; expected {', '.join(STEERED)}.")
        if self.presence.channels != self.vector.channels:
            raise SafetyError(
                f"The gate of {self.name!r} reads {self.presence.channels} channels, its vector has "
                f"{self.vector.channels}: they were learned on different models."
            )

    def __deepcopy__(self, memo: Any) -> SafeConcept:
        return self  # immutable; ComfyUI deep-copies everything that hangs on a model

    def steer(self, level: str, firings: Firings | None = None, factor: float = 1.0) -> Steer:
        """At a level; `factor` times its strength."""
        wanted = self.levels[level]
        gate = replace(self.presence.with_threshold(wanted.threshold), firings=firings, label=self.name)
        return Steer(self.vector, wanted.strength * factor, Schedule(), gate=gate)

    def ungated(self, strength: float = 1.0) -> Steer:
        """The safe vector by itself, on every picture: the published use, for comparison."""
        return Steer(self.vector, strength)


@dataclass(frozen=True, eq=False)
class SafetySet:
    """Gated safe vectors of one model family. distilled: one for all categories together, the switch's default.

    info: texts such as what was measured (JSON under "measured"). Errors: SafetyError.
    """

    name: str
    concepts: Mapping[str, SafeConcept]
    distilled: SafeConcept | None = None
    checkpoint_hash: str = ""
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", MappingProxyType(dict(self.concepts)))
        object.__setattr__(self, "info", MappingProxyType({str(k): str(v) for k, v in self.info.items()}))
        if not self.concepts:
            raise SafetyError(f"The safety set {self.name!r} has no categories: learn it from at least one.")
        kinds = {(one.vector.family, one.vector.channels) for one in self._all()}
        if len(kinds) > 1:
            raise SafetyError(f"The safety set {self.name!r} mixes vectors of different models: {sorted(kinds)}.")
        if DISTILLED in self.concepts:
            raise SafetyError(f"A category may not be named {DISTILLED!r}: that is all of them together.")

    def __deepcopy__(self, memo: Any) -> SafetySet:
        return self  # immutable; ComfyUI deep-copies everything that hangs on a model

    def _all(self) -> Iterator[SafeConcept]:
        yield from self.concepts.values()
        if self.distilled is not None:
            yield self.distilled

    @property
    def family(self) -> str:
        return next(iter(self.concepts.values())).vector.family

    @property
    def channels(self) -> int:
        return next(iter(self.concepts.values())).vector.channels

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.concepts)

    @property
    def texts(self) -> dict[str, str]:
        return {name: one.text for name, one in self.concepts.items()}

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured when it was learned."""
        found = json.loads(self.info.get("measured", "{}"))
        return found if isinstance(found, dict) else {}

    def chosen(self, categories: Sequence[str]) -> list[SafeConcept]:
        """Those of the categories; for none named, or all, the distilled one where there is one.

        Errors: SafetyError for a category that the set does not have.
        """
        if unknown := [name for name in categories if name not in self.concepts]:
            raise SafetyError(
                f"The safety set {self.name!r} does not know {', '.join(map(repr, unknown))}; it knows "
                f"{', '.join(self.concepts)}. Leave the categories empty for all of them, or learn a set for yours."
            )
        names = list(categories) or list(self.concepts)
        if self.distilled is not None and set(names) == set(self.concepts):
            return [self.distilled]
        return [self.concepts[name] for name in names]

    def steers(
        self, level: str, categories: Sequence[str] = (), firings: Firings | None = None, factor: float = 1.0
    ) -> list[Steer]:
        return [one.steer(level, firings, factor) for one in self.chosen(categories)]

    def check(self, family: str, channels: int) -> None:
        """Errors: FamilyMismatch when it was learned on another kind of model."""
        check(self.family, self.channels, family, channels, source=f"The safety set {self.name!r}")

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write one file, atomically. Errors: VectorFileError."""
        tensors: dict[str, Tensor] = {}
        for i, one in enumerate(self._all()):
            tensors[f"{i}.vector"] = one.vector.tensor
            for name in ("directions", "limits", "scales"):
                tensors[f"{i}.{name}"] = getattr(one.presence, name)
        return FILE.write(path, tensors, self._about(), title=self.name, family=self.family, overwrite=overwrite)

    def _about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "checkpoint_hash": self.checkpoint_hash,
            "distilled": self.distilled is not None,
            "concepts": [_told(one) for one in self._all()],
            "info": dict(self.info),
        }

    @classmethod
    def load(cls, path: Path | str) -> SafetySet:
        """Read and check one file. Errors: VectorFileError, which names the file and says what is wrong with it."""
        return FILE.read(path, _parsed)


def _told(one: SafeConcept) -> dict[str, Any]:
    return {
        "name": one.name,
        "text": one.text,
        "title": one.vector.title,
        "site": one.vector.site,
        "timesteps": list(one.vector.timesteps),
        "info": dict(one.vector.info),
        "gate_timesteps": list(one.presence.timesteps),
        "levels": {name: [at.strength, at.threshold] for name, at in one.levels.items()},
    }


def _parsed(about: Any, tensors: dict[str, Tensor], family: str) -> SafetySet:
    told = about["concepts"]
    wanted = {f"{i}.{name}" for i in range(len(told)) for name in ("vector", "directions", "limits", "scales")}
    if set(tensors) != wanted:
        raise ConceptSteerError(f"it holds the tensors {sorted(tensors)}, expected {sorted(wanted)}.")
    found = [_concept(one, {n: tensors[f"{i}.{n}"] for n in _PARTS}, family) for i, one in enumerate(told)]
    distilled = found.pop() if about["distilled"] else None
    concepts = {one.name: one for one in found}
    if len(concepts) != len(found):
        raise ConceptSteerError("two of its categories have one name.")
    return SafetySet(str(about["name"]), concepts, distilled, str(about["checkpoint_hash"]), about["info"])


_PARTS = ("vector", "directions", "limits", "scales")


def _concept(told: Any, tensors: Mapping[str, Tensor], family: str) -> SafeConcept:
    vector = ConceptVector(
        tensors["vector"], family, told["title"], told["site"], tuple(told["timesteps"]), told["info"]
    )
    levels = {str(name): Strength(float(s), float(t)) for name, (s, t) in told["levels"].items()}
    for level in levels.values():
        if not torch.isfinite(torch.tensor([level.strength, level.threshold])).all():
            raise ConceptSteerError("a level's strength or threshold is not a finite number.")
    times = tuple(float(t) for t in told["gate_timesteps"])
    gate = Presence(tensors["directions"], tensors["limits"], tensors["scales"], times, levels["standard"].threshold)
    return SafeConcept(str(told["name"]), str(told["text"]), vector, gate, levels)


def find_safety_set(family: str, folders: Sequence[Path | str] | None = None) -> SafetySet | None:
    """The set for a model family in the folders (default: the library's, then what ships with the demo model).

    Of several the one in the first folder, by name. A set that cannot be read is an error: nobody should believe in a
    protection that is not there. Errors: VectorFileError, SafetyError.
    """
    for path in _files(folders):
        data = header_of(path, read_bytes(path)).get("__metadata__") or {}
        if data.get("hspace.family") == family or FILE.key not in data:  # the latter is an error that load explains
            found = SafetySet.load(path)
            if found.family == family:
                return found
    return None


def _files(folders: Sequence[Path | str] | None) -> list[Path]:
    places = [*(Path(f) for f in folders)] if folders is not None else [*default_folders(), SHIPPED]
    return [path for place in places if place.is_dir() for path in sorted(place.rglob(f"*{SUFFIX}"))]


SHIPPED = Path(__file__).resolve().parents[1] / "demo" / "weights"
