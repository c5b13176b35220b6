"""What a run of the web UI steers with: one schema for accordion, API, infotext and X/Y/Z plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import SettingError
from ..safety.settings import SafetySettings
from .webui_rows import MODES, SIDES, TAG, Fair, Row, known, number, plain, unescaped
from .webui_safe_words import (
    NO_SAFETY,
    safety_from_dict,
    safety_in_words,
    safety_of_controls,
    safety_parsed,
    safety_text,
    safety_to_controls,
)

ROWS = 5  # of the accordion; prompts and the API may have any number
NOTHING = "None"


@dataclass(frozen=True)
class Settings:
    """All of the accordion. hires: factor of every strength of it in the hires pass (0: off there).

    enabled False: neither rows nor fair act. safety has a switch of its own, its level.
    """

    enabled: bool = False
    rows: tuple[Row, ...] = ()
    hires: float = 1.0
    fair: Fair | None = None
    safety: SafetySettings = NO_SAFETY

    @property
    def steers(self) -> bool:
        """Whether something other than safety acts."""
        return self.enabled and (any(row.strength for row in self.rows) or self.fair is not None)

    @property
    def acts(self) -> bool:
        return self.steers or self.safety.on

    @classmethod
    def from_dict(cls, given: Any, safety: SafetySettings = NO_SAFETY) -> Settings:
        """From the API's dict; who sends one wants it on, unless it says "enabled": false. Errors: SettingError.

        safety: what holds where the dict does not say.
        """
        found = known(cls, given, "Concept Steer settings")
        rows, fair, enabled = found.get("rows", []), found.get("fair"), found.get("enabled", True)
        if not isinstance(rows, (list, tuple)) or not isinstance(enabled, bool):
            raise SettingError(f"'rows' is a list of rows and 'enabled' true or false, not {rows!r} and {enabled!r}.")
        return cls(
            enabled,
            tuple(Row.from_dict(row) for row in rows),
            number(found.get("hires", 1.0), "The factor of the hires pass"),
            None if fair is None else Fair.from_dict(fair),
            safety if found.get("safety") is None else safety_from_dict(found["safety"]),
        )

    def to_dict(self) -> dict[str, Any]:
        fair = None if self.fair is None else self.fair.to_dict()
        rows = [row.to_dict() for row in self.rows]
        safety = self.safety.to_dict()
        safety = {key: safety[key] for key in ("level", "method", "categories")}
        return {"enabled": self.enabled, "rows": rows, "hires": self.hires, "fair": fair, "safety": safety}

    @classmethod
    def from_args(cls, args: Sequence[Any], safety: SafetySettings = NO_SAFETY) -> Settings:
        """From what the web UI hands to a script: the API's one dict, or the values of all controls.

        safety: what holds where neither says anything of it.
        """
        if args and isinstance(args[0], Mapping):
            return cls.from_dict(args[0], safety)
        return cls.from_controls(args, safety)

    @classmethod
    def from_controls(cls, values: Sequence[Any], safety: SafetySettings = NO_SAFETY) -> Settings:
        """In the order of CONTROLS; what is missing at the end is as usual. Errors: SettingError."""
        if len(values) > len(CONTROLS):
            raise SettingError(f"{len(values)} values were sent for {len(CONTROLS)} controls: {', '.join(CONTROLS)}.")
        sent = {key: value for key, value in zip(CONTROLS, values, strict=False) if value is not None}
        given = {**USUAL, **safety_to_controls(safety), **sent}
        rows = []
        for i in range(1, ROWS + 1):
            if given[f"vector_{i}"] not in ("", NOTHING):
                rows.append(Row(*(given[f"{field.name}_{i}"] for field in fields(Row))))
        fair = None
        if given["fair_attribute"] not in ("", NOTHING):
            fair = Fair(*(given[f"fair_{field.name}"] for field in fields(Fair)))
        hires = number(given["hires"], "The factor of the hires pass")
        return cls(bool(given["enabled"]), tuple(rows), hires, fair, safety_of_controls(given))

    def to_controls(self) -> dict[str, Any]:
        """What each control shows. Rows that the accordion has no place for are left out."""
        shown: dict[str, Any] = {**USUAL, **safety_to_controls(self.safety)}
        shown |= {"enabled": self.enabled, "hires": self.hires}
        for i, row in enumerate(self.rows[:ROWS], 1):
            shown |= {f"{key}_{i}": value for key, value in row.to_dict().items()}
            shown[f"rows_{i}"] = _word(SIDES, row.rows)
        if self.fair is not None:
            shown |= {f"fair_{key}": value for key, value in self.fair.to_dict().items()}
            shown["fair_mode"] = _word(MODES, self.fair.mode)
        return shown

    def text(self) -> str:
        """One line for the infotext, "" when nothing acts: `concept:woman:0.8 | hires:0.5 | fair:gender`."""
        parts = []
        if self.steers:
            parts += [f"{TAG}:{row.text()}" for row in self.rows if row.strength]
            parts += [f"hires:{plain(self.hires)}"] if self.hires != 1 else []
            parts += [f"fair:{self.fair.text()}"] if self.fair is not None else []
        parts += [f"safety:{safety_text(self.safety)}"] if self.safety.on else []
        return " | ".join(parts)

    def of_picture(self, seed: int, number: int) -> Settings:
        """The settings that draw one picture of a balanced run again, alone."""
        return self if self.fair is None else replace(self, fair=replace(self.fair, seed=seed, first=number))

    @classmethod
    def parsed(cls, text: str) -> Settings:
        """The inverse of `text`. Errors: SettingError."""
        result = cls()
        for part in (part.strip() for part in text.split("|")):
            kind, _, rest = part.partition(":")
            items = rest.split(":")
            if kind == TAG:
                result = replace(result, rows=(*result.rows, Row.parsed(items)))
            elif kind == "hires":
                result = replace(result, hires=number(rest, "The factor of the hires pass"))
            elif kind == "fair":
                result = replace(result, fair=Fair.parsed([unescaped(item) for item in items]))
            elif kind == "safety":
                result = replace(result, safety=safety_parsed([unescaped(item) for item in items]))
            else:
                raise SettingError(
                    f"{part!r} in the picture's settings is not understood; it may be of a newer version."
                )
        return replace(result, enabled=bool(result.rows or result.fair))

    def in_words(self) -> str:
        """What will happen, for the accordion."""
        return " ".join(filter(None, [self._steers_in_words(), safety_in_words(self.safety)]))

    def _steers_in_words(self) -> str:
        if not self.enabled and self.safety.on:
            return "No vectors (prompt tags still act)."
        if not self.enabled:
            return "Off: pictures are exactly as without this extension (prompt tags still act)."
        parts = [row.in_words() for row in self.rows if row.strength]
        parts += [self.fair.in_words()] if self.fair is not None else []
        if not parts:
            return "Nothing is chosen yet, so nothing will change."
        again = {1.0: "", 0.0: " Not in the hires pass."}.get(self.hires, f" Hires pass: x {self.hires:g}.")
        return f"Steers with {'; '.join(parts)}.{again}"


_ROW, _FAIR = Row("-"), Fair("-")
USUAL: dict[str, Any] = {"enabled": False}
for _i in range(1, ROWS + 1):
    USUAL |= {f"{key}_{_i}": value for key, value in {**_ROW.to_dict(), "vector": NOTHING, "rows": "prompt"}.items()}
USUAL |= {"hires": 1.0}
USUAL |= {f"fair_{k}": v for k, v in {**_FAIR.to_dict(), "attribute": NOTHING, "mode": next(iter(MODES))}.items()}
USUAL |= safety_to_controls(NO_SAFETY)
CONTROLS = tuple(USUAL)  # in the order of the accordion and of the API's list


def _word(words: Mapping[str, str], value: str) -> str:
    return next(word for word, meaning in words.items() if meaning == value)
