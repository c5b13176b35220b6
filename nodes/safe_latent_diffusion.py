"""Safe Latent Diffusion on a MODEL, and as a guider for SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..concept_steer.guidance.safe_latent_diffusion import PRESETS, SAFETY_TEXT, SafeLatentDiffusion
from .common import schema

CUSTOM = "custom"
ALIASES = ["sld", "safety", "nsfw filter", "safe", "content filter", "negative concept"]


def _text() -> Any:
    return io.String.Input(
        "text",
        default=SAFETY_TEXT,
        multiline=True,
        tooltip="What the picture is kept away from. Write your own list; the first words count most.",
    )


def _settings() -> list[Any]:
    medium = PRESETS["medium"]
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, CUSTOM],
            default="medium",
            tooltip="How strongly: the four published settings. custom uses the five numbers at the bottom.",
        ),
        io.Int.Input(
            "every",
            default=medium.every,
            min=1,
            max=10,
            tooltip="1 is the published method: half again the work per step. 2 or more looks at the safety text at "
            "every second (third, ...) step only and keeps its direction in between: faster, but less exact.",
        ),
        io.Float.Input(
            "warmup",
            default=medium.warmup,
            min=0.0,
            max=50.0,
            step=0.5,
            tooltip="Only with custom: how many steps of 50 pass before safety acts. 0 acts from the start.",
        ),
        io.Float.Input(
            "scale",
            default=medium.scale,
            min=0.0,
            max=10000.0,
            step=10.0,
            tooltip="Only with custom: how strongly it acts where the prompt leans towards the text; 0 is off.",
        ),
        io.Float.Input(
            "threshold",
            default=medium.threshold,
            min=-1.0,
            max=5.0,
            step=0.005,
            tooltip="Only with custom: higher acts on more of the picture, 1 on nearly all of it.",
        ),
        io.Float.Input(
            "momentum",
            default=medium.momentum,
            min=0.0,
            max=0.95,
            step=0.05,
            tooltip="Only with custom: how much the direction of earlier steps adds.",
        ),
        io.Float.Input(
            "beta",
            default=medium.beta,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Only with custom: how long the momentum remembers.",
        ),
    ]


def settings_of(preset: str, every: int, text: str = SAFETY_TEXT, **numbers: float) -> SafeLatentDiffusion:
    """The settings a node's widgets mean. Errors: SettingError."""
    if preset == CUSTOM:
        return SafeLatentDiffusion(text=text, every=every, **numbers)
    return SafeLatentDiffusion.preset(preset, text=text, every=every)


class SafeLatentDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerSafeLatentDiffusion",
            display_name="Safe Latent Diffusion",
            description="Keeps pictures away from what a text names, while they are drawn: the same prompt and seed, "
            "and no black squares. For any sampler, and together with Concept Steer.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x, SDXL or demo model."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint; it reads the safety text."),
                _text(),
                *_settings(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The safer model, for any sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, **settings: Any) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_guidance import safe_model

        return io.NodeOutput(safe_model(model, clip, settings_of(**settings)))


class SafeLatentDiffusionGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerSafeLatentDiffusionGuider",
            display_name="Safe Latent Diffusion Guider",
            description="Safe Latent Diffusion for SamplerCustomAdvanced, with the safety text as a conditioning of "
            "its own: give it areas, masks, ControlNets or hooks as you would a prompt.",
            search_aliases=[*ALIASES, "guider"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x, SDXL or demo model."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it may be empty."),
                io.Conditioning.Input("safety", tooltip="The encoded text of what is unwanted."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="How closely to follow the prompt."
                ),
                *_settings(),
            ],
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, safety: Any, cfg: float, **settings: Any
    ) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_guidance import guider_of

        return io.NodeOutput(guider_of(model, positive, negative, safety, cfg, settings_of(**settings)))


NODES = [SafeLatentDiffusionModel, SafeLatentDiffusionGuider]
