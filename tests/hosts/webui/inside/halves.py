"""Runs in the web UI's Python: the two halves of ldm's and sgm's own UNets equal their forward, and can be learned on.

halves.py REPOSITORY WEBUI; gradient checkpointing is on, as in Stable Diffusion's own configs.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace

import torch
from torch import nn

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 12,
    "use_checkpoint": True,
    "legacy": False,
}
KINDS = {"ldm": {"image_size": 8}, "sgm": {"num_classes": "sequential", "adm_in_channels": 6}}


def stand_ins() -> dict:
    """The web UI's modules as far as the denoiser asks them."""
    plain = contextlib.nullcontext
    return {
        "devices": SimpleNamespace(device="cpu", dtype_unet=torch.float32, autocast=plain),
        "lowvram": SimpleNamespace(is_enabled=lambda model: False),
        "sd_unet": SimpleNamespace(current_unet=None),
        "shared": SimpleNamespace(cmd_opts=SimpleNamespace(lowvram=False)),
    }


def main(repository: str, webui: str) -> None:
    folders = [f"{webui}/repositories/{name}" for name in ("stable-diffusion-stability-ai", "generative-models")]
    sys.path[:0] = [repository, *folders]
    from concept_steer.denoiser import Conditioning
    from concept_steer.hosts import webui_denoiser

    webui_denoiser.host = stand_ins().__getitem__
    torch.set_num_threads(1)
    for kind, more in KINDS.items():
        torch.manual_seed(0)
        classes = importlib.import_module(f"{kind}.modules.diffusionmodules.openaimodel")
        unet = classes.UNetModel(**TINY, **more).eval()
        for weight in unet.parameters():  # some begin at zero, which would hide a mistake
            nn.init.normal_(weight, std=0.05)
        model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))
        denoiser = webui_denoiser.WebuiDenoiser(model)
        label = None if kind == "ldm" else torch.randn(3, 6)
        x, cond = torch.randn(3, 4, 8, 8), Conditioning(torch.randn(3, 5, 12), label)
        times = torch.tensor([0.0, 500.0, 999.0])
        assert (denoiser.channels, denoiser.family) == (64, "custom:12x64"), denoiser.family
        with torch.no_grad():
            state = denoiser.to_h(x, times, cond)
            assert torch.equal(denoiser.from_h(state), denoiser.predict(x, times, cond)), kind
        with denoiser.frozen():
            c = torch.zeros(64, 1, 1, requires_grad=True)
            denoiser.from_h(state.with_h(state.h + c)).square().mean().backward()
        assert c.grad is not None and float(c.grad.abs().max()) > 0, kind
        assert all(weight.grad is None and weight.requires_grad for weight in unet.parameters()), kind
        print(kind, "ok", float(c.grad.norm()))


if __name__ == "__main__":
    main(*sys.argv[1:])
