"""Responsible text enhancing (Li et al. 2311.17216, sec. 3.3): words that ask for responsibility switch on vectors.

The table is a JSON object, phrase -> {"fair": attribute} or {"safe": name of a vector}. What is found is shown, and the
prompt is not changed unless asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConceptSteerError, SettingError
from .templates import occurs, tidy

SHIPPED = Path(__file__).with_name("phrases.json")
KINDS = ("fair", "safe")


@dataclass(frozen=True)
class Action:
    """fair: balance the attribute `name`; safe: add the vector `name`."""

    kind: Literal["fair", "safe"]
    name: str


@dataclass(frozen=True)
class Found:
    """A phrase of the table in a prompt, prompt[start:end], and what it switches on."""

    phrase: str
    start: int
    end: int
    action: Action

    def text(self) -> str:
        does = f"balances {self.action.name}" if self.action.kind == "fair" else f"adds {self.action.name!r}"
        return f"{self.phrase!r} {does}"


def load_phrases(path: Path = SHIPPED) -> dict[str, Action]:
    """A phrase table. Errors: SettingError, which names the file and the entry."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"The phrase table {path} cannot be read ({error.strerror}): check its name.") from error
    except ValueError as error:
        raise SettingError(f"The phrase table {path} is not JSON ({error}).") from error
    if not isinstance(told, dict):
        raise SettingError(f'The phrase table {path} must be an object such as {{"no violence": {{"safe": "calm"}}}}.')
    table: dict[str, Action] = {}
    for phrase, action in told.items():
        good = isinstance(action, dict) and len(action) == 1 and phrase.strip()
        kind, name = next(iter(action.items())) if good else ("", "")
        if kind not in KINDS or not isinstance(name, str) or not name.strip():
            raise SettingError(
                f"The phrase table {path} says {json.dumps(action)} of {phrase!r}; expected "
                '{"fair": "an attribute"} or {"safe": "a vector"}.'
            )
        table[phrase] = Action(kind, name.strip())  # type: ignore[arg-type]
    return table


def find_phrases(prompt: str, table: Mapping[str, Action]) -> list[Found]:
    """All phrases in the prompt, in its order; in any case, at word borders; of overlapping ones the longest."""
    found: list[Found] = []
    for phrase in sorted(table, key=lambda text: (-len(text), text)):
        at = 0
        while match := occurs(phrase, prompt[at:]):
            start, end = at + match.start(), at + match.end()
            if all(end <= other.start or start >= other.end for other in found):
                found.append(Found(prompt[start:end], start, end, table[phrase]))
            at = end
    return sorted(found, key=lambda one: one.start)


def without_phrases(prompt: str, found: Sequence[Found]) -> str:
    """The prompt with these phrases taken out, its spaces and commas closed up."""
    for one in sorted(found, key=lambda one: -one.start):
        prompt = prompt[: one.start] + " " + prompt[one.end :]
    return tidy(prompt)


def check_phrases(found: Sequence[Found], attributes: Sequence[str], vectors: Sequence[str]) -> None:
    """Errors: ConceptSteerError when a phrase switches on what is not there, so that nothing is promised silently."""
    for one in found:
        have, what = (attributes, "attribute") if one.action.kind == "fair" else (vectors, "vector")
        if one.action.name not in have:
            there = f"there are {', '.join(have)}" if have else "there is none"
            raise ConceptSteerError(
                f"The prompt says {one.phrase!r}, which needs the {what} {one.action.name!r}, but {there}. Learn or "
                "name it, change the phrase table, or take the phrase out of the prompt."
            )
