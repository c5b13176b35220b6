"""The sizes of the embedded model, in one place: diffusers/transformers classes for training, built lazily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LATENT = 16  # latents are (4, 16, 16)
TEXT_LENGTH = 77
TEXT_WIDTH = 128
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [64, 64, 64, 128],  # 64: with 32 groups on 32 channels a norm would forget colours
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 128,
}
UNET: dict[str, Any] = {
    "sample_size": LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] * 3,
    "block_out_channels": [64, 128, 192],
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 6,  # diffusers' name for the number of heads
    "norm_num_groups": 32,
}
# An SD-like twin, to check conclusions on: its text also enters beside the bottleneck, at two levels of both halves.
TWIN: dict[str, Any] = {
    **UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [4, 4, 6],
}
LAYOUTS = {"mid": UNET, "sd": TWIN}
TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_LENGTH,
    "hidden_act": "quick_gelu",
    "projection_dim": TEXT_WIDTH,
}
PICTURE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_channels": 4,
    "image_size": LATENT,
    "patch_size": 2,
    "projection_dim": TEXT_WIDTH,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE)


def make_unet(layout: str = "mid", **changes):
    """layout: "mid" (the embedded model: text in the mid block only) or "sd" (its twin)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{**LAYOUTS[layout], **changes})


def attention_up(layout: str) -> tuple[bool, ...]:
    """Which levels of the decoder half have attention; the key names of the ldm layout depend on it."""
    return tuple(block.startswith("CrossAttn") for block in LAYOUTS[layout]["up_block_types"])


def make_text_tower(tokenizer_folder: Path):
    """The text tower with its projection (transformers CLIPTextModelWithProjection); ids from the tokenizer's files."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    vocabulary = json.loads((tokenizer_folder / "vocab.json").read_text(encoding="utf-8"))
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(vocabulary), **ids, **TEXT))


def make_picture_tower():
    """A small Latent-CLIP (arXiv 2503.08455): a ViT whose patches are 2 by 2 latent cells."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**PICTURE))


def make_towers(tokenizer_folder: Path):
    """Both towers and the logit scale, as one module to train."""
    import torch

    towers = torch.nn.Module()
    towers.text = make_text_tower(tokenizer_folder)
    towers.picture = make_picture_tower()
    towers.log_scale = torch.nn.Parameter(torch.tensor(2.66))
    return towers


def plain_attention():
    """Attention as three matmuls: on CPU in bf16 faster than the fused kernel for 16 queries."""
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


def text_encoder_of(tower):
    """The tower without its projection, as the CLIPTextModel that pipelines expect (sharing its weights)."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel(tower.config)
    target = encoder.text_model if hasattr(encoder, "text_model") else encoder
    target.load_state_dict(tower.text_model.state_dict())
    return encoder.to(dtype=tower.dtype, device=tower.device).eval().requires_grad_(False)
