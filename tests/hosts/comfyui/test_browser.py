"""ComfyUI's own page in a headless Chromium: a workflow runs there, and errors reach the user's eyes.

Needs the Python package playwright (without its browser download) and a Chromium; skipped, visibly, without them.
CONCEPT_STEER_SCREENSHOTS names a folder to keep the screenshots in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import host as hosts
from .client import Client
from .graphs import Graph
from .vectors import random_vector

LIMIT = 600_000  # milliseconds
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WORDS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # words on the nodes also when the whole graph is in sight
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,  # the same in older versions
}
READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types['ConceptSteer']"
RUN = """() => {
    window.ended = null
    window.previews = 0
    const api = window.app.api
    api.addEventListener('execution_success', () => { window.ended = 'success' })
    api.addEventListener('execution_error', e => { window.ended = e.detail.exception_message })
    api.addEventListener('b_preview', () => { window.previews += 1 })
    window.app.queuePrompt(0, 1)
}"""
FIT = "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"


@pytest.fixture(scope="module")
def browser(host) -> Iterator[Any]:
    reason = "the browser tests need the Python package playwright: pip install playwright (no browser download)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"the browser tests need one of {', '.join(PROGRAMS)} on the PATH, e.g. apt install chromium")
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=program, args=WORDS)
        try:
            yield found
        finally:
            found.close()


@pytest.fixture
def page(browser, server, client: Client) -> Iterator[Any]:
    """ComfyUI's page, ready, with an empty queue."""
    for name, value in SETTINGS.items():
        client.post(f"/settings/{name}", value)
    found = browser.new_page(viewport={"width": 2400, "height": 1250})
    found.set_default_timeout(LIMIT)
    try:
        found.goto(server.url)
        found.wait_for_function(READY)
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("CONCEPT_STEER_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shoot(page: Any, path: Path) -> None:
    """All nodes in sight, pictures loaded."""
    page.evaluate(FIT)
    page.wait_for_timeout(3000)
    page.screenshot(path=path)
    assert path.stat().st_size > 20_000


def texts(page: Any) -> str:
    return page.evaluate("() => document.body.innerText")


@pytest.mark.slow
def test_learn_and_steer_runs_in_the_page(page, shots):
    workflow = json.loads((hosts.ROOT / "example_workflows" / "2_learn_and_steer.json").read_text(encoding="utf-8"))
    page.evaluate("async workflow => { await window.app.loadGraphData(workflow) }", workflow)
    assert page.evaluate("() => window.app.graph._nodes.length") == len(workflow["nodes"])
    assert page.evaluate("() => window.app.graph._nodes.every(node => !node.has_errors)")
    assert page.evaluate("() => window.app.graph._nodes.map(node => node.type)") == [
        n["type"] for n in workflow["nodes"]
    ]
    shoot(page, shots / "1_loaded.png")
    page.evaluate(RUN)
    page.wait_for_function("() => window.previews > 1 || window.ended")
    shoot(page, shots / "2_learning.png")
    page.wait_for_function("() => window.ended")
    assert page.evaluate("() => window.ended") == "success"
    shoot(page, shots / "3_done.png")
    shown = page.evaluate("() => window.app.graph._nodes.filter(node => node.imgs?.length).map(node => node.type)")
    assert {"ConceptSteerLearnPrompts", "ConceptSteerInfo", "ConceptSteerJudge", "PreviewImage"} <= set(shown)


def test_a_vector_of_another_family_ends_in_a_dialog_with_its_words(page, shots, vectors):
    random_vector(31, "sd1", 1280).save(vectors / "woman for SD.safetensors", overwrite=True)
    page.reload()  # the list of vectors is read when the page is
    page.wait_for_function(READY)
    g = Graph()
    demo = g.demo()
    g.picture(demo, g.steer(demo, g.vector(_choice(page, "woman for SD"))))
    page.evaluate("async graph => { await window.app.loadApiJson(graph, 'wrong family') }", dict(g))
    page.evaluate(RUN)
    page.wait_for_function("() => window.ended")
    page.wait_for_function("() => document.body.innerText.includes('Stable Diffusion 1.x (sd1)')")
    page.screenshot(path=shots / "4_wrong_family.png")
    assert "this model is the embedded demo model (demo)" in texts(page)


def test_a_missing_vector_is_named_before_anything_runs(page, shots, vectors):
    path = vectors / "soon gone.safetensors"
    random_vector(32).save(path, overwrite=True)
    page.reload()
    page.wait_for_function(READY)
    g = Graph()
    demo = g.demo()
    g.picture(demo, g.steer(demo, g.vector(_choice(page, "soon gone"))))
    path.unlink()
    page.evaluate("async graph => { await window.app.loadApiJson(graph, 'missing') }", dict(g))
    page.evaluate("() => { window.app.queuePrompt(0, 1) }")
    page.wait_for_function("() => document.body.innerText.includes('no concept vector')")
    page.screenshot(path=shots / "5_missing.png")
    assert "soon gone" in texts(page)


def test_the_help_page_of_a_node_opens_beside_the_graph(page, shots):
    """ComfyUI's own help panel shows the page of web/docs."""
    page.evaluate("async graph => { await window.app.loadApiJson(graph, 'help') }", {"1": _STEER})
    page.evaluate(FIT)
    page.evaluate("() => window.app.canvas.selectNode(window.app.graph._nodes[0])")
    page.wait_for_timeout(1500)
    page.locator("[data-testid='info-button'], .selection-toolbox .pi-info-circle").first.click(timeout=30_000)
    page.wait_for_function("() => document.body.innerText.includes('Connect it between the model loader and any')")
    page.wait_for_timeout(1000)
    page.screenshot(path=shots / "6_help.png")


_STEER = {
    "class_type": "ConceptSteer",
    "inputs": {"strength": 1.0, "start": 0.0, "end": 1.0, "fade": 0.0, "operator": "add", "rows": "prompt"},
}


def _choice(page: Any, name: str) -> str:
    """How the page lists a vector: its name and digits."""
    listed = page.evaluate(
        """async () => {
            const info = await (await fetch('/object_info/ConceptSteerLoadVector')).json()
            const [kind, options] = info.ConceptSteerLoadVector.input.required.name
            return kind === 'COMBO' ? options.options : kind
        }"""
    )
    return next(choice for choice in listed if choice.startswith(f"{name} ["))
