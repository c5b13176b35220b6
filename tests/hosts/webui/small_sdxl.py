"""A small SDXL that AUTOMATIC1111 loads by itself: sgm's classes, a random UNet, the embedded model's text and VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from concept_steer.demo import architecture, model

from . import demo_files
from .host import ROOT, Host

NAME = "small-sdxl"
SIZES = 16  # outdim of each of the three sizes' embeddings, of two numbers each
UNET = {
    "adm_in_channels": 3 * 2 * SIZES,
    "num_classes": "sequential",
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": architecture.TEXT_WIDTH,
    "legacy": False,
}
FAMILY, CHANNELS = f"custom:{architecture.TEXT_WIDTH}x64", 64
MARK = "conditioner.embedders.1.model.ln_final.weight"  # by this the web UI knows that a text encoder is inside


def write(host: Host, folder: Path) -> Path:
    """The checkpoint beside the embedded model's, which is there already."""
    about, weights = folder / f"{NAME}-unet.json", folder / f"{NAME}.unet"
    about.write_text(json.dumps(UNET), encoding="utf-8")
    inside = ROOT / "tests" / "hosts" / "webui" / "inside" / "sdxl_unet.py"
    host.run(inside, str(host.path), str(about), str(weights))
    given = load_file(model.MODEL_FILE)
    tensors = {f"model.diffusion_model.{key}": value for key, value in load_file(weights).items()}
    for key, value in given.items():
        if key.startswith("cond_stage_model."):
            tensors["conditioner.embedders.0." + key.removeprefix("cond_stage_model.")] = value.clone()
        elif key.startswith("first_stage_model."):
            tensors[key] = value.clone()
    tensors[MARK] = next(iter(tensors.values())).flatten()[:1].clone()
    weights.unlink()
    checkpoint = folder / f"{NAME}.safetensors"
    save_file(tensors, checkpoint)
    settings = json.loads((folder / f"{demo_files.NAME}.yaml").read_text(encoding="utf-8"))["model"]["params"]
    checkpoint.with_suffix(".yaml").write_text(json.dumps(_settings(settings)), encoding="utf-8")
    return checkpoint


def _settings(demo: dict[str, Any]) -> dict[str, Any]:
    """demo: the embedded model's parameters of LatentDiffusion."""
    parts = "sgm.modules.diffusionmodules"
    text = {"version": demo["cond_stage_config"]["params"]["version"], "layer": "last"}
    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    embedders = [_embedder("txt", "FrozenCLIPEmbedder", text)]
    embedders += [_embedder(key, "ConcatTimestepEmbedderND", {"outdim": SIZES}) for key in sizes]
    params = {
        "scale_factor": demo["scale_factor"],
        "disable_first_stage_autocast": True,
        "denoiser_config": {
            "target": f"{parts}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "weighting_config": {"target": f"{parts}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{parts}.denoiser_scaling.EpsScaling"},
                "discretization_config": {"target": f"{parts}.discretizer.LegacyDDPMDiscretization"},
            },
        },
        "network_config": {"target": f"{parts}.openaimodel.UNetModel", "params": UNET},
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {"emb_models": embedders},
        },
        "first_stage_config": {
            "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
            "params": {
                "embed_dim": 4,
                "monitor": "val/rec_loss",
                "lossconfig": {"target": "torch.nn.Identity"},
                "ddconfig": demo["first_stage_config"]["params"]["ddconfig"],
            },
        },
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}


def _embedder(key: str, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return {
        "is_trainable": False,
        "input_key": key,
        "target": f"sgm.modules.encoders.modules.{kind}",
        "params": params,
    }
