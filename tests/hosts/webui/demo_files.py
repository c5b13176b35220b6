"""The embedded model as files that AUTOMATIC1111 and Forge load: checkpoint, settings, text encoder's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from concept_steer.demo import architecture, model

NAME = "concept-steer-demo"


def unet_settings() -> dict[str, Any]:
    """Arguments of ldm's UNetModel."""
    unet = architecture.UNET
    widths = unet["block_out_channels"]
    return {
        "image_size": architecture.LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "attention_resolutions": [],  # the mid block always has attention
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": [width // widths[0] for width in widths],
        "num_heads": unet["attention_head_dim"],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": architecture.TEXT_WIDTH,
        "use_checkpoint": False,
        "legacy": False,
    }


def write(folder: Path) -> Path:
    """Checkpoint, NAME.yaml (JSON is YAML) and NAME-text/ in the folder; the checkpoint's path."""
    checkpoint, text = write_checkpoint(folder), folder / f"{NAME}-text"
    _, metadata = model.read(model.MODEL_FILE)
    model.write_tokenizer(metadata, text)
    _put(text / "config.json", _text_settings(metadata))
    _put(checkpoint.with_suffix(".yaml"), _settings(float(metadata["demo.scaling_factor"]), text))
    return checkpoint


def write_checkpoint(folder: Path) -> Path:
    """The embedded model's file alone."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(model.MODEL_FILE, folder / f"{NAME}.safetensors"))


def write_parts(folder: Path) -> Path:
    """The settings of the model's parts as Forge reads them: a folder in diffusers' layout, without weights."""
    _, metadata = model.read(model.MODEL_FILE)
    parts = {
        "scheduler": ("diffusers", "DDIMScheduler", "scheduler_config.json", architecture.SCHEDULE),
        "unet": ("diffusers", "UNet2DConditionModel", "config.json", architecture.UNET),
        "vae": (
            "diffusers",
            "AutoencoderKL",
            "config.json",
            {**architecture.VAE, "scaling_factor": float(metadata["demo.scaling_factor"])},
        ),
    }
    index = {part: [library, kind] for part, (library, kind, _, _) in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    for part, (_, kind, file, settings) in parts.items():
        _put(folder / part / file, {"_class_name": kind, **settings})
    _put(folder / "text_encoder" / "config.json", _text_settings(metadata))
    _put(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})
    model.write_tokenizer(metadata, folder / "tokenizer")
    return folder


GUESS = '''"""Tells Forge, which knows SD 1.x by its size, that the embedded model is one."""

from huggingface_guess import model_list


class DemoGuess(model_list.SD15):
    huggingface_repo = {parts!r}
    unet_config = {known!r}
    unet_extra_config = {more!r}

    def __init__(self, unet_config):
        super().__init__(unet_config)
        self.unet_config["context_dim"] = {width!r}  # looked for in the input blocks, which have no attention


model_list.models[:] = [m for m in model_list.models if m.__name__ != "DemoGuess"] + [DemoGuess]
'''


def write_guess(folder: Path, parts: Path) -> None:
    """A script for Forge that makes it load the embedded model, which is smaller than its smallest."""
    unet = unet_settings()
    known = {"model_channels": unet["model_channels"], "use_linear_in_transformer": False}
    known |= {"adm_in_channels": None, "use_temporal_attention": False}
    more = {"num_heads": unet["num_heads"], "num_head_channels": -1}
    folder.mkdir(parents=True, exist_ok=True)
    text = GUESS.format(parts=str(parts.resolve()), known=known, more=more, width=architecture.TEXT_WIDTH)
    (folder / "demo_model.py").write_text(text, encoding="utf-8")


def _put(path: Path, settings: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def _text_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """config.json of the text encoder."""
    words = json.loads(metadata["tokenizer.vocab"])
    start, end = words["<|startoftext|>"], words["<|endoftext|>"]
    ids = {"vocab_size": len(words), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], **ids, **architecture.TEXT}


def _settings(scale: float, text: Path) -> dict[str, Any]:
    widths = architecture.VAE["block_out_channels"]
    vae = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 8 * architecture.LATENT,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {
        "linear_start": architecture.SCHEDULE["beta_start"],
        "linear_end": architecture.SCHEDULE["beta_end"],
        "timesteps": 1000,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": architecture.LATENT,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": scale,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_settings()},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "monitor": "val/rec_loss",
                "lossconfig": {"target": "torch.nn.Identity"},
                "ddconfig": vae,
            },
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(text.resolve())},
        },
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
