"""Names of a UNet's layers: diffusers' layout to the original latent-diffusion ("ldm") layout."""

from __future__ import annotations

import re

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
HEAD = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_key(key: str, blocks: int = 1, attention_up: tuple[bool, ...] = (False, False, False)) -> str:
    """The ldm name of one diffusers UNet key; `blocks` is layers_per_block, `attention_up` which up levels attend."""
    stem, _, kind = key.rpartition(".")
    if stem in HEAD:
        return f"{HEAD[stem]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)\.(weight|bias)", key):
        part, number, rest, kind = match.groups()
        if part == "attentions":
            return f"middle_block.1.{rest}.{kind}"
        return f"middle_block.{2 * int(number)}.{RESNET[rest]}.{kind}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        raise KeyError(f"{key} is not a key of a Stable-Diffusion-like UNet in diffusers' layout")
    side, level, part, number, rest, kind = match.groups()
    i, j = int(level), int(number)
    if part == "downsamplers":
        return f"input_blocks.{(i + 1) * (blocks + 1)}.0.op.{kind}"
    if part == "upsamplers":
        return f"output_blocks.{i * (blocks + 1) + blocks}.{2 if attention_up[i] else 1}.conv.{kind}"
    place = f"input_blocks.{1 + i * (blocks + 1) + j}" if side == "down" else f"output_blocks.{i * (blocks + 1) + j}"
    return f"{place}.1.{rest}.{kind}" if part == "attentions" else f"{place}.0.{RESNET[rest]}.{kind}"
