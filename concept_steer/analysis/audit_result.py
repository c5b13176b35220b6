"""What an audit is asked with and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from ..fairness import Attribute
from .associations import Associations
from .defaults import Change, Default, Estimate
from .maps import Cluster
from .reading import ReadSettings
from .word_list import WordList


class Judge(Protocol):
    """Looks at pictures (N, 3, H, W) in [-1, 1]: the value of an attribute for each, None for one it cannot judge."""

    @property
    def name(self) -> str: ...
    def values(self, attribute: str, values: Sequence[str], pixels: Tensor) -> Sequence[str] | None: ...


@dataclass(frozen=True)
class AuditSettings:
    """defaults: how shares are read; space: how associations, map and clusters are. Both as measured best.

    samples: pictures for each of the `strongest` findings; 0 draws none. map_method: "pca" or "umap".
    """

    defaults: ReadSettings = field(default_factory=lambda: ReadSettings(seeds=8, moments=(0.1,), space="prediction"))
    space: ReadSettings = field(default_factory=lambda: ReadSettings(seeds=8))
    strongest: int = 4
    samples: int = 16
    steps: int = 20
    guidance: float = 5.0
    map_method: str = "pca"


@dataclass(frozen=True, eq=False)
class Finding:
    """A clear default with pictures of its prompt. observed: the lean of `judged` pictures with its 95 % interval, to
    hold against the predicted one; None where nothing judged them."""

    default: Default
    prompt: str
    images: tuple[Image.Image, ...] = ()
    observed: Estimate | None = None
    judged: int = 0

    def as_dict(self) -> dict[str, Any]:
        told = {"prompt": self.prompt, "pictures": len(self.images), "observed": self.observed, "judged": self.judged}
        return {**self.default.as_dict(), **told}


@dataclass(frozen=True, eq=False)
class Fix:
    """Vectors that counter one attribute's leans, and the defaults without and with them."""

    attribute: Attribute
    changes: tuple[Change, ...]

    def covered(self) -> tuple[int, int]:
        """For how many roles the interval covers an even share: before, after."""
        return sum(not c.before.clear for c in self.changes), sum(not c.after.clear for c in self.changes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "attribute": self.attribute.name,
            "changes": [
                {"role": c.role, "before": c.before.lean, "after": c.after.lean, "after_clear": c.after.clear}
                for c in self.changes
            ],
        }


@dataclass(frozen=True, eq=False)
class Audit:
    """All that was found. places (N, 2): the map of `mapped`, groups: each one's cluster."""

    words: WordList
    settings: AuditSettings
    about: Mapping[str, Any]
    defaults: tuple[Default, ...]
    associations: Associations | None
    mapped: tuple[str, ...]
    places: Tensor
    groups: tuple[int, ...]
    clusters: tuple[Cluster, ...]
    findings: tuple[Finding, ...]
    fixes: tuple[Fix, ...] = ()

    def of(self, attribute: str) -> list[Default]:
        return [one for one in self.defaults if one.attribute == attribute]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; without the pictures."""
        return {
            "about": dict(self.about),
            "settings": asdict(self.settings),
            "words": self.words.as_dict(),
            "defaults": [one.as_dict() for one in self.defaults],
            "associations": self.associations.as_dict() if self.associations else None,
            "map": [
                {"name": name, "x": x, "y": y, "cluster": group}
                for name, (x, y), group in zip(self.mapped, self.places.tolist(), self.groups, strict=True)
            ],
            "clusters": [cluster.as_dict() for cluster in self.clusters],
            "findings": [finding.as_dict() for finding in self.findings],
            "fixes": [fix.as_dict() for fix in self.fixes],
        }

    def summary(self) -> str:
        """A few lines in plain words."""
        lines = []
        for attribute in self.words.attributes:
            mine = self.of(attribute)
            clear = [one for one in mine if one.clear]
            lines.append(f"{attribute}: {len(clear)} of {len(mine)} roles lean clearly.")
            lines += [f"  {one.text()}" for one in sorted(clear, key=lambda one: -abs(one.lean[0]))[:3]]
        for fix in self.fixes:
            before, after = fix.covered()
            lines.append(
                f"{fix.attribute.name} with the learned vectors: even within its interval for {after} of "
                f"{len(fix.changes)} roles, {before} without."
            )
        return "\n".join(lines)
