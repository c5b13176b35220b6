"""Tiny real models of the diffusers and transformers classes with random weights, for offline tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from concept_steer.denoiser import Conditioning, NoiseSchedule
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser

TEXT_WIDTH = 24
LAYOUTS = ("sd", "mid only", "sdxl")
_BASE: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_BLOCKS: dict[str, dict[str, Any]] = {
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "mid only": {
        "down_block_types": ("DownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    },
}


def tiny_unet(layout: str = "sd", seed: int = 0, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(**{**_BASE, **_BLOCKS[layout], **changes})
    return unet.eval()


def text(rows: int, layout: str = "sd", seed: int = 1, width: int = TEXT_WIDTH) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, 7, width, generator=generator)
    return Conditioning(embeds, torch.randn(rows, 12, generator=generator) if layout == "sdxl" else None)


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseSchedule(torch.cumprod(1 - betas, 0), prediction_type)


def bag_of_words(prompts) -> Conditioning:
    """Every word is a fixed random embedding, a prompt their sum, so "woman" adds much the same to any prompt."""
    rows = []
    for prompt in prompts:
        words = prompt.split() or ["<empty>"]
        seeds = [sum(ord(c) * 31**i for i, c in enumerate(word)) % 2**31 for word in words]
        words_of_row = [torch.randn(7, TEXT_WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds]
        rows.append(torch.stack(words_of_row).sum(0))
    return Conditioning(torch.stack(rows))


def tiny_denoiser(layout: str = "mid only", **changes) -> DiffusersDenoiser:
    return DiffusersDenoiser(Components(tiny_unet(layout, **changes), schedule(), bag_of_words))


def write_tokenizer(folder: Path):
    """A CLIP tokenizer of single letters in `folder`."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz,.0123456789"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "an</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na n</w>\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def _clip(tokenizer, width: int, projection: int | None = None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def _scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_sd(folder: Path, **changes: Any):
    """A complete StableDiffusionPipeline; pictures are 16 x 16 pixels, latents 8 x 8."""
    from diffusers import StableDiffusionPipeline

    tokenizer = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(2)
    pipe: Any = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer, TEXT_WIDTH),
        tokenizer=tokenizer,
        unet=tiny_unet("sd", **changes),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(folder: Path):
    """A complete StableDiffusionXLPipeline with both text encoders."""
    from diffusers import StableDiffusionXLPipeline

    tokenizer = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(2)
    pipe: Any = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer, TEXT_WIDTH - 12),
        text_encoder_2=_clip(tokenizer, 12, projection=12),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet("sdxl"),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
