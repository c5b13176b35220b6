"""The tab's panel "Learn erasing": pictures and a detector become an embedding for negative prompts, or a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from modules import shared
from modules.call_queue import wrap_gradio_gpu_call
from PIL import Image

from ..errors import ConceptSteerError
from ..geom_erasing.detectors import KNOWN
from ..geom_erasing.request import MOST_BATCH, MOST_STEPS, WAYS, ErasingRequest
from ..learn.request import MOST_PIXELS
from .webui_erasing import CAPTION, erase
from .webui_page import SUFFIXES, element, failed, in_html, paths_of, slider

USUAL = ErasingRequest()
KEYS = {words: key for key, words in WAYS.items()}


def erasing_panel() -> None:
    task = gr.Textbox(visible=False)  # the script puts the task's id in its place
    with gr.Row():
        with gr.Column():
            gr.HTML(
                "What nobody asked for (watermarks, QR codes, text), learned from pictures in which a detector finds "
                "it. The checkpoint stays as it is."
            )
            files = gr.File(
                label="Pictures, some with the thing: at least 4, better 50; .txt files of their names are captions",
                file_count="multiple",
                file_types=[*SUFFIXES, CAPTION],
                elem_id=element("erase_files"),
            )
            captions = gr.Textbox(
                "",
                lines=2,
                label="What they show, one a line or one line for all; the thing itself is not named",
                elem_id=element("erase_captions"),
            )
            with gr.Row():
                detector = gr.Dropdown(
                    list(KNOWN), value=USUAL.detector, label="What looks for it", elem_id=element("erase_detector")
                )
                threshold = slider("erase_threshold", 0.05, 1, USUAL.threshold, "How sure it must be", 0.05)
            way = gr.Radio(list(KEYS), value=WAYS[USUAL.way], label="Way to erase", elem_id=element("erase_way"))
            with gr.Row():
                concept = gr.Textbox(
                    "", label="The thing in words (empty: as the detector calls it)", elem_id=element("erase_concept")
                )
                name = gr.Textbox("", label="Name of the files (empty: no-thing)", elem_id=element("erase_name"))
            overwrite = gr.Checkbox(False, label="Overwrite files of that name", elem_id=element("erase_overwrite"))
            with gr.Row():
                steps = slider("erase_steps", 1, MOST_STEPS, USUAL.steps, "Steps of learning")
                batch = slider("erase_batch", 1, MOST_BATCH, USUAL.batch, "Pictures a step")
            with gr.Row():
                bins = slider("erase_bins", 1, 8, USUAL.bins, "Places a side (4: 16 words for where it is)")
                rank = slider("erase_rank", 1, 256, USUAL.rank, "Rank of the LoRA, where there is one")
            with gr.Row():
                seed = gr.Number(USUAL.seed, precision=0, label="Seed of learning", elem_id=element("erase_seed"))
                size = slider("erase_size", 0, MOST_PIXELS, USUAL.size, "Side of the pictures (0: the model's own)", 64)
            with gr.Row():
                start = gr.Button("Learn erasing", variant="primary", elem_id=element("erase_start"))
                interrupt = gr.Button("Interrupt, keep what is learned", elem_id=element("erase_interrupt"))
        with gr.Column(elem_id=element("erase_results")):
            gallery = gr.Gallery(
                label="Before and after, and where it was found",
                columns=1,
                height=640,
                object_fit="contain",
                elem_id=element("erase_gallery"),
            )
            said = gr.HTML("", elem_id=element("erase_said"))
    given = [files, captions, detector, threshold, way, concept, name, overwrite, steps, batch, bins, rank, seed, size]
    start.click(
        wrap_gradio_gpu_call(_erase, extra_outputs=[None]),
        _js="conceptSteerErase",
        inputs=[task, *given],
        outputs=[gallery, said],
        show_progress=False,
    )
    interrupt.click(lambda: shared.state.interrupt(), [], [])


def _erase(
    task: str,
    files: Any,
    captions: str,
    detector: str,
    threshold: float,
    way: str,
    concept: str,
    name: str,
    overwrite: bool,
    steps: float,
    batch: float,
    bins: float,
    rank: float,
    seed: float,
    size: float,
) -> tuple[list[Image.Image], str]:
    """Pictures and words; what the user did wrong is said there, in words."""
    given: list[Path] = paths_of(files)
    try:
        request = ErasingRequest(
            detector,
            float(threshold),
            concept,
            captions,
            KEYS[way],
            int(bins),
            int(steps),
            int(batch),
            int(rank),
            int(seed),
            name.strip(),
            int(size),
        )
        done = erase(request, given, overwrite=overwrite)
    except ConceptSteerError as error:
        return [], failed(error, *given)
    return done.pictures, in_html(done.words())
