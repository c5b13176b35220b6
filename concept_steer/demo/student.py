"""The embedded model's student: a UNet that draws in one step without guidance, one fp16 file (see train_student).

Everything else (VAE, text encoder, towers) is the embedded model's own, and so is the UNet's architecture: concept
vectors fit, and with `steps` above 1 the student refines what its first step drew.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConceptSteerError
from ..hosts.diffusers import DiffusersDenoiser
from . import convert, model

STUDENT_FILE = model.MODEL_FILE.with_name("demo-student.safetensors")
ARCHITECTURE = "concept-steer-demo-student"
NAME = "demo-student"  # on command lines
TRAIN = "python -m concept_steer.demo.train_student --work DIR --out FILE"


def pack(checkpoint: Path, out: Path) -> Path:
    """The averaged weights of train_student's checkpoint as fp16, in ldm layout, with the teacher's hash."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = {convert.UNET_PREFIX + convert.unet_key(key): value.half() for key, value in stored["ema"].items()}
    about = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.title": "Concept Steer demo model, one-step student",
        "modelspec.license": "as the embedded model's, which drew all that it was trained on",
        "modelspec.resolution": "128x128",
        "student.teacher": model.file_hash(),
        "student.training_steps": str(stored["step"]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in state.items()}, part, about)
    os.replace(part, out)
    return out


def read(path: Path = STUDENT_FILE) -> dict[str, Tensor]:
    """The UNet's tensors as stored (fp16, ldm layout). Errors: ConceptSteerError for a missing file, or another's."""
    if not path.is_file():
        raise ConceptSteerError(f"The student is missing: expected {path}. Reinstall concept-steer, or run {TRAIN}.")
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        found = about.get("modelspec.architecture", "not stated")
        if found != ARCHITECTURE:
            raise ConceptSteerError(f"{path.name} is not the student: its architecture is {found}, not {ARCHITECTURE}.")
        if about.get("student.teacher") != model.file_hash():
            raise ConceptSteerError(
                f"{path.name} was distilled from another embedded model than this version has: run {TRAIN}."
            )
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def load(path: Path = STUDENT_FILE, device: str = "cpu", dtype: torch.dtype = torch.float32) -> model.DemoModel:
    """The embedded model with the student's UNet. Errors: as `read`."""
    state = read(path)
    parts = model.load(device=device, dtype=dtype)
    weights = {key: state[convert.UNET_PREFIX + convert.unet_key(key)] for key in parts.unet.state_dict()}
    parts.unet.load_state_dict(weights, strict=True)
    return parts


def denoiser(path: Path = STUDENT_FILE, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusersDenoiser:
    """The student, to draw with `sampling.sample(..., steps=1, guidance=1)`."""
    return DiffusersDenoiser(model.pipeline(load(path, device, dtype)))
