"""Measurements among the tests: what one wants to know, not what has to hold, and what may take minutes."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure", action="store_true", help="run the measurements too, which take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--measure"):
        return
    for item in items:
        if item.get_closest_marker("measure"):
            item.add_marker(pytest.mark.skip(reason="a measurement: run with --measure"))
