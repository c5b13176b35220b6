"""Runs in the web UI's Python: random weights of sgm's own UNet. sdxl_unet.py WEBUI SETTINGS.json OUT.safetensors"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(webui: str, settings: str, out: str) -> None:
    folders = [f"{webui}/repositories/{name}" for name in ("stable-diffusion-stability-ai", "generative-models")]
    sys.path[:0] = folders
    from sgm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    unet = UNetModel(**json.loads(Path(settings).read_text(encoding="utf-8")))
    for name, weight in unet.named_parameters():  # some begin at zero, so that nothing would depend on h
        if float(weight.detach().abs().max()) == 0 and name.endswith("weight"):
            torch.nn.init.normal_(weight, std=0.05)
    save_file({key: value.contiguous() for key, value in unet.state_dict().items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
