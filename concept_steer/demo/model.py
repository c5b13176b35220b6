"""The embedded model ("demo" family): one safetensors file in ldm layout, loaded into diffusers' classes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ConceptSteerError
from . import architecture, convert

MODEL_FILE = Path(__file__).parent / "weights" / "concept-steer-demo.safetensors"
ARCHITECTURE = "concept-steer-demo"


@dataclass(frozen=True)
class DemoModel:
    """The parts of the embedded model, in evaluation mode, frozen."""

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    text_projection: nn.Module
    picture_tower: nn.Module
    tokenizer: Any
    scheduler: Any
    scaling_factor: float
    logit_scale: float


def read(path: Path = MODEL_FILE) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors as stored (fp16, ldm layout) and its metadata."""
    if not path.is_file():
        raise ConceptSteerError(f"The embedded model is missing: expected {path}. Reinstall concept-steer.")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("modelspec.architecture") != ARCHITECTURE:
            raise ConceptSteerError(
                f"{path.name} is not the embedded model: its architecture is "
                f"{metadata.get('modelspec.architecture', 'not stated')}, expected {ARCHITECTURE}."
            )
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


@lru_cache(maxsize=2)
def file_hash(path: Path = MODEL_FILE) -> str:
    """sha256 of the model file: the checkpoint hash that vectors learned on it carry."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_tokenizer(metadata: dict[str, str], folder: Path) -> Path:
    """Unpack the tokenizer that the model file carries, as the files that CLIPTokenizer and both hosts read."""
    from . import tokenizer

    tokenizer.write(folder, json.loads(metadata["tokenizer.vocab"]), metadata["tokenizer.merges"].split("\n"))
    return folder


def file_of(checkpoint: str) -> Path:
    """What a command line names: 'demo', or the file of a model of the same world (such as the SD-like twin)."""
    return MODEL_FILE if checkpoint == "demo" else Path(checkpoint)


def load(path: Path = MODEL_FILE, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DemoModel:
    """Load the embedded model; needs the `demo` extra (diffusers, transformers)."""
    try:
        from diffusers import DDIMScheduler

        from . import tokenizer
    except ImportError as error:
        raise ConceptSteerError(
            f"The embedded model needs {error.name}: install it with pip install 'concept-steer[demo]'."
        ) from error
    state, metadata = read(path)
    with tempfile.TemporaryDirectory() as folder:
        files = write_tokenizer(metadata, Path(folder))
        tokens = tokenizer.load(files)
        text = architecture.make_text_tower(files)
    layout = metadata.get("demo.layout", "mid")
    unet, vae, picture = architecture.make_unet(layout), architecture.make_vae(), architecture.make_picture_tower()
    ups = architecture.attention_up(layout)
    parts = convert.from_ldm(state, list(unet.state_dict()), list(vae.state_dict()), ups)
    scale = float(metadata["demo.scaling_factor"])
    vae.register_to_config(scaling_factor=scale)
    for module, name in ((unet, "unet"), (vae, "vae"), (text, "text"), (picture, "picture")):
        module.load_state_dict(parts[name], strict=True)
        module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    encoder = architecture.text_encoder_of(text)
    scheduler = DDIMScheduler(
        **architecture.SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1
    )
    return DemoModel(
        unet, vae, encoder, text.text_projection, picture, tokens, scheduler, scale, float(metadata["demo.logit_scale"])
    )


def pipeline(model: DemoModel | None = None, **kwargs: Any):
    """The embedded model as a diffusers StableDiffusionPipeline (no safety checker: see the Safety switch)."""
    model = model or load(**kwargs)
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_diffusers(folder: Path, path: Path = MODEL_FILE) -> Path:
    """Write the model as a diffusers folder (fp16), for any tool that reads one."""
    pipeline(load(path, dtype=torch.float16)).save_pretrained(folder)
    return folder


def unpack(work: Path, path: Path = MODEL_FILE) -> None:
    """The reverse of `pack`: checkpoints at step 0, tokenizer and scale in WORK, for a second stage of training."""
    state, metadata = read(path)
    work.mkdir(parents=True, exist_ok=True)
    write_tokenizer(metadata, work / "tokenizer")
    colours = json.loads(metadata.get("demo.latent_rgb", "null"))
    about = {"scaling_factor": float(metadata["demo.scaling_factor"]), "latent_rgb": colours}
    (work / "scale.json").write_text(json.dumps(about))
    unet_keys, vae_keys = architecture.make_unet().state_dict(), architecture.make_vae().state_dict()
    parts = {
        name: {key: value.float() for key, value in part.items()}
        for name, part in convert.from_ldm(state, list(unet_keys), list(vae_keys)).items()
    }
    towers = {f"{name}.{key}": value for name in ("text", "picture") for key, value in parts[name].items()}
    towers["log_scale"] = torch.tensor(float(metadata["demo.logit_scale"])).log()
    for name, weights in (("vae", parts["vae"]), ("towers", towers), ("unet", parts["unet"])):
        torch.save({"model": weights, "ema": weights, "step": 0}, work / f"{name}.pt")


def pack(work: Path, out: Path, title: str, card: dict[str, Any], layout: str = "mid") -> Path:
    """Join the trained parts of WORK into one fp16 safetensors file in ldm layout, the tokenizer in its metadata."""
    from safetensors.torch import save_file

    vae, towers, unet = (torch.load(work / f"{n}.pt", weights_only=True)["ema"] for n in ("vae", "towers", "unet"))
    text = {k.removeprefix("text."): v for k, v in towers.items() if k.startswith("text.")}
    picture = {k.removeprefix("picture."): v for k, v in towers.items() if k.startswith("picture.")}
    joined = convert.to_ldm(unet, vae, text, picture, architecture.attention_up(layout))
    state = {k: v.to(torch.float16).contiguous() for k, v in joined.items()}
    vocabulary = json.loads((work / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    merges = (work / "tokenizer" / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    about = json.loads((work / "scale.json").read_text())
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.title": title,
        "modelspec.license": "weights: Apache-2.0; pictures: Noto (Apache-2.0), Twemoji (CC-BY 4.0), Fluent (MIT)",
        "modelspec.resolution": "128x128",
        "demo.scaling_factor": str(about["scaling_factor"]),
        "demo.logit_scale": str(float(towers["log_scale"].exp())),
        "demo.latent_rgb": json.dumps(about.get("latent_rgb")),
        "demo.card": json.dumps(card),
        "demo.layout": layout,
        "tokenizer.vocab": json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")),
        "tokenizer.merges": "\n".join(merges),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    save_file(state, part, metadata)
    os.replace(part, out)
    return out
