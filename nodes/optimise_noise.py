"""Optimise Noise (ReNO): the starting noise of a one-step or few-step model climbs a reward on its latents."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..concept_steer.errors import SettingError
from ..concept_steer.latent_clip import (
    Descent,
    NoiseResult,
    Reward,
    Snapshot,
    absence_reward,
    check_space,
    optimise_noise,
    own_copy,
    space_of,
    text_reward,
)
from ..concept_steer.learn.request import lines_of
from ..concept_steer.pictures import to_images
from ..concept_steer.plots import card
from .common import denoiser_of, schema, to_image_tensor
from .latent_clip import CLIP, Loaded

LIVE = 5  # iterations from one live picture to the next


class OptimisedNoise:
    """A NOISE for SamplerCustomAdvanced: the optimised one, for latents of the shape that it was optimised for."""

    def __init__(self, noise: torch.Tensor, seed: int) -> None:
        self.noise, self.seed = noise, seed

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        found = input_latent["samples"].shape
        if tuple(found) != tuple(self.noise.shape):
            raise SettingError(
                f"This noise was optimised for latents of {tuple(self.noise.shape)}, but the sampler has "
                f"{tuple(found)}: connect the same latent image to both."
            )
        return self.noise.to(input_latent["samples"].dtype)


class OptimiseNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerOptimiseNoise",
            display_name="Optimise Noise",
            description="Draws with a one-step or few-step model (Turbo, LCM, the demo model's student) and improves "
            "the starting noise of each picture until it fits the text, without decoding any. Interrupt keeps the best "
            "so far. The model stays as it is.",
            search_aliases=["ReNO", "reward", "noise optimization", "prompt adherence", "turbo"],
            inputs=[
                CLIP,
                io.Model.Input("model", tooltip="A model of one or a few steps, of the latent CLIP's latent space."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Latent.Input("latent_image", tooltip="Empty Latent Image: size and number of the pictures."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What is drawn."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="What the pictures are rewarded for. Empty: the prompt.",
                ),
                io.String.Input(
                    "absent",
                    multiline=True,
                    default="",
                    tooltip="One a line: what should not be in the picture, such as weapons. Empty: nothing.",
                ),
                io.Int.Input(
                    "start_seed", default=0, min=0, max=2**63 - 1, tooltip="Of the noise before, as in KSampler."
                ),
                io.Int.Input(
                    "iterations", default=50, min=1, max=1000, tooltip="Pictures drawn of each; published: 50."
                ),
                io.Int.Input("steps", default=1, min=1, max=8, tooltip="Of the model. More cost as much more."),
                io.Float.Input(
                    "rate",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How far the noise goes in a step. 0: as published (5 for 512 pixels), by size.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For live pictures of the best so far."),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The finished latents: decode them."),
                io.Noise.Output(display_name="NOISE", tooltip="The noise itself, for SamplerCustomAdvanced."),
                io.String.Output(display_name="report", tooltip="Rewards before and after, and the noise in figures."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        latent_clip: Loaded,
        model: Any,
        clip: Any,
        latent_image: dict[str, Any],
        prompt: str,
        text: str,
        absent: str,
        start_seed: int,
        iterations: int,
        steps: int,
        rate: float,
        vae: Any = None,
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise SettingError("There is no prompt to draw: type one into `prompt`.")
        denoiser = denoiser_of(model, clip, vae, 0)
        judge = latent_clip.clip
        check_space(judge.space, space_of(denoiser.family), f"The model ({denoiser.family})")
        empty = latent_image["samples"]
        start = comfy.sample.prepare_noise(empty, start_seed, latent_image.get("batch_index"))
        watch = _Watch(cls.hidden.unique_id, denoiser if vae is not None else None)
        found = optimise_noise(
            denoiser,
            [prompt] * len(empty),
            _rewards(own_copy(judge, denoiser.device), text.strip() or prompt, lines_of(absent), len(empty)),
            seeds=[start_seed] * len(empty),
            start_noise=start,
            settings=Descent(iterations, rate or Descent.rate_for(start.shape[1:])),
            steps=steps,
            progress=watch.at,
            stop=watch.asked,
        )
        latents = model.model.process_latent_out(found.latents)
        kept = {name: value for name, value in latent_image.items() if name not in ("noise_mask", "batch_index")}
        report = _report(found)
        lines = [(f"{i + 1}", line) for i, line in enumerate(report.splitlines())]
        shown: Any = ui.PreviewImage(to_image_tensor([card("optimised noise", lines, width=520)]), cls=cls)
        if watch.interrupted:  # let the rest of the graph stop, as the button asked
            comfy.model_management.interrupt_current_processing(True)
        return io.NodeOutput({**kept, "samples": latents}, OptimisedNoise(found.noise, start_seed), report, ui=shown)


def _rewards(judge: Any, text: str, absent: list[str], count: int) -> list[Reward]:
    rewards = [text_reward(judge, [text] * count)]
    return [*rewards, absence_reward(judge, absent)] if absent else rewards


def _report(found: NoiseResult) -> str:
    pairs = zip(found.before.tolist(), found.values.tolist(), found.at.tolist(), strict=True)
    rows = [f"reward {before:.3f} to {after:.3f}, at iteration {at}" for before, after, at in pairs]
    return "\n".join([*rows, *found.summary().splitlines()])


class _Watch:
    """Progress bar with live pictures, and ComfyUI's Interrupt button: it ends the search, the best is kept."""

    def __init__(self, node_id: Any, denoiser: Any) -> None:
        self.bar, self.denoiser, self.interrupted = comfy.utils.ProgressBar(100, node_id=node_id), denoiser, False

    def asked(self) -> bool:
        self.interrupted = self.interrupted or comfy.model_management.processing_interrupted()
        return self.interrupted

    def at(self, seen: Snapshot) -> None:
        if self.asked():
            return
        image = None
        if self.denoiser is not None and (seen.iteration % LIVE == 1 or seen.done == seen.total):
            image = ("JPEG", to_images(self.denoiser.decode(seen.best["latents"][:1]))[0], 512)
        try:
            self.bar.update_absolute(int(100 * seen.done / seen.total), 100, image)
        except comfy.model_management.InterruptProcessingException:
            self.interrupted = True  # the bar asks too; it must not throw away what has been found


NODES = [OptimiseNoise]
