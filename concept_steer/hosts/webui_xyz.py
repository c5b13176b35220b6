"""Axes of the X/Y/Z plot: the first row's controls, and one factor for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modules import scripts

from ..safety.settings import LEVELS
from . import webui
from .webui_schema import NOTHING

PREFIX = "[Concept Steer] "


def register() -> None:
    """Add the axes to the plot's list, once; the plot's script may be loaded before this one or after."""
    for data in scripts.scripts_data:
        module = getattr(data, "module", None)
        options = getattr(module, "axis_options", None)
        if not str(getattr(data, "path", "")).endswith("xyz_grid.py") or options is None:
            continue
        if not any(option.label.startswith(PREFIX) for option in options):
            options += _axes(module)


def _axes(plot: Any) -> list[Any]:
    made = [
        plot.AxisOption(
            f"{PREFIX}Vector {i}",
            str,
            _sets(f"vector_{i}"),
            confirm=_confirm,
            choices=lambda: [NOTHING, *webui.names()],
        )
        for i in (1, 2)
    ]
    for i in (1, 2):
        made += [
            plot.AxisOption(f"{PREFIX}{key.title()} {i}", float, _sets(f"{key}_{i}"))
            for key in ("strength", "start", "end")
        ]
    levels = plot.AxisOption(f"{PREFIX}Safety level", str, _sets(webui.LEVEL), choices=lambda: list(LEVELS))
    return [*made, levels]


def _sets(control: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # a fresh dict: cells are shallow copies of one p
        setattr(p, webui.AXES, {**getattr(p, webui.AXES, {}), control: value})

    return apply


def _confirm(p: Any, values: Sequence[str]) -> None:
    """Before the first cell is drawn. Errors: LibraryError."""
    found = webui.library()
    for value in values:
        if value != NOTHING:
            found.find(value)
