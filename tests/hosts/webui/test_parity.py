"""The same weights and the same vector give the same prediction through AUTOMATIC1111's UNet as through diffusers'."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from concept_steer.demo import model
from concept_steer.demo.job import Studio
from concept_steer.denoiser import Conditioning
from concept_steer.hosts.webui_schema import Settings
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

from .demo_files import unet_settings
from .host import ROOT

TOLERANCE = 5e-6  # of values up to about 5; the two UNets differ by 1.2e-6 without steering
CASES = [("cond", [4]), ("cond", [2, 2]), ("both", [4]), ("uncond", [1, 3])]  # which rows, and how the host cuts them


def settings_of(side: str) -> Settings:
    return Settings.from_dict({"rows": [{"vector": "vector", "strength": 1.5, "start": 0.1, "end": 0.9, "rows": side}]})


@pytest.fixture(scope="module")
def given():
    """x, context and vector: two rows of prompts and two of negative ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (4, 4, 16, 16), "context": (4, 77, 128), "vector": (192,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def denoiser():
    return Studio().denoiser


@pytest.fixture(scope="module")
def found(host, given, denoiser, tmp_path_factory):
    """What the web UI's UNet predicts, all cases in one start of its Python."""
    folder = tmp_path_factory.mktemp("parity")
    about = {"unet": unet_settings(), "weights": str(model.MODEL_FILE), "family": denoiser.family, "batch": 2}
    about["jobs"] = [{"settings": settings_of(side).to_dict(), "calls": calls} for side, calls in CASES]
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    np.savez(folder / "in.npz", about=json.dumps(about), t=np.full(4, 501.0, np.float32), **arrays)
    script = ROOT / "tests" / "hosts" / "webui" / "inside" / "parity.py"
    host.run(script, str(ROOT), str(host.path), str(folder / "in.npz"), str(folder / "out.npz"))
    with np.load(folder / "out.npz") as file:
        return dict(file)


def assert_equal(plain: np.ndarray, steered: np.ndarray, given, denoiser, side: str) -> None:
    """A web UI's predictions are those of the diffusers host, with and without the vector."""
    vector = ConceptVector(given["vector"], denoiser.family, "vector")
    steer: list[Steer] = [settings_of(side).rows[0].steer(vector)]
    with torch.no_grad():
        cond = Conditioning(given["context"])
        wanted = denoiser.predict(given["x"], 501.0, cond)
        wanted_steered = denoiser.predict(given["x"], 501.0, cond, steer, [True, True, False, False])
    assert float((wanted_steered - wanted).abs().max()) > 100 * TOLERANCE
    assert np.abs(plain - wanted.numpy()).max() < TOLERANCE
    assert np.abs(steered - wanted_steered.numpy()).max() < TOLERANCE


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{side} {calls}" for side, calls in CASES])
def test_a_steered_prediction_equals_the_diffusers_hosts(found, given, denoiser, case):
    assert_equal(found["plain"], found[f"steered {case}"], given, denoiser, CASES[case][0])
