"""The ComfyUI nodes: they translate between ComfyUI's sockets and `concept_steer`, and compute nothing."""

from __future__ import annotations

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError as error:
    raise ImportError(
        "Concept Steer needs ComfyUI 0.3.48 or newer (its V3 node API was not found): update ComfyUI. "
        "Your other nodes are not affected."
    ) from error

from . import (
    analyse,
    analyse_defaults,
    audit,
    demo,
    discover,
    erase_prompt,
    fair,
    latent_clip,
    latent_guard,
    learn,
    learn_erasing,
    optimise_noise,
    safe_latent_diffusion,
    safety,
    steer,
    strip,
    vectors,
)
from .common import register_folder


class ConceptSteerExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *demo.NODES,
            *vectors.NODES,
            *steer.NODES,
            *learn.NODES,
            *strip.NODES,
            *fair.NODES,
            *discover.NODES,
            *safe_latent_diffusion.NODES,
            *safety.NODES,
            *audit.NODES,
            *analyse_defaults.NODES,
            *analyse.NODES,
            *latent_clip.NODES,
            *optimise_noise.NODES,
            *latent_guard.NODES,
            *learn_erasing.NODES,
            *erase_prompt.NODES,
        ]


async def comfy_entrypoint() -> ConceptSteerExtension:
    register_folder()
    return ConceptSteerExtension()
