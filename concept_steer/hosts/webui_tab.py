"""The web UI's tab "Concept Steer": learn vectors, learn to erase, audit the checkpoint, the library, import tables."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
from modules import shared, ui
from modules.call_queue import wrap_gradio_gpu_call
from PIL import Image

from ..describe import lines
from ..errors import ConceptSteerError
from ..family import FAMILIES
from ..importer import import_table
from ..learn.request import METHODS, MOST_EXAMPLES, MOST_PIXELS, MOST_STEPS, PICTURES, LearnRequest
from ..vector import ConceptVector
from . import webui
from .webui_audit import EXTENTS, audit_loaded, usual_text
from .webui_learning import learn
from .webui_page import element, failed, files_field, in_html, path_of, paths_of, shown_path, slider
from .webui_tab_erasing import erasing_panel

USUAL = LearnRequest()
NEUTRAL = "a doctor\na detective\na scientist\na villain"
POSITIVE = "a woman doctor\na woman detective\na woman scientist\na woman villain"
WORDS = {words: method for method, words in METHODS.items()}


def build() -> list[tuple[Any, str, str]]:
    """on_ui_tabs: the tab, its title and its element's id."""
    with gr.Blocks(analytics_enabled=False) as tab, gr.Tabs(elem_id="concept_steer_tabs"):
        with gr.TabItem("Learn", elem_id="concept_steer_tab_learn"):
            _learn_panel()
        with gr.TabItem("Learn erasing", elem_id="concept_steer_tab_erase"):
            erasing_panel()
        with gr.TabItem("Audit", elem_id="concept_steer_tab_audit"):
            _audit_panel()
        with gr.TabItem("Library", elem_id="concept_steer_tab_library"):
            _library_panel()
        with gr.TabItem("Import", elem_id="concept_steer_tab_import"):
            _import_panel()
    return [(tab, "Concept Steer", "concept_steer")]


def _learn_panel() -> None:
    task = gr.Textbox(visible=False)  # the script puts the task's id in its place
    with gr.Row():
        with gr.Column():
            method = gr.Radio(list(WORDS), value=METHODS[USUAL.method], label="Way to learn", elem_id=element("method"))
            with gr.Group() as prompts:
                neutral = gr.Textbox(
                    NEUTRAL, lines=4, label="Prompts without the concept, one a line", elem_id=element("neutral")
                )
                positive = gr.Textbox(
                    POSITIVE,
                    lines=4,
                    label="The same prompts with the concept, line by line",
                    elem_id=element("positive"),
                )
            with gr.Group(visible=False) as pictures:
                shown = files_field("5 to 20 pictures of the concept", "pictures")
                without = files_field("Pictures of the same without the concept, if you have some", "without")
                prompt = gr.Textbox(
                    "a person", label="What the pictures show, without the concept", elem_id=element("prompt")
                )
            name = gr.Textbox("", label="Name in the library (empty: the first prompt)", elem_id=element("name"))
            overwrite = gr.Checkbox(False, label="Overwrite a vector of that name", elem_id=element("overwrite"))
            with gr.Row():
                steps = gr.Slider(
                    0, MOST_STEPS, USUAL.steps, step=1, label="Most steps (0: as usual)", elem_id=element("steps")
                )
                examples = slider("examples", 2, MOST_EXAMPLES, USUAL.examples, "Noisy pictures to learn from")
            with gr.Row():
                seed = gr.Number(USUAL.seed, precision=0, label="Seed of learning", elem_id=element("seed"))
                size = slider("size", 0, MOST_PIXELS, USUAL.size, "Side of the pictures (0: the model's own)", 64)
            spatial = gr.Checkbox(
                USUAL.spatial,
                label="A map over the picture at once (off: only where one value per channel says too little)",
                elem_id=element("spatial"),
            )
            with gr.Row():
                start = gr.Button("Learn", variant="primary", elem_id=element("start"))
                interrupt = gr.Button("Interrupt, keep the best so far", elem_id=element("interrupt"))
        with gr.Column(elem_id=element("results")):
            gallery = gr.Gallery(
                label="Before and after, and the curve",
                columns=1,
                height=640,
                object_fit="contain",
                elem_id=element("gallery"),
            )
            said = gr.HTML("", elem_id=element("said"))
    method.change(lambda chosen: _sides(WORDS[chosen]), [method], [prompts, pictures], show_progress=False)
    given = [method, neutral, positive, shown, without, prompt, name, overwrite, steps, examples, seed, size, spatial]
    start.click(
        wrap_gradio_gpu_call(_learn, extra_outputs=[None]),
        _js="conceptSteerLearn",
        inputs=[task, *given],
        outputs=[gallery, said],
        show_progress=False,
    )
    interrupt.click(lambda: shared.state.interrupt(), [], [])


def _learn(
    task: str,
    method: str,
    neutral: str,
    positive: str,
    shown: Any,
    without: Any,
    prompt: str,
    name: str,
    overwrite: bool,
    steps: float,
    examples: float,
    seed: float,
    size: float,
    spatial: bool,
) -> tuple[list[Image.Image], str]:
    """Pictures and words; what the user did wrong is said there, in words."""
    by_pictures = WORDS[method] == PICTURES
    sets = {"pictures": paths_of(shown), "without": paths_of(without)} if by_pictures else {}
    try:
        request = LearnRequest(
            WORDS[method],
            "" if by_pictures else neutral,
            "" if by_pictures else positive,
            prompt.strip() if by_pictures else "",
            int(steps),
            int(examples),
            int(seed),
            size=int(size),
            spatial=spatial,
        )
        done = learn(request, name.strip(), overwrite=overwrite, into=webui.library(), **sets)
    except ConceptSteerError as error:
        return [], failed(error, *(file for files in sets.values() for file in files))
    return done.pictures, in_html(done.words())


def _audit_panel() -> None:
    task = gr.Textbox(visible=False)
    with gr.Row():
        with gr.Column():
            gr.HTML(
                "What this checkpoint takes for granted when a prompt names a role and nothing else, read from inside "
                "the model: a page with charts and figures in the folder of outputs."
            )
            words = gr.Textbox(
                "", lines=12, label="List of words, YAML or JSON (empty: the usual one)", elem_id=element("audit_words")
            )
            fill = gr.Button("Put the usual list there, to edit it", elem_id=element("audit_fill"))
            extent = gr.Radio(list(EXTENTS), value=next(iter(EXTENTS)), label="Extent", elem_id=element("audit_extent"))
            with gr.Row():
                start = gr.Button("Audit this checkpoint", variant="primary", elem_id=element("audit_start"))
                interrupt = gr.Button("Interrupt", elem_id=element("audit_interrupt"))
        with gr.Column(elem_id=element("audit_results")):
            gallery = gr.Gallery(
                label="Defaults by role", columns=1, height=640, object_fit="contain", elem_id=element("audit_gallery")
            )
            files = gr.File(
                label="The page, its figures and charts", file_count="multiple", elem_id=element("audit_files")
            )
            said = gr.HTML("", elem_id=element("audit_said"))
    fill.click(_usual_words, [], [words, said], show_progress=False)
    start.click(
        wrap_gradio_gpu_call(_audit, extra_outputs=[None, None]),
        _js="conceptSteerAudit",
        inputs=[task, words, extent],
        outputs=[gallery, files, said],
        show_progress=False,
    )
    interrupt.click(lambda: shared.state.interrupt(), [], [])


def _usual_words() -> tuple[Any, str]:
    try:
        return usual_text(), ""
    except ConceptSteerError as error:
        return gr.update(), failed(error)


def _audit(task: str, words: str, extent: str) -> tuple[list[Image.Image], list[str] | None, str]:
    try:
        done = audit_loaded(words, EXTENTS[extent])
    except ConceptSteerError as error:
        return [], None, failed(error)
    text = f"{done.found.summary()}\nThe page: {shown_path(done.files[0])}"
    return [done.picture], [str(file) for file in done.files], in_html(text)


def _library_panel() -> None:
    with gr.Row():
        with gr.Column():
            with gr.Row():
                chosen = gr.Dropdown(webui.names(), label="Vector", elem_id=element("vector"))
                ui.create_refresh_button(chosen, lambda: None, lambda: {"choices": webui.names()}, element("refresh"))
            gr.HTML(in_html("Folders:\n" + "\n".join(map(shown_path, webui.library().folders))))
        with gr.Column():
            card = gr.HTML("", elem_id=element("card"))
            picture = gr.Image(label="Preview", interactive=False, elem_id=element("preview"))
    chosen.change(_about, [chosen], [card, picture], show_progress=False)


def _about(name: str | None) -> tuple[str, Image.Image | None]:
    """A table of all that a vector's file says, and its preview."""
    if not name:
        return "", None
    try:
        entry = webui.library().find(name)
        found = lines(ConceptVector.load(entry.path), Path(shown_path(entry.path)))
    except ConceptSteerError as error:
        return failed(error), None
    rows = "".join(f"<tr><th>{html.escape(label)}</th><td>{in_html(value)}</td></tr>" for label, value in found)
    preview = entry.path.with_suffix(".png")
    return f"<table>{rows}</table>", Image.open(preview).convert("RGB") if preview.is_file() else None


def _import_panel() -> None:
    gr.HTML(
        "Vectors that others published as one table: a .pt, .pth or .safetensors file with a column per concept, and a "
        "JSON file that names the columns. No code in them is run."
    )
    with gr.Row():
        table = gr.File(label="Table", file_types=[".pt", ".pth", ".safetensors"], elem_id=element("table"))
        names = gr.File(label="Names (JSON)", file_types=[".json"], elem_id=element("names"))
    with gr.Row():
        families = gr.Dropdown(list(FAMILIES), value="sd1", label="Learned on", elem_id=element("family"))
        height = gr.Number(8, precision=0, label="Height of the map (8 for 512 pixels)", elem_id=element("height"))
        width = gr.Number(8, precision=0, label="Width of the map", elem_id=element("width"))
        prefix = gr.Textbox("", label="Put before each name", elem_id=element("prefix"))
    go = gr.Button("Import", variant="primary", elem_id=element("import"))
    said = gr.HTML("", elem_id=element("imported"))
    go.click(_import, [table, names, families, height, width, prefix], [said])


def _import(table: Any, names: Any, family: str, height: float, width: float, prefix: str) -> str:
    if table is None or names is None:
        return failed(ConceptSteerError("Give both files: the table and the JSON file with the names of its columns."))
    table, names = path_of(table), path_of(names)
    try:
        made = import_table(
            table,
            names,
            height=int(height),
            width=int(width),
            family=family,
            out=webui.library(),
            prefix=prefix.lstrip(),
        )
    except ConceptSteerError as error:
        return failed(error, table, names)
    return in_html(f"{len(made)} vectors saved: {', '.join(vector.title for vector in made)}")


def _sides(method: str) -> list[Any]:
    """Which of the two groups of fields shows."""
    return [gr.update(visible=method != PICTURES), gr.update(visible=method == PICTURES)]
