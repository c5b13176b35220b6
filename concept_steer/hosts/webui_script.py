"""The accordion "Concept Steer" of txt2img and img2img, the prompt tag <concept:...>, and their callbacks.

Imported by scripts/concept_steer.py inside AUTOMATIC1111, Forge or reForge only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import gradio as gr
from modules import extra_networks, script_callbacks, scripts
from modules.ui_common import create_refresh_button

from ..errors import ConceptSteerError
from . import webui, webui_api, webui_cards, webui_fair, webui_xyz
from .webui_rows import MODES, SIDES, TAG
from .webui_safe_words import ON_LEVELS, WAYS, safety_to_controls
from .webui_schema import CONTROLS, NOTHING, ROWS, USUAL, Settings

VISIBLE = 2  # rows outside of "More vectors"


class ConceptSteerScript(scripts.Script):
    def title(self) -> str:
        return "Concept Steer"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The controls, in the order of CONTROLS. Called several times at start: it changes nothing."""
        made: dict[str, Any] = {}
        with gr.Accordion("Concept Steer", open=False, elem_id=self.elem_id("accordion")):
            made["enabled"] = gr.Checkbox(value=False, label="Enable", elem_id=self.elem_id("enabled"))
            said = gr.HTML(webui.sentence([]), elem_id=self.elem_id("said"))
            for i in range(1, VISIBLE + 1):
                self._row(made, i)
            with gr.Accordion("More vectors", open=False, elem_id=self.elem_id("more")):
                for i in range(VISIBLE + 1, ROWS + 1):
                    self._row(made, i)
            made["hires"] = gr.Slider(
                0, 2, value=1.0, step=0.05, label="Hires pass: strengths times", elem_id=self.elem_id("hires")
            )
            with gr.Accordion("Fair: balance an attribute", open=False, elem_id=self.elem_id("fair")):
                self._fair(made)
            self._safety(made)
        controls = [made[name] for name in CONTROLS]
        for control in controls:
            control.change(lambda *values: webui.sentence(values), controls, said, show_progress=False, queue=False)
        self.infotext_fields = [(made[name], _pasted(name)) for name in CONTROLS]
        self.paste_field_names: list[str] = []
        return controls

    def _row(self, made: dict[str, Any], i: int) -> None:
        """Two lines, so that a label and its number have room in the web UI's half of the page."""
        with gr.Row(elem_id=self.elem_id(f"row_{i}")):
            made[f"vector_{i}"] = gr.Dropdown(
                _choices(), value=NOTHING, label=f"Vector {i}", elem_id=self.elem_id(f"vector_{i}")
            )
            create_refresh_button(
                made[f"vector_{i}"], lambda: None, lambda: {"choices": _choices()}, self.elem_id(f"refresh_{i}")
            )
            made[f"rows_{i}"] = gr.Dropdown(
                list(SIDES), value=next(iter(SIDES)), label="Acts on", elem_id=self.elem_id(f"rows_{i}"), min_width=120
            )
        with gr.Row():
            for key, label, least, most, usual in (
                ("strength", "Strength", -3, 3, 1.0),
                ("start", "Start", 0, 1, 0.0),
                ("end", "End", 0, 1, 1.0),
            ):
                made[f"{key}_{i}"] = gr.Slider(
                    least, most, value=usual, step=0.01, label=label, elem_id=self.elem_id(f"{key}_{i}"), min_width=140
                )

    def _fair(self, made: dict[str, Any]) -> None:
        with gr.Row():
            made["fair_attribute"] = gr.Dropdown(
                _attributes(), value=NOTHING, label="Attribute", elem_id=self.elem_id("fair_attribute")
            )
            create_refresh_button(
                made["fair_attribute"], lambda: None, lambda: {"choices": _attributes()}, self.elem_id("fair_refresh")
            )
            made["fair_targets"] = gr.Textbox(
                value="",
                label="Target shares (empty: equal)",
                placeholder="woman=0.5,man=0.5",
                elem_id=self.elem_id("fair_targets"),
            )
        with gr.Row():
            made["fair_mode"] = gr.Dropdown(
                list(MODES), value=next(iter(MODES)), label="Shares", elem_id=self.elem_id("fair_mode")
            )
            made["fair_strength"] = gr.Slider(
                0, 3, value=1.0, step=0.05, label="Strength", elem_id=self.elem_id("fair_strength")
            )
            made["fair_seed"] = gr.Number(
                value=USUAL["fair_seed"], precision=0, label="Run seed (-1: as the first picture)",
                elem_id=self.elem_id("fair_seed"),
            )  # fmt: skip
            made["fair_first"] = gr.Number(
                value=0, precision=0, label="Number of the first picture", elem_id=self.elem_id("fair_first")
            )

    def _safety(self, made: dict[str, Any]) -> None:
        """Under the administrator's lock the box is ticked and stays so."""
        shown = safety_to_controls(webui.safety_at_start())
        free = webui.locked_level() is None
        with gr.Row():
            made["safety"] = gr.Checkbox(
                shown["safety"], label="Safety", interactive=free, elem_id=self.elem_id("safety"), min_width=100
            )
            made["safety_level"] = gr.Radio(
                list(ON_LEVELS), value=shown["safety_level"], label="Level", scale=4, min_width=320,
                elem_id=self.elem_id("safety_level"),
            )  # fmt: skip
        with gr.Row():
            made["safety_method"] = gr.Dropdown(
                list(WAYS), value=shown["safety_method"], label="Method", elem_id=self.elem_id("safety_method")
            )
            made["safety_categories"] = gr.Textbox(
                shown["safety_categories"],
                label="Categories (empty: all)",
                placeholder="violence, weapons",
                elem_id=self.elem_id("safety_categories"),
            )

    def process(self, p: Any, *args: Any) -> None:
        webui.process(p, args)

    def postprocess_batch(self, p: Any, *args: Any, images: Any = None, **more: Any) -> None:
        webui.withhold_unsafe(p, images)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        webui.finish(p, processed)


class ConceptTag(extra_networks.ExtraNetwork):
    """<concept:name:0.8:start=0.2:end=0.9:rows=cond> in a prompt or a hires prompt."""

    def __init__(self) -> None:
        super().__init__(TAG)

    def activate(self, p: Any, params_list: list[Any]) -> None:
        webui.use_tags(p, [params.items for params in params_list])

    def deactivate(self, p: Any) -> None:
        """Nothing: a job ends with its sampling, and this is not called after an exception."""


def register() -> None:
    """All callbacks of the extension; called by its script at every load of the web UI's scripts."""
    evaluations = webui.Evaluations()
    script_callbacks.on_cfg_denoiser(evaluations.before)
    script_callbacks.on_cfg_denoised(evaluations.after)
    script_callbacks.on_before_ui(_before_ui)
    script_callbacks.on_app_started(webui_api.add_routes)
    if find_spec("concept_steer.hosts.webui_settings") is not None:
        from . import webui_settings

        script_callbacks.on_ui_settings(webui_settings.on_ui_settings)
    if find_spec("concept_steer.hosts.webui_tab") is not None:
        from . import webui_tab

        script_callbacks.on_ui_tabs(webui_tab.build)
    webui_xyz.register()


def _before_ui() -> None:
    webui.own_folder().mkdir(parents=True, exist_ok=True)
    extra_networks.register_extra_network(ConceptTag())
    webui_cards.register()
    webui_xyz.register()


def _choices() -> list[str]:
    return [NOTHING, *webui.names()]


def _attributes() -> list[str]:
    return [NOTHING, *webui_fair.attributes()]


def _pasted(name: str) -> Callable[[dict[str, Any]], Any]:
    """What a control shows after settings were pasted; without ours, steering is switched off and the rest stays.

    Pasting never switches safety off.
    """

    def of(params: dict[str, Any]) -> Any:
        text = params.get(webui.INFO)
        if not text:
            return False if name == "enabled" else None
        try:
            settings = Settings.parsed(text)
            if name.startswith("safety") and not settings.safety.on:
                return None
            return settings.to_controls()[name]
        except ConceptSteerError as error:
            print(f"Concept Steer: {error}")
            return False if name == "enabled" else None

    return of
