"""What is known of how pictures were drawn: the last runs of a MODEL of Safety Steer and of Latent Guard."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..concept_steer.errors import SafetyError
from ..concept_steer.safety import SafetyReport
from ..concept_steer.safety.switch import SafetyPlan

if TYPE_CHECKING:
    from ..concept_steer.hosts.comfy_latent_guard import Look


class Ran(NamedTuple):
    """What was in force in the last run on a MODEL, how many pictures that drew, and what the gate did."""

    plan: SafetyPlan
    pictures: int
    gate: dict[str, int]


NOTHING_YET = (
    "The model at safe_model has drawn nothing yet, so these pictures are not from it. Connect the model that the "
    "sampler of these pictures uses, or leave the socket empty."
)


def last_run(model: Any, only_demo: bool = False) -> Ran | None:
    """Of a MODEL of Safety Steer, None for one of Latent Guard alone.

    only_demo: whether the detector knows pictures of the demo model only. Errors: SafetyError, also for such a detector
    and another model.
    """
    from ..concept_steer.hosts.comfy import family_of
    from ..concept_steer.hosts.comfy_latent_guard import looking_of
    from ..concept_steer.hosts.comfy_safety import guard_of

    guard = guard_of(model)
    if guard is None and looking_of(model) is None:
        raise SafetyError(
            "The model at safe_model has no Safety Steer on it, so nothing was kept out while it drew. Connect the "
            "MODEL of Safety Steer (at a level other than off) or of Latent Guard, or leave the socket empty."
        )
    if guard is not None and not guard.runs:
        raise SafetyError(NOTHING_YET)
    family = family_of(model)[0]
    if only_demo and family != "demo":
        raise SafetyError(
            f"The demo judges know nothing but pictures of the demo model, and these are from another ({family}): "
            "choose another detector."
        )
    return None if guard is None else Ran(guard.plan, guard.runs[-1].pictures, dict(guard.runs[-1].gate))


def last_look(model: Any, pictures: int) -> Look | None:
    """Of a MODEL of Latent Guard, None for one without. Errors: SafetyError when these are not its pictures."""
    from ..concept_steer.hosts.comfy_latent_guard import looking_of

    looking = looking_of(model)
    if looking is None:
        return None
    if not looking.runs:
        raise SafetyError(NOTHING_YET)
    look = looking.runs[-1]
    if len(look.flagged) != pictures:
        raise SafetyError(
            f"Latent Guard looked at {len(look.flagged)} pictures in its model's last run, but {pictures} came in, so "
            "it is not known which of them it withheld: connect all pictures of that run, in order."
        )
    return look


def told_of(report: SafetyReport, ran: Ran | None, look: Look | None, pictures: int) -> tuple[dict[str, Any], str]:
    """As a table and as text; without the model nothing is known of how the pictures were drawn, so nothing is said."""
    table, lines = _told_of_run(report, ran, pictures, look is not None)
    if look is None:
        return table, "\n".join(lines)
    return {**table, "latent_check": look.to_dict()}, "\n".join([*lines, *look.text().splitlines()])


def _told_of_run(report: SafetyReport, ran: Ran | None, pictures: int, known: bool) -> tuple[dict[str, Any], list[str]]:
    if ran is None:
        first = "Safety Steer was not on."
        if not known:
            first = "How the pictures were drawn is not known here: safe_model is not connected."
        table = {name: value for name, value in report.to_dict().items() if name == "detector"}
        return table, [first, *report.text().splitlines()[1:]]
    report = replace(report, method=ran.plan.method, categories=ran.plan.categories, firings=ran.gate)
    lines = report.text().splitlines()
    if ran.pictures != pictures:
        lines.insert(1, f"Of the model's last run, which drew {ran.pictures} pictures; here are {pictures}.")
    return report.to_dict(), lines
