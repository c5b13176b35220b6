"""A run put together for command line and node: phrases found, gates asked, values assigned, steers made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..denoiser import Denoiser
from ..errors import FamilyMismatch
from ..schedule import Schedule
from ..steering import Steer
from ..vector import ConceptVector
from .assignment import Assignment, Mode, Target, assign, steers
from .attributes import Attribute
from .gate import GateDecision
from .phrases import Action, Found, check_phrases, find_phrases, without_phrases
from .report import Labels, report


@dataclass(frozen=True)
class Plan:
    """What each picture of a run gets. `steers` is empty where the prompt is left alone altogether.

    balanced: the targets asked for, by option or by phrase. drawn: the prompt to draw, without its phrases if asked.
    """

    prompt: str
    drawn: str
    balanced: tuple[Target, ...]
    decisions: Mapping[str, GateDecision]
    found: tuple[Found, ...]
    assignments: list[Assignment]
    steers: list[list[Steer]]
    mode: Mode
    seed: int

    @property
    def acts(self) -> bool:
        return any(self.steers)

    def given(self, number: int) -> Assignment:
        """What picture `number` gets of the attributes that are not left alone."""
        return {name: label for name, label in self.assignments[number].items() if not self.decisions[name].named}

    def report(self, observed: Labels | None = None) -> dict[str, Any]:
        return report(
            self.prompt,
            self.balanced,
            self.assignments,
            mode=self.mode,
            seed=self.seed,
            decisions=self.decisions,
            phrases=self.found,
            observed=observed,
        )


def open_attributes(
    denoiser: Denoiser, prompt: str, attributes: Sequence[Attribute]
) -> tuple[list[Attribute], dict[str, GateDecision]]:
    """(the attributes that the prompt does not name, the decision on each). Errors: FamilyMismatch."""
    for attribute in attributes:
        if attribute.family != denoiser.family:
            raise FamilyMismatch(
                f"The attribute {attribute.name!r} was learned on {attribute.family!r}, but this model is "
                f"{denoiser.family!r}: learn it on this model."
            )
    decisions = {attribute.name: attribute.decides(denoiser, prompt) for attribute in attributes}
    return [attribute for attribute in attributes if not decisions[attribute.name].named], decisions


def plan(
    denoiser: Denoiser,
    prompt: str,
    targets: Sequence[Target],
    count: int,
    *,
    always: Sequence[str],
    seed: int = 0,
    mode: Mode = "quota",
    first: int = 0,
    strength: float = 1.0,
    schedule: Schedule | None = None,
    table: Mapping[str, Action] | None = None,
    vectors: Mapping[str, ConceptVector] | None = None,
    strip: bool = False,
) -> Plan:
    """targets: all that there are; of these the names in `always` are balanced, the others when a phrase asks for it.

    vectors: what phrases of the kind "safe" may add, by name. The gate reads the prompt without its phrases, since
    "either male or female" asks for both and names neither. Errors: ConceptSteerError.
    """
    found = tuple(find_phrases(prompt, table or {}))
    vectors = vectors or {}
    check_phrases(found, [target.attribute.name for target in targets], list(vectors))
    asked = {*always, *(one.action.name for one in found if one.action.kind == "fair")}
    balanced = tuple(target for target in targets if target.attribute.name in asked)
    plain = without_phrases(prompt, found)
    attributes, decisions = open_attributes(denoiser, plain, [target.attribute for target in balanced])
    assignments = assign(balanced, count, seed=seed, mode=mode, first=first)
    safe = dict.fromkeys(one.action.name for one in found if one.action.kind == "safe")
    everywhere = [Steer(vectors[name], strength, schedule or Schedule()) for name in safe]
    of_pictures = steers(assignments, attributes, strength=strength, schedule=schedule)
    return Plan(
        prompt,
        plain if strip else prompt,
        balanced,
        decisions,
        found,
        assignments,
        [[*own, *everywhere] for own in of_pictures],
        mode,
        seed,
    )
