"""What the switch did in a run: for people to read, and for the metadata of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DONE = ("kept", "marked", "blurred", "drawn again", "withheld")


@dataclass(frozen=True)
class SafetyReport:
    """level, method and categories that were in force; firings: `Firings.to_dict`, empty without gates.

    detector: "" when no picture was looked at. flags, done: of each picture, in order; done is one of `DONE`.
    tries: how often each picture was drawn again. scores: the detector's last score of each picture.
    found: how often each category was flagged.
    """

    level: str
    method: str
    categories: tuple[str, ...] = ()
    firings: Mapping[str, int] = field(default_factory=dict)
    detector: str = ""
    flags: tuple[bool, ...] = ()
    done: tuple[str, ...] = ()
    tries: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    found: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON and for PNG metadata."""
        told: dict[str, Any] = {"level": self.level, "method": self.method, "categories": list(self.categories)}
        if self.firings:
            told["gate"] = dict(self.firings)
        if self.detector:
            told["detector"] = {
                "name": self.detector,
                "flags": list(self.flags),
                "scores": [round(score, 4) for score in self.scores],
                "categories": dict(self.found),
                "done": list(self.done),
                "tries": list(self.tries),
            }
        return told

    def text(self) -> str:
        """A few lines in plain words."""
        if self.level == "off":
            lines = ["Safety is off."]
        else:
            how = {"vectors": "learned vectors", "sld": "Safe Latent Diffusion"}
            method = how.get(self.method, "learned vectors and Safe Latent Diffusion")
            lines = [f"Safety {self.level} by {method}: {', '.join(self.categories) or 'all categories'}."]
        if self.firings:
            lines.append(
                f"The gate opened in {self.firings['fired_pictures']} of {self.firings['pictures']} pictures "
                f"({self.firings['fired_steps']} of {self.firings['steps']} picture-steps)."
            )
        if not self.detector:
            return "\n".join([*lines, "Finished pictures were not looked at."])
        what = ", ".join(f"{name} {count}" for name, count in self.found.items())
        lines.append(
            f"{self.detector} flagged {sum(self.flags)} of {len(self.flags)} pictures"
            + (f" ({what})." if what else ".")
        )
        counts = Counter(done for done in self.done if done != "kept")
        if counts:
            lines.append("Of these: " + ", ".join(f"{count} {done}" for done, count in counts.items()) + ".")
        return "\n".join(lines)
