"""The same weights and the same vector give the same prediction through AUTOMATIC1111's UNet as through diffusers'."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from concept_steer.demo import model
from concept_steer.hosts.webui_schema import Settings
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

from .demo_files import unet_settings
from .host import ROOT

TOLERANCE = 5e-6  # of values up to about 5; the two UNets differ by 1.2e-6 without steering


@pytest.mark.parametrize(("side", "calls"), [("cond", [4]), ("cond", [2, 2]), ("both", [4]), ("uncond", [1, 3])])
def test_a_steered_prediction_equals_the_diffusers_hosts(host, tmp_path, side, calls):
    from concept_steer.demo.job import Studio
    from concept_steer.denoiser import Conditioning

    denoiser = Studio().denoiser
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 16, 16, generator=generator)
    context = torch.randn(4, 77, 128, generator=generator)
    tensor = torch.randn(192, generator=generator)
    settings = Settings.from_dict(
        {"rows": [{"vector": "vector", "strength": 1.5, "start": 0.1, "end": 0.9, "rows": side}]}
    )
    about = {
        "unet": unet_settings(),
        "weights": str(model.MODEL_FILE),
        "family": denoiser.family,
        "batch": 2,
        "calls": calls,
        "settings": settings.to_dict(),
    }
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    arrays = {"x": x, "t": torch.full((4,), 501.0), "context": context, "vector": tensor}
    np.savez(source, about=json.dumps(about), **{key: value.numpy() for key, value in arrays.items()})
    script = ROOT / "tests" / "hosts" / "webui" / "inside" / "parity.py"
    host.run(script, str(ROOT), str(host.path), str(source), str(target))
    found = np.load(target)

    vector = ConceptVector(tensor, denoiser.family, "vector")
    steer: list[Steer] = [settings.rows[0].steer(vector)]
    with torch.no_grad():
        cond, is_cond = Conditioning(context), [True, True, False, False]
        plain = denoiser.predict(x, 501.0, cond)
        steered = denoiser.predict(x, 501.0, cond, steer, is_cond)
    assert float((steered - plain).abs().max()) > 100 * TOLERANCE
    assert np.abs(found["plain"] - plain.numpy()).max() < TOLERANCE
    assert np.abs(found["steered"] - steered.numpy()).max() < TOLERANCE
