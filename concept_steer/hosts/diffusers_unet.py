"""UNet2DConditionModel.forward in two halves, cut behind the mid block. Together they equal the whole bit for bit.

The stages and their order are those of diffusers' own `forward` (0.22 and later); only public members are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptSteerError
from ..family import detect


def family_of(unet: Any) -> tuple[str, int]:
    """(family key, channels of h) from the UNet's own config; ConceptSteerError when it has no mid block."""
    config = getattr(unet, "config", None)
    if config is None or not hasattr(config, "block_out_channels"):
        raise ConceptSteerError(f"Expected a diffusers UNet2DConditionModel, found {type(unet).__name__}.")
    if getattr(unet, "mid_block", None) is None:
        raise ConceptSteerError(
            "This UNet has no mid block (some distilled models drop it), so there is no h-space to steer. "
            "Use a model with a mid block, e.g. the one it was distilled from."
        )
    width = config.cross_attention_dim
    width = width[-1] if isinstance(width, (tuple, list)) else width
    channels = int(config.block_out_channels[-1])
    key = detect(cross_attention_dim=int(width), channels=channels, model_channels=int(config.block_out_channels[0]))
    return key, channels


def check_supported(unet: Any) -> None:
    """ConceptSteerError for layouts that the two halves do not cover, naming the feature."""
    config = unet.config
    found = []
    if config.in_channels != config.out_channels:
        found.append(f"{config.in_channels} input but {config.out_channels} output channels (an inpainting model?)")
    if getattr(unet, "class_embedding", None) is not None:
        found.append("class embeddings")
    if getattr(unet, "encoder_hid_proj", None) is not None:
        found.append("a projection of the prompt (an IP-Adapter is loaded, or a Kandinsky-like model)")
    if config.addition_embed_type not in (None, "text_time"):
        found.append(f"added conditions of type {config.addition_embed_type!r}")
    if found:
        raise ConceptSteerError(
            f"This UNet has {'; '.join(found)}: not supported for learning and analysis. "
            "Use a plain SD1, SD2 or SDXL text-to-image model; steering its pictures with `steer` works all the same."
        )


def unet_to_h(
    unet: Any, x: Tensor, t: float | Tensor, embeds: Tensor, added: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Encoder and mid block: x (B, C, H, W), t a timestep or (B,), embeds (B, L, D) -> (h, skips, time embedding)."""
    if unet.config.center_input_sample:
        x = 2 * x - 1.0
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t), None)
    extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=embeds, added_cond_kwargs=added)
    if extra is not None:
        emb = emb + extra
    if unet.time_embed_act is not None:
        emb = unet.time_embed_act(emb)
    sample = unet.conv_in(x)
    skips: tuple[Tensor, ...] = (sample,)
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": embeds} if getattr(block, "has_cross_attention", False) else {}
        sample, outputs = block(hidden_states=sample, temb=emb, **text)
        skips += tuple(outputs)
    text = {"encoder_hidden_states": embeds} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    return unet.mid_block(sample, emb, **text), skips, emb


def unet_from_h(unet: Any, h: Tensor, skips: tuple[Tensor, ...], emb: Tensor, embeds: Tensor) -> Tensor:
    """Decoder: what `unet_to_h` returned (h may be changed) -> prediction (B, C, H, W)."""
    # As in forward: odd sizes need the size of the next skip, because doubling does not give it back.
    factor = 2**unet.num_upsamplers
    odd = any(size % factor for size in skips[0].shape[-2:])
    sample = h
    last = len(unet.up_blocks) - 1
    for i, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        mine, skips = skips[-count:], skips[:-count]
        size = skips[-1].shape[2:] if odd and i != last else None
        text = {"encoder_hidden_states": embeds} if getattr(block, "has_cross_attention", False) else {}
        sample = block(hidden_states=sample, temb=emb, res_hidden_states_tuple=mine, upsample_size=size, **text)
    if unet.conv_norm_out is not None:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    return unet.conv_out(sample)


def time_ids(unet: Any, x: Tensor, factor: int, width: int) -> Tensor:
    """SDXL's size condition (B, n) for an uncropped picture of x's own size; width is that of the pooled prompt."""
    height, wide = (float(s * factor) for s in x.shape[-2:])
    count = (unet.add_embedding.linear_1.in_features - width) // unet.config.addition_time_embed_dim
    if count == 6:  # base: original size, crop, target size
        values = [height, wide, 0.0, 0.0, height, wide]
    elif count == 5:  # refiner: original size, crop, aesthetic score
        values = [height, wide, 0, 0, 6.0]
    else:
        raise ConceptSteerError(
            f"This UNet wants {count} size values; SDXL has 6 and its refiner 5. Give them as extra['time_ids']."
        )
    return torch.tensor([values], dtype=x.dtype, device=x.device).repeat(x.shape[0], 1)
