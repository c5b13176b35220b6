"""What a latent check found in one drawing, and what became of each picture: for people, and for PNG metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..safety.detectors import Verdict

if TYPE_CHECKING:
    from .guarded import LatentCheck


@dataclass(frozen=True, eq=False)
class GuardReport:
    """Of N pictures. flagged: by the first look. done: of each "kept", "steered", "drawn again" or "withheld".

    verdicts: of the last look at each. tries: how often each was drawn again.
    """

    flagged: tuple[bool, ...]
    done: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    tries: tuple[int, ...]
    check: LatentCheck
    name: str = field(default="latent-clip", kw_only=True)

    @property
    def withheld(self) -> tuple[bool, ...]:
        return tuple(done == "withheld" for done in self.done)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON and for PNG metadata."""
        return {
            "name": self.name,
            "answer": self.check.answer,
            "at": self.check.at,
            "flags": list(self.flagged),
            "scores": [round(one.score, 4) for one in self.verdicts],
            "done": list(self.done),
            "tries": list(self.tries),
        }

    def text(self) -> str:
        """A line in plain words."""
        counts = {name: self.done.count(name) for name in ("steered", "drawn again", "withheld")}
        what = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        line = f"The latent check flagged {sum(self.flagged)} of {len(self.flagged)} pictures"
        return f"{line}: {what}." if what else f"{line}."
