"""What diffusers, and with it the files of LoRAs, call the modules of Stable Diffusion's original UNetModel."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import unet_names

RESNET = {own: name for name, own in unet_names.RESNET.items()}
EDGES = {own: name for name, own in unet_names.HEAD.items()}


def diffusers_names(unet: nn.Module) -> dict[str, str]:
    """Names of the modules inside the UNet's blocks, and of those at its edges: own name -> its name in diffusers.

    Read from the blocks themselves, so that any depth, any number of blocks and any place of attention comes out right.
    """
    blocks: Any = unet
    there = {name for name, _ in unet.named_modules()}
    found = {own: name for own, name in EDGES.items() if own in there}
    for side, first in (("input", 1), ("output", 0)):
        prefix, level, place = "down" if side == "input" else "up", 0, 0
        for number, block in enumerate(getattr(blocks, f"{side}_blocks")):
            if number < first:
                continue
            for part, module in enumerate(block):
                own, stem = f"{side}_blocks.{number}.{part}", f"{prefix}_blocks.{level}"
                if hasattr(module, "in_layers"):
                    found |= _resnet(module, own, f"{stem}.resnets.{place}")
                elif hasattr(module, "transformer_blocks"):
                    found |= _inside(module, own, f"{stem}.attentions.{place}")
                else:  # it ends the level
                    found[f"{own}.{'op' if side == 'input' else 'conv'}"] = f"{stem}.{prefix}samplers.0.conv"
                    level, place = level + 1, -1
            place += 1
    for number, module in enumerate(blocks.middle_block):
        own = f"middle_block.{number}"
        if hasattr(module, "in_layers"):
            found |= _resnet(module, own, f"mid_block.resnets.{number // 2}")
        else:
            found |= _inside(module, own, "mid_block.attentions.0")
    return {own: name for own, name in found.items() if own in there}


def _resnet(module: nn.Module, own: str, name: str) -> dict[str, str]:
    return {f"{own}.{part}": f"{name}.{there}" for part, there in RESNET.items()}


def _inside(module: nn.Module, own: str, name: str) -> dict[str, str]:
    """Of a transformer: both layouts call its parts the same."""
    return {f"{own}.{part}": f"{name}.{part}" for part, _ in module.named_modules() if part}
