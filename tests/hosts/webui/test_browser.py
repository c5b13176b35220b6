"""AUTOMATIC1111's own page in a headless Chromium: accordion, cards, learning with progress, library and import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from concept_steer.vector import ConceptVector

from .client import Client
from .pages import SCRIPT, WATCH, Page, folder_of_shots, opened

pytestmark = pytest.mark.usefixtures("known")


@pytest.fixture(scope="module")
def ui() -> str:
    """Which web UI; begins the screenshots' names."""
    return "webui"


@pytest.fixture(scope="module")
def page(server, ui: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    Client(server.url).call("/sdapi/v1/options", {"live_previews_enable": True, "show_progress_every_n_steps": 1})
    with opened() as browser:
        yield Page(browser, server.url, ui, folder_of_shots(tmp_path_factory.mktemp("screenshots")))
    Client(server.url).call("/sdapi/v1/options", {"live_previews_enable": False})


def test_a_vector_is_learned_with_progress_and_live_preview(page: Page, vectors):
    page.tab("Concept Steer")
    page.page.click("#concept_steer_method label:has-text('from pictures')")
    page.page.wait_for_selector("#concept_steer_neutral", state="hidden")
    page.page.wait_for_selector("#concept_steer_prompt", state="visible")
    page.page.click("#concept_steer_method label:has-text('best')")
    page.page.wait_for_selector("#concept_steer_neutral", state="visible")
    page.write("concept_steer_name", "woman of the page")
    page.check("concept_steer_overwrite")
    page.number("concept_steer_steps", 12)
    page.number("concept_steer_examples", 8)
    page.page.evaluate(WATCH)
    page.page.click("#concept_steer_start")
    page.page.wait_for_selector("#concept_steer_results .livePreview img", state="attached")
    page.shoot("learning")
    said = page.wait_for("concept_steer_said", "Saved as")
    assert "<concept:woman of the page:1>" in said and "learned by score" in said
    page.page.wait_for_selector("#concept_steer_gallery img")
    assert page.page.locator("#concept_steer_gallery img").count() >= 2  # before and after, and the curve
    page.page.mouse.wheel(0, -5000)
    page.shoot("learned")
    bars, pictures = page.page.evaluate("() => [window.bars, window.pictures]")
    assert any("step " in text for text in bars) and pictures > 0, bars
    found = ConceptVector.load(vectors / "woman of the page.safetensors")
    assert found.family == "demo" and found.info["method"] == "score"


def test_interrupt_on_the_page_keeps_the_best_so_far(page: Page, vectors):
    page.tab("Concept Steer")
    page.write("concept_steer_name", "half")
    page.check("concept_steer_overwrite")
    page.number("concept_steer_steps", 5000)
    page.page.evaluate(WATCH)
    page.page.click("#concept_steer_start")
    page.page.wait_for_function("() => window.bars.some(text => text.includes('step '))")
    page.page.click("#concept_steer_interrupt")
    assert "Interrupted: this is the best vector so far." in page.wait_for("concept_steer_said", "Saved as half")
    assert (vectors / "half.safetensors").is_file()


def test_what_is_wrong_is_said_on_the_page(page: Page):
    page.tab("Concept Steer")
    page.write("concept_steer_name", "../outside")
    page.page.click("#concept_steer_start")
    assert "it is a path" in page.wait_for("concept_steer_said", "outside")


def test_the_library_shows_all_that_a_file_says(page: Page, base):
    page.tab("Concept Steer")
    page.inner_tab("Library")
    page.page.click("#concept_steer_refresh")
    page.page.wait_for_timeout(3000)
    page.choose("concept_steer_vector", "foreign")
    assert "Stable Diffusion 1.x" in page.wait_for("concept_steer_card", "made for")
    assert str(base) not in page.page.inner_text("#concept_steer_tab_library")
    page.shoot("library")


def test_a_published_table_is_imported(page: Page, vectors, tmp_path):
    table, names = tmp_path / "published.pt", tmp_path / "names.json"
    torch.save({"weight": torch.randn(192 * 2 * 2, 2)}, table)
    names.write_text(json.dumps({"glad": 0, "sad": 1}))
    page.tab("Concept Steer")
    page.inner_tab("Import")
    page.page.click("#concept_steer_import")
    page.wait_for("concept_steer_imported", "both files")
    page.page.set_input_files("#concept_steer_table input[type=file]", table)
    page.page.set_input_files("#concept_steer_names input[type=file]", names)
    page.page.wait_for_timeout(3000)
    page.choose("concept_steer_family", "demo")
    page.number("concept_steer_height", 2)
    page.number("concept_steer_width", 2)
    page.write("concept_steer_prefix", "their ")
    page.page.click("#concept_steer_import")
    assert "their glad, their sad" in page.wait_for("concept_steer_imported", "vectors saved")
    assert ConceptVector.load(vectors / "their sad.safetensors").tensor.shape == (192, 2, 2)


def draw(page: Page, prompt: str, **numbers: Any) -> str:
    """Generate; what the page says about the picture."""
    page.page.fill("#txt2img_prompt textarea", prompt)
    for name, value in {"steps": 8, "width": 128, "height": 128, "cfg_scale": 3, "seed": 7, **numbers}.items():
        page.number(f"txt2img_{name}", value)
    page.page.evaluate("() => { document.querySelector('#html_info_txt2img').innerText = '' }")
    page.page.click("#txt2img_generate")
    return page.wait_for("html_info_txt2img", "Seed: 7")


def test_the_accordion_steers_and_a_picture_s_settings_are_pasted_back(page: Page):
    page.tab("txt2img")
    page.open(f"{SCRIPT}_accordion")
    page.check(f"{SCRIPT}_enabled")
    page.page.click(f"#{SCRIPT}_refresh_1")
    page.page.wait_for_timeout(3000)
    page.choose(f"{SCRIPT}_vector_1", "one")
    page.number(f"{SCRIPT}_strength_1", 0.8)
    page.wait_for(f"{SCRIPT}_said", "Steers with one x 0.8")
    info = draw(page, "a doctor")
    assert 'Concept Steer: "concept:one:0.8"' in info
    page.page.locator(f"#{SCRIPT}_accordion").scroll_into_view_if_needed()
    page.shoot("accordion")
    page.page.fill("#txt2img_prompt textarea", info.replace("concept:one:0.8", "concept:two:-0.5:start=0.2"))
    page.page.click("#paste")
    page.wait_for(f"{SCRIPT}_said", "Steers with two x -0.5 from 20%")
    assert page.chosen(f"{SCRIPT}_vector_1") == "two" and page.is_checked(f"{SCRIPT}_enabled")
    assert (page.number_of(f"{SCRIPT}_strength_1"), page.number_of(f"{SCRIPT}_start_1")) == (-0.5, 0.2)
    page.page.uncheck(f"#{SCRIPT}_enabled input[type=checkbox]")
    page.wait_for(f"{SCRIPT}_said", "Off")


def test_a_card_puts_its_tag_into_the_prompt(page: Page):
    page.tab("txt2img")
    page.page.fill("#txt2img_prompt textarea", "a doctor")
    page.page.locator("#txt2img_extra_tabs button:text-is('Concepts')").first.click()
    page.page.click("#txt2img_concepts_extra_refresh")
    page.page.wait_for_selector("#txt2img_concepts_cards .card:has-text('two')")
    card = page.page.locator("#txt2img_concepts_cards .card[data-name='one']").first
    page.shoot("cards")
    card.click()
    page.page.wait_for_function(
        "() => document.querySelector('#txt2img_prompt textarea').value.includes('<concept:one:1>')"
    )
    page.page.locator("#txt2img_extra_tabs button:text-is('Generation')").first.click()
    assert "Concept Steer:" not in draw(page, "a doctor")  # the accordion is off
