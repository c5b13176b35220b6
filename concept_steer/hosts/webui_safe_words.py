"""Safety in the web UIs' settings: of `SafetySettings` the level, the method and the categories, in all their forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SettingError
from ..safety.settings import LEVELS, SafetySettings
from .webui_rows import escaped

WAYS = {
    "automatic": "auto",
    "learned vectors": "vectors",
    "Safe Latent Diffusion": "sld",
    "both": "both",
}
NO_SAFETY: SafetySettings = SafetySettings(level="off")
STANDARD: SafetySettings = SafetySettings()
ON_LEVELS = tuple(level for level in LEVELS if level != "off")
KEYS = ("level", "method", "categories")


def safety_from_dict(given: Any) -> SafetySettings:
    """From the API: a level's name, or a dict. Errors: SettingError, also for what the web UI does not do."""
    if isinstance(given, str):
        given = {"level": given}
    if not isinstance(given, Mapping):
        raise SettingError(
            f"'safety' is a level ({', '.join(LEVELS)}) or a dict with {', '.join(KEYS)}, not {given!r}."
        )
    if further := sorted(str(key) for key in given if key not in KEYS):
        raise SettingError(
            f"In the web UI safety has {', '.join(KEYS)}; {', '.join(further)} is not among them. Finished pictures "
            "are not looked at here; the command line and ComfyUI can do that."
        )
    return SafetySettings.from_dict(given)


def safety_of_controls(given: Mapping[str, Any]) -> SafetySettings:
    """Errors: SettingError."""
    names = [part.strip() for part in str(given["safety_categories"] or "").split(",") if part.strip()]
    way = given["safety_method"]
    level: Any = given["safety_level"] if given["safety"] else "off"
    return SafetySettings(level=level, method=WAYS.get(way, way), categories=tuple(names))


def safety_to_controls(safety: SafetySettings) -> dict[str, Any]:
    """What the controls show; at "off" the level that ticking the box would begin with."""
    return {
        "safety": safety.on,
        "safety_level": safety.level if safety.on else STANDARD.level,
        "safety_method": next(word for word, meaning in WAYS.items() if meaning == safety.method),
        "safety_categories": ", ".join(safety.categories),
    }


def safety_text(safety: SafetySettings) -> str:
    """`strict:method=sld:categories=violence,weapons`; what is as usual is left out."""
    parts: list[str] = [safety.level]
    parts += [f"method={safety.method}"] if safety.method != STANDARD.method else []
    parts += [f"categories={','.join(safety.categories)}"] if safety.categories else []
    return ":".join(escaped(part) for part in parts)


def safety_parsed(items: Sequence[str]) -> SafetySettings:
    """The inverse of `safety_text`, its separators undone. Errors: SettingError."""
    given: dict[str, Any] = {"level": items[0] if items else ""}
    for item in items[1:]:
        key, _, value = item.partition("=")
        given[key] = [part for part in value.split(",") if part] if key == "categories" else value
    return safety_from_dict(given)


def safety_in_words(safety: SafetySettings) -> str:
    return "" if not safety.on else safety.text().replace("; finished pictures are not looked at.", ".")
