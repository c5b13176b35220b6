"""The audit on the real AUTOMATIC1111's page: progress, the chart, the page as a file, Interrupt, what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from concept_steer.analysis.word_list import parsed

from .client import Client
from .pages import Page, folder_of_shots, opened

WORDS = {
    "neutral": "a person",
    "roles": ["nurse", "mechanic", "teacher", "pilot", "student"],
    "attributes": {"gender": {"woman": "a woman {}", "man": "a man {}"}},
    "words": {"backgrounds": ["{} on a blue background", "{} on a dark background"]},
}
LONG = {**WORDS, "words": {"others": [f"{{}} number {i}" for i in range(3000)]}}
# The bar's words and whether it is there; the page of the web UI itself draws it above the results.
WATCH = """() => {
    window.bars = []
    const results = document.querySelector('#concept_steer_audit_results')
    new MutationObserver(() => {
        const bar = results.querySelector('.progressDiv')
        if (bar && bar.innerText && !window.bars.includes(bar.innerText)) window.bars.push(bar.innerText)
    }).observe(results, { childList: true, subtree: true, characterData: true })
}"""


@pytest.fixture(scope="module")
def page(server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    watched = Client(server.url).options(live_previews_enable=True, show_progress_every_n_steps=1)
    with opened() as browser, watched:  # in this order: without a browser the options are not touched
        found = Page(browser, server.url, "webui", folder_of_shots(tmp_path_factory.mktemp("screenshots")))
        found.tab("Concept Steer")
        found.inner_tab("Audit")
        yield found


@pytest.fixture
def folder(base: Path) -> Path:
    return base / "outputs" / "concept-steer-audit"


def start(page: Page, words: Any, extent: str = "quick") -> None:
    page.write("concept_steer_audit_words", words if isinstance(words, str) else json.dumps(words))
    page.page.click(f"#concept_steer_audit_extent label:has-text('{extent}')")
    page.page.evaluate(WATCH)
    page.page.click("#concept_steer_audit_start")


def finished(page: Page, folder: Path, before: set[Path]) -> tuple[str, Path]:
    """What is said of the next audit, and its folder."""
    name = f"{len(before) + 1:03d}"
    said = page.wait_for("concept_steer_audit_said", f"{folder.name}/{name}/index.html")
    assert set(folder.glob("*")) - before == {folder / name}
    return said, folder / name


def test_the_usual_list_is_put_into_the_field_to_be_edited(page: Page):
    page.page.click("#concept_steer_audit_fill")
    page.page.wait_for_function(
        "() => document.querySelector('#concept_steer_audit_words textarea').value.includes('roles')"
    )
    listed = parsed(json.loads(page.page.input_value("#concept_steer_audit_words textarea")), "the field")
    assert "nurse" in listed.roles and set(listed.attributes) == {"gender", "skin tone"}


def test_a_checkpoint_is_audited_with_progress_and_its_page_is_offered(page: Page, folder: Path, base: Path):
    before = set(folder.glob("*"))
    start(page, WORDS)
    said, written = finished(page, folder, before)
    assert "gender: " in said and "roles lean clearly" in said and str(base) not in said
    page.page.wait_for_selector("#concept_steer_audit_gallery img")
    page.page.wait_for_selector("#concept_steer_audit_files :text('index')")
    page.page.mouse.wheel(0, -5000)
    page.shoot("audit")
    about = json.loads((written / "audit.json").read_text(encoding="utf-8"))
    lean = {one["role"]: one["lean"] for one in about["defaults"] if one["attribute"] == "gender"}
    assert set(lean) == set(WORDS["roles"]) and lean["mechanic"][0] > lean["nurse"][0]
    assert (written / "index.html").stat().st_size > 10_000


def test_the_full_audit_draws_pictures_and_judges_them(page: Page, folder: Path):
    before = set(folder.glob("*"))
    start(page, {**WORDS, "roles": ["mechanic"]}, "full")
    _, written = finished(page, folder, before)
    found = json.loads((written / "audit.json").read_text(encoding="utf-8"))["findings"]
    assert found and all(one["pictures"] == 16 and one["judged"] == 16 for one in found)


def test_interrupt_ends_the_audit_and_writes_nothing(page: Page, folder: Path):
    before = set(folder.glob("*"))
    start(page, LONG)
    page.page.wait_for_function("() => window.bars.some(text => text.includes('associations'))")
    page.shoot("audit-running")
    page.page.click("#concept_steer_audit_interrupt")
    page.wait_for("concept_steer_audit_said", "Interrupted, so there is no page")
    assert set(folder.glob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("roles: [", "cannot be understood"),
        ("roles: [nurse]", "names no attributes"),
        ({**WORDS, "roles": ["n" * 2000]}, "2,0"),
        ({**WORDS, "roles": []}, "the list is empty"),
    ],
)
def test_what_is_wrong_is_said_on_the_page(page: Page, folder: Path, words: Any, said: str):
    before = set(folder.glob("*"))
    start(page, words)
    page.wait_for("concept_steer_audit_said", said)
    assert set(folder.glob("*")) == before


def test_pictures_after_an_audit_are_as_before(client, page: Page, folder: Path):
    before, plain = set(folder.glob("*")), client.draw().pictures
    start(page, WORDS)
    finished(page, folder, before)
    assert client.draw().pictures == plain
