"""Concept Strip: one vector at several strengths, several seeds, as one labelled picture."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..concept_steer.errors import SettingError
from ..concept_steer.hosts.comfy import steer_pictures
from ..concept_steer.pictures import grid
from ..concept_steer.steering import Steer
from .common import Vector, schema, to_image_tensor, to_pictures, vectors_of

RANDOM = ("ancestral", "sde", "lcm", "ddpm", "_cfg_pp")  # samplers that draw noise while sampling, for the whole batch


def strengths_of(text: str) -> list[float]:
    """Numbers between commas or spaces, at least one and at most 16. Errors: SettingError."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not 1 <= len(found) <= 16 or not all(-10 <= value <= 10 for value in found):
        raise SettingError(f"strengths is {text!r}; give 1 to 16 numbers from -10 to 10, such as -1, 0, 0.5, 1, 1.5.")
    return found


class ConceptStrip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerStrip",
            display_name="Concept Strip",
            description="Draws the same prompt and seeds at several strengths of a vector and puts them into one "
            "labelled picture: a row per seed, a column per strength.",
            search_aliases=["grid", "xy plot", "compare", "strength chart"],
            inputs=[
                io.Model.Input("model", tooltip="The model; its own steering stays on."),
                Vector.Input("vector", tooltip="The vector to look at."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Vae.Input("vae", tooltip="To see the pictures."),
                io.Latent.Input("latent", tooltip="Sets the size: connect Empty Latent Image."),
                io.String.Input("strengths", default="-1, 0, 0.5, 1, 1.5", tooltip="One column each."),
                io.Int.Input(
                    "first_seed", default=0, min=0, max=2**53, tooltip="The first row's seed; it is not changed."
                ),
                io.Int.Input("seeds", default=3, min=1, max=16, tooltip="How many rows."),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg", default=4.0, min=1.0, max=30.0, step=0.1, tooltip="How closely to follow the prompt."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(comfy.samplers.KSampler.SAMPLERS),
                    default="euler",
                    tooltip="The sampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.KSampler.SCHEDULERS),
                    default="normal",
                    tooltip="The schedule.",
                ),
            ],
            outputs=[io.Image.Output(display_name="strip", tooltip="The labelled picture.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vector: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        latent: Any,
        strengths: str,
        first_seed: int,
        seeds: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
    ) -> io.NodeOutput:
        columns = strengths_of(strengths)
        found = vectors_of(vector)
        size = latent["samples"][:1]
        noises = [comfy.sample.prepare_noise(size, first_seed + row) for row in range(seeds)]
        one_by_one = any(name in sampler_name for name in RANDOM)
        cells = [(row, column) for column in range(len(columns)) for row in range(seeds)]  # a column's seeds together
        most = seeds if one_by_one else _fitting(model, size.shape, len(cells))
        images: dict[tuple[int, int], Any] = {}
        for first in range(0, len(cells), most):
            part = cells[first : first + most]
            steers = [[Steer(one, columns[column]) for one in found] for _, column in part]
            empty = comfy.sample.fix_empty_latent_channels(model, size.repeat(len(part), 1, 1, 1))
            samples = comfy.sample.sample(
                steer_pictures(model, steers),
                torch.cat([noises[row] for row, _ in part]),
                steps,
                cfg,
                sampler_name,
                scheduler,
                positive,
                negative,
                empty,
                seed=first_seed,
            )
            images.update(zip(part, to_pictures(vae.decode(samples)), strict=True))
        rows = [[images[row, column] for column in range(len(columns))] for row in range(seeds)]
        picture = grid(
            rows,
            columns=[f"strength {value:g}" for value in columns],
            rows=[f"seed {first_seed + row}" for row in range(seeds)],
            title=" + ".join(one.name for one in found),
            cell=min(512, max(128, rows[0][0].width)),
        )
        tensor = to_image_tensor([picture])
        return io.NodeOutput(tensor, ui=ui.PreviewImage(tensor, cls=cls))


def _fitting(model: Any, shape: Any, wanted: int) -> int:
    """The largest batch up to `wanted` pictures whose two rows each fit into free memory, by ComfyUI's own estimate."""
    free = comfy.model_management.get_free_memory(model.load_device)
    while wanted > 1 and model.memory_required([2 * wanted, *shape[1:]]) * 1.2 > free:
        wanted = (wanted + 1) // 2
    return wanted


NODES = [ConceptStrip]
