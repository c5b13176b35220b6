"""A web UI's page in a headless Chromium: what a person clicks and sees, the same in AUTOMATIC1111 and Forge.

Needs the Python package playwright (without its browser download) and a Chromium; skipped, visibly, without them.
CONCEPT_STEER_SCREENSHOTS names a folder to keep the screenshots in.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .client import pixels

START, LIMIT = 600_000, 180_000  # milliseconds
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WORDS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
]
SCRIPT = "script_txt2img_concept_steer"
WATCH = """() => {
    window.bars = []
    window.pictures = 0
    const results = document.querySelector('#concept_steer_results')
    new MutationObserver(() => {
        const bar = results.querySelector('.progressDiv')
        if (bar && bar.innerText && !window.bars.includes(bar.innerText)) window.bars.push(bar.innerText)
        window.pictures = Math.max(window.pictures, results.querySelectorAll('.livePreview img').length)
    }).observe(results, { childList: true, subtree: true, characterData: true })
}"""

READ = """async where => {
    const file = await (await fetch(document.querySelector(where).src)).blob()
    return await new Promise(done => {
        const reader = new FileReader()
        reader.onload = () => done(reader.result)
        reader.readAsDataURL(file)
    })
}"""


@contextmanager
def opened() -> Iterator[Any]:
    """A Chromium."""
    reason = "the browser tests need the Python package playwright: pip install playwright (no browser download)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"the browser tests need one of {', '.join(PROGRAMS)} on the PATH, e.g. apt install chromium")
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=program, args=WORDS, timeout=START)
        try:
            yield found
        finally:
            found.close()


class Page:
    """A web UI's page, ready. name: begins the names of its screenshots."""

    def __init__(self, browser: Any, url: str, name: str, shots: Path) -> None:
        self.name, self.shots = name, shots
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.page.set_default_timeout(LIMIT)
        self.page.goto(url, timeout=START)
        self.page.wait_for_selector("#tabs button:has-text('Concept Steer')", timeout=START)

    def tab(self, name: str) -> None:
        # in whatever case: Forge writes Txt2img
        self.page.locator(f"#tabs > .tab-nav button:has-text('{name}')").first.click()

    def inner_tab(self, name: str) -> None:
        self.page.click(f"#concept_steer_tabs button:text-is('{name}')")

    def open(self, name: str) -> None:
        """An accordion, where it is shut."""
        label = self.page.locator(f"#{name} > .label-wrap, #{name} > * > .label-wrap").first
        if "open" not in (label.get_attribute("class") or "").split():
            label.click()

    def write(self, name: str, text: str) -> None:
        self.page.fill(f"#{name} textarea, #{name} input[type=text]", text)

    def number(self, name: str, value: float) -> None:
        field = self.page.locator(f"#{name} input[type=number]").first
        field.fill(f"{value:g}")
        field.press("Tab")

    def number_of(self, name: str) -> float:
        return float(self.page.locator(f"#{name} input[type=number]").first.input_value())

    def check(self, name: str) -> None:
        self.page.check(f"#{name} input[type=checkbox]")

    def uncheck(self, name: str) -> None:
        self.page.uncheck(f"#{name} input[type=checkbox]")

    def is_checked(self, name: str) -> bool:
        return self.page.is_checked(f"#{name} input[type=checkbox]")

    def choose(self, name: str, value: str) -> None:
        """In a drop-down list, as soon as it has it: a list that is being refreshed changes only when it is shut."""
        whole = re.compile(rf"^\W*{re.escape(value)}\s*$")  # a tick may stand before it; "one" is in "None"
        wanted = self.page.locator(f"#{name} ul.options li").filter(has_text=whole).first
        until = time.monotonic() + LIMIT / 1000
        while True:
            self.page.click(f"#{name} input")
            self.page.locator(f"#{name} ul.options li").first.wait_for()
            if wanted.count():
                return wanted.click()
            self.page.locator(f"#{name} input").press("Escape")
            assert time.monotonic() < until, f"{name} never had {value!r}"
            self.page.wait_for_timeout(300)

    def chosen(self, name: str) -> str:
        return self.page.input_value(f"#{name} input")

    def said(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")

    def picture(self) -> str:
        """A digest of the pixels of the picture that was drawn, as `client.pixels` makes them."""
        return pixels(self.page.evaluate(READ, "#txt2img_gallery img"))

    def wait_for(self, name: str, words: str) -> str:
        """Until an element's text has these words."""
        has_them = "([id, words]) => document.querySelector('#' + id)?.innerText.includes(words)"
        try:
            self.page.wait_for_function(has_them, arg=[name, words])
        except Exception as error:
            raise AssertionError(f"{name} never said {words!r}, but: {self.said(name)!r}") from error
        return self.said(name)

    def shoot(self, what: str, **options: Any) -> None:
        """A screenshot, once fonts and pictures are there and nothing moves."""
        self.page.evaluate("() => document.fonts.ready")
        there = "() => [...document.images].every(image => image.complete || image.loading === 'lazy')"
        self.page.wait_for_function(there)
        self.page.wait_for_timeout(500)
        path = self.shots / f"{self.name}-{what}.png"
        self.page.screenshot(path=path, **options)
        assert path.stat().st_size > 10_000


def folder_of_shots(usual: Path) -> Path:
    named = os.environ.get("CONCEPT_STEER_SCREENSHOTS")
    folder = Path(named) if named else usual
    folder.mkdir(parents=True, exist_ok=True)
    return folder
