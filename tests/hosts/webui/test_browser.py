"""AUTOMATIC1111's own page in a headless Chromium: accordion, cards, learning with progress, library and import."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from concept_steer.geom_erasing import LocationTokens
from concept_steer.vector import ConceptVector

from .client import Client
from .pages import SCRIPT, WATCH, Page, folder_of_shots, opened
from .test_erasing import COUNT, MARKED, marked  # noqa: F401

pytestmark = pytest.mark.usefixtures("known")


@pytest.fixture(scope="module")
def ui() -> str:
    """Which web UI; begins the screenshots' names."""
    return "webui"


@pytest.fixture(scope="module")
def page(server, ui: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    watched = Client(server.url).options(live_previews_enable=True, show_progress_every_n_steps=1)
    with opened() as browser, watched:  # in this order: without a browser the options are not touched
        yield Page(browser, server.url, ui, folder_of_shots(tmp_path_factory.mktemp("screenshots")))


def test_a_vector_is_learned_with_progress_and_live_preview(page: Page, vectors):
    page.tab("Concept Steer")
    page.inner_tab("Learn")
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


def test_erasing_is_learned_on_the_page_from_pictures_and_their_captions(page: Page, base, marked, tmp_path):  # noqa: F811
    for number, sent in enumerate(marked):
        (tmp_path / f"{number}.png").write_bytes(base64.b64decode(sent))
        (tmp_path / f"{number}.txt").write_text("a doctor", encoding="utf-8")
    page.tab("Concept Steer")
    page.inner_tab("Learn erasing")
    page.page.set_input_files("#concept_steer_erase_files input[type=file]", sorted(tmp_path.iterdir()))
    page.wait_for("concept_steer_erase_files", "9")
    page.choose("concept_steer_erase_detector", "demo-watermark")
    page.write("concept_steer_erase_name", "of-the-page")
    page.check("concept_steer_erase_overwrite")
    page.number("concept_steer_erase_steps", 12)
    page.page.evaluate(WATCH.replace("#concept_steer_results", "#concept_steer_erase_results"))
    page.page.click("#concept_steer_erase_start")
    page.page.wait_for_selector("#concept_steer_erase_results .livePreview img", state="attached")
    page.shoot("erasing")
    said = page.wait_for("concept_steer_erase_said", "Saved: embeddings/of-the-page.safetensors.")
    assert (
        f"'watermark' was found in {MARKED} of {COUNT} pictures" in said
        and "of-the-page in the negative prompt" in said
    )
    page.page.wait_for_selector("#concept_steer_erase_gallery img")
    page.page.mouse.wheel(0, -5000)
    page.shoot("erased")
    bars, pictures = page.page.evaluate("() => [window.bars, window.pictures]")
    assert any("step " in text for text in bars) and pictures > 0, bars
    assert LocationTokens.load(base / "embeddings" / "of-the-page.safetensors").concept == "watermark"
    page.write("concept_steer_erase_name", "../outside")
    page.page.click("#concept_steer_erase_start")
    assert "cannot be the name" in page.wait_for("concept_steer_erase_said", "outside")


def test_interrupt_on_the_page_keeps_the_best_so_far(page: Page, vectors):
    page.tab("Concept Steer")
    page.inner_tab("Learn")
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
    page.inner_tab("Learn")
    page.write("concept_steer_name", "../outside")
    page.page.click("#concept_steer_start")
    assert "it is a path" in page.wait_for("concept_steer_said", "outside")


def test_the_library_shows_all_that_a_file_says(page: Page, base):
    page.tab("Concept Steer")
    page.inner_tab("Library")
    page.page.click("#concept_steer_refresh")
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
    page.wait_for("concept_steer_table", table.stem)  # gradio 4 cuts names in two
    page.wait_for("concept_steer_names", names.stem)
    page.choose("concept_steer_family", "demo")
    page.number("concept_steer_height", 2)
    page.number("concept_steer_width", 2)
    page.write("concept_steer_prefix", "their ")
    page.page.click("#concept_steer_import")
    assert "their glad, their sad" in page.wait_for("concept_steer_imported", "vectors saved")
    assert ConceptVector.load(vectors / "their sad.safetensors").tensor.shape == (192, 2, 2)
    page.page.click("#concept_steer_import")
    said = page.wait_for("concept_steer_imported", "'their glad' already")
    assert said.strip().startswith("published.pt: ")  # not where the web UI has put it


NUMBERS = {"steps": 8, "width": 128, "height": 128, "cfg_scale": 3}


def draw(page: Page, seed: int) -> str:
    """Generate with a seed that the page has not drawn yet; what it says about the picture.

    Nothing on the page is cleared by hand: gradio would no longer find the elements it writes into.
    """
    for name, value in {**NUMBERS, "seed": seed}.items():
        page.number(f"txt2img_{name}", value)
    page.page.click("#txt2img_generate")
    said = page.wait_for("html_info_txt2img", f"Seed: {seed},")
    page.page.wait_for_selector("#txt2img_interrupt", state="hidden")
    return said


def by_api(client: Client, info: str, settings: Any = None, **over: Any) -> str:
    """A digest of what the API draws with the numbers of the page and the sampler that stands under its picture."""
    sampler = re.search(r"Sampler: ([^,]+), Schedule type: ([^,]+)", info)
    assert sampler, info
    return client.draw(settings, sampler_name=sampler[1], scheduler=sampler[2], **NUMBERS, **over).pictures[0]


def test_the_accordion_steers_and_a_picture_s_settings_are_pasted_back(page: Page, client):
    page.tab("txt2img")
    page.page.fill("#txt2img_prompt textarea", "a doctor")
    page.open(f"{SCRIPT}_accordion")
    page.check(f"{SCRIPT}_enabled")
    page.page.click(f"#{SCRIPT}_refresh_1")
    page.choose(f"{SCRIPT}_vector_1", "one")
    page.number(f"{SCRIPT}_strength_1", 0.8)
    page.check(f"{SCRIPT}_safety")
    page.wait_for(f"{SCRIPT}_said", "Steers with one x 0.8")
    page.wait_for(f"{SCRIPT}_said", "Safety standard")
    info = draw(page, seed=7)
    assert 'Concept Steer: "concept:one:0.8 | safety:standard"' in info
    settings = {"rows": [{"vector": "one", "strength": 0.8}], "safety": "standard"}
    assert page.picture() == by_api(client, info, settings) != by_api(client, info)
    page.page.locator(f"#{SCRIPT}_accordion").scroll_into_view_if_needed()
    page.shoot("accordion")
    page.uncheck(f"{SCRIPT}_safety")
    page.page.fill("#txt2img_prompt textarea", info.replace("concept:one:0.8", "concept:two:-0.5:start=0.2"))
    page.page.click("#paste")
    page.wait_for(f"{SCRIPT}_said", "Steers with two x -0.5 from 20%")
    assert page.chosen(f"{SCRIPT}_vector_1") == "two" and page.is_checked(f"{SCRIPT}_enabled")
    assert page.is_checked(f"{SCRIPT}_safety")
    assert (page.number_of(f"{SCRIPT}_strength_1"), page.number_of(f"{SCRIPT}_start_1")) == (-0.5, 0.2)
    page.shoot("pasted")
    page.uncheck(f"{SCRIPT}_enabled")
    page.uncheck(f"{SCRIPT}_safety")
    page.wait_for(f"{SCRIPT}_said", "Off")


def test_a_click_on_a_card_puts_its_tag_into_the_prompt_and_the_picture_is_steered(page: Page, client):
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
    info = draw(page, seed=8)
    assert "<concept:one:1>" in info and "Concept Steer:" not in info  # the accordion is off
    assert (
        page.picture()
        == by_api(client, info, prompt="a doctor <concept:one:1>", seed=8)
        != by_api(client, info, seed=8)
    )
    page.shoot("drawn")
