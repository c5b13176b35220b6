"""What `erase learn` writes, used in the real AUTOMATIC1111 as stock files, without our extension's help."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_steer.demo import model
from concept_steer.geom_erasing import LocationTokens, lora
from concept_steer.hosts.diffusers import DiffusersDenoiser

from .client import as_picture


@pytest.fixture(scope="module")
def denoiser():
    return DiffusersDenoiser(model.pipeline())


def test_the_embedding_acts_in_the_negative_prompt_and_nowhere_else(client, denoiser, base):
    words = denoiser.text_reader().vectors_of("watermark")
    unit = float(words["clip_l"].square().mean().sqrt())
    places = {"clip_l": 3 * unit * torch.randn(4, 128, generator=torch.Generator().manual_seed(1))}
    folder = base / "embeddings"
    folder.mkdir(exist_ok=True)
    made = LocationTokens("no-watermark", "watermark", 2, words, places)
    made.save(folder / "no-watermark.safetensors", overwrite=True)
    client.call("/sdapi/v1/refresh-embeddings", {})
    loaded = client.call("/sdapi/v1/embeddings")["loaded"]
    assert loaded["no-watermark"]["vectors"] == len(made)
    plain = client.draw()
    without = client.draw(negative_prompt="no-watermark")
    assert without.pictures != plain.pictures
    assert client.draw().pictures == plain.pictures


def test_the_lora_acts_by_its_stock_tag_as_it_does_elsewhere(server, client, denoiser, base):
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(2)
    with lora.adapted(denoiser, 4):
        found = lora.state_of(denoiser)
    state = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in found.items()}
    folder = base / "models" / "Lora"
    folder.mkdir(parents=True, exist_ok=True)
    lora.save(state, folder / "no-marks-lora.safetensors", {"concept": "marks"}, overwrite=True)
    client.call("/sdapi/v1/refresh-loras", {})
    plain = client.draw()
    worn = client.draw(prompt="a doctor <lora:no-marks-lora:1>")
    one, other = (np.asarray(as_picture(drawn.sent[0]), float) for drawn in (plain, worn))
    assert np.abs(one - other).mean() > 1
    assert "keys weren't matched" not in server.log() and "Couldn't find Lora" not in server.log()
    assert client.draw().pictures == plain.pictures
