"""The embedded model's own latent CLIP: the text tower that its UNet is conditioned on, and the picture tower on
latents that was trained with it (train_towers). Both lie in the model's one file, as fp16.

It needs neither diffusers nor transformers. The picture tower reads scaled latents. The command that trains the two:

    python -m concept_steer.demo.train --data DATA --work WORK --stage towers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..latent_clip.checkpoint import build, load_latent_clip
from ..latent_clip.model import ClipConfig, LatentClipModel, TowerSize
from ..latent_clip.spaces import space
from ..latent_clip.tokenizer import ClipTokenizer
from . import architecture, convert, model, world

TEMPLATES = world.TEMPLATES
PARTS = {  # of a block: transformers' name -> OpenCLIP's
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def config() -> ClipConfig:
    picture, text = architecture.PICTURE, architecture.TEXT
    return ClipConfig(
        embed=picture["projection_dim"],
        vision=TowerSize(picture["hidden_size"], picture["num_hidden_layers"], picture["num_attention_heads"]),
        text=TowerSize(text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]),
        patch=picture["patch_size"],
        size=picture["image_size"],
        channels=picture["num_channels"],
        vocabulary=2048,
        context=text["max_position_embeddings"],
        quick_gelu=True,
        scaled_input=True,
    )


def from_transformers(
    text: Mapping[str, Tensor], picture: Mapping[str, Tensor], logit_scale: float
) -> dict[str, Tensor]:
    """State dict of a LatentClipModel from those of transformers' CLIP towers with projection; fp32."""
    words, sight = "text_model.", "vision_model."
    out = {
        "logit_scale": torch.tensor(logit_scale).log(),
        "text_projection": text["text_projection.weight"].T,
        "token_embedding.weight": text[f"{words}embeddings.token_embedding.weight"],
        "positional_embedding": text[f"{words}embeddings.position_embedding.weight"],
        "visual.proj": picture["visual_projection.weight"].T,
        "visual.conv1.weight": picture[f"{sight}embeddings.patch_embedding.weight"],
        "visual.class_embedding": picture[f"{sight}embeddings.class_embedding"],
        "visual.positional_embedding": picture[f"{sight}embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = text[f"{words}final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = picture[f"{sight}pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = picture[f"{sight}post_layernorm.{kind}"]
    out |= _blocks(text, words, "") | _blocks(picture, sight, "visual.")
    return {key: value.float().contiguous() for key, value in out.items()}


def _blocks(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    layer = 0
    while f"{old}encoder.layers.{layer}.layer_norm1.weight" in state:
        stem, block = f"{old}encoder.layers.{layer}.", f"{new}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            out |= {f"{block}{theirs}.{kind}": state[f"{stem}{ours}.{kind}"] for ours, theirs in PARTS.items()}
            joined = [state[f"{stem}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{block}attn.in_proj_{kind}"] = torch.cat(joined)
        layer += 1
    return out


def load(
    path: Path = model.MODEL_FILE, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LatentClipModel:
    """The latent CLIP of the embedded model's file. Errors: ConceptSteerError for another or a damaged file."""
    state, about = model.read(path)
    parts = convert.from_ldm(state, (), ())
    tokens = ClipTokenizer(json.loads(about["tokenizer.vocab"]), about["tokenizer.merges"].split("\n"))
    weights = from_transformers(parts["text"], parts["picture"], float(about["demo.logit_scale"]))
    mine = replace(space("demo"), scaling=float(about["demo.scaling_factor"]))
    sizes = replace(config(), vocabulary=len(tokens))
    return build(weights, sizes, mine, tokens, path.name).to(device=device, dtype=dtype)


def load_any(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LatentClipModel:
    """What a command line names: 'demo', or the file of a converted latent CLIP."""
    return load(device=device, dtype=dtype) if name == "demo" else load_latent_clip(name, device, dtype)
