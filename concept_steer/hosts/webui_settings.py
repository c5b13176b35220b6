"""The web UI's settings page for Concept Steer, and the lock by which an administrator keeps safety on.

The lock is the flag --concept-steer-safety LEVEL (preload.py): it is read at every run and no setting outranks it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import SettingError
from ..safety.settings import LEVELS, SafetySettings

SECTION = ("concept_steer", "Concept Steer")
FOLDERS = "concept_steer_folders"  # webui.library() reads it
ALL_CARDS = "concept_steer_all_cards"
SAFETY_ON, SAFETY_LEVEL = "concept_steer_safety_on", "concept_steer_safety_level"
STANDARD: SafetySettings = SafetySettings()


def on_ui_settings() -> None:
    """Add our page. Folders cannot be set through the API: only names come in that way."""
    import gradio
    from modules import shared

    def option(default: Any, label: str, component: Any = None, arguments: Any = None, **more: Any) -> Any:
        return shared.OptionInfo(default, label, component, arguments, section=SECTION, **more)

    levels = {"choices": [level for level in LEVELS if level != "off"]}
    lines = {"lines": 3, "placeholder": "one folder a line"}
    folders = option("", "More folders of concept vectors", gradio.Textbox, lines, restrict_api=True)
    shared.opts.add_option(FOLDERS, folders.info("beside models/concept-vectors, where new ones are saved"))
    cards = option(False, "Cards of vectors for other models, too")
    shared.opts.add_option(ALL_CARDS, cards.info("refresh the cards after a change of models"))
    locked = locked_level()
    told = "" if locked is None else f"the administrator keeps it on, at least at the level {locked}"
    safety = option(False, "Safety is on when the page opens")
    shared.opts.add_option(SAFETY_ON, safety.info(told).needs_reload_ui() if told else safety.needs_reload_ui())
    level = option(STANDARD.level, "Level of safety when the page opens", gradio.Radio, levels)
    shared.opts.add_option(SAFETY_LEVEL, level.needs_reload_ui())


def locked_level() -> str | None:
    """The level of --concept-steer-safety; None when safety is the user's own choice. Errors: SettingError."""
    from modules import shared

    level = getattr(shared.cmd_opts, "concept_steer_safety", None)
    if level is not None and level not in LEVELS:
        raise SettingError(f"--concept-steer-safety {level}: there is no such level; there are {', '.join(LEVELS)}.")
    return level


def safety_at_start() -> SafetySettings:
    """What the accordion shows when the page opens. Errors: SettingError."""
    from modules import shared

    level = getattr(shared.opts, SAFETY_LEVEL, STANDARD.level)
    on = getattr(shared.opts, SAFETY_ON, False)
    return enforced(SafetySettings(level=level if on else "off"), locked_level())


def enforced(asked: SafetySettings | None, locked: str | None) -> SafetySettings:
    """What a run gets that asked for `asked` (None: for nothing), under the lock.

    Under the lock the level is the stricter of the two, all categories are kept out as the safety set describes them,
    and pictures are looked at in no weaker a way than was asked. Without one it is what was asked.
    """
    wish = SafetySettings(level="off") if asked is None else asked
    if locked is None:
        return wish
    stricter = max(wish.level, locked, key=LEVELS.index)
    return replace(wish, level=stricter, categories=(), texts={}, method="auto" if wish.method != "both" else "both")  # type: ignore[arg-type]
