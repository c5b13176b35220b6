"""Vectors for the tests: right ones made here, and broken files as they come from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from concept_steer.vector import ConceptVector


def random_vector(seed: int, family: str = "demo", channels: int = 192) -> ConceptVector:
    """Strong enough that a picture shows it."""
    tensor = torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * 0.7
    return ConceptVector(tensor, family, title=f"random {seed}")


def with_nan(path: Path) -> None:
    """A vector file whose tensor holds one NaN."""
    random_vector(0).save(path)
    header = path.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    next(iter(tensors.values())).view(-1)[5] = float("nan")
    save_file(tensors, path, metadata)
