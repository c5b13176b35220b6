"""A real Forge for the tests: where it is, its data folder with this extension and the embedded model, its server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import demo_files
from . import host as hosts

FLAGS = (
    "--skip-prepare-environment",
    "--skip-install",
    "--skip-torch-cuda-test",
    "--skip-version-check",
    "--skip-python-version-check",
    "--always-cpu",
    "--all-in-fp32",
    "--no-download-sd-model",
    "--no-hashing",
    "--server-name",
    "127.0.0.1",
    "--api",
)

BREAK = "breakstheunet"  # a prompt with this word ends in an exception from inside the UNet, in its third evaluation
BROKEN = "the UNet was broken by a test"
SCRIPT = f'''
from modules import scripts


class Breaks(scripts.Script):
    def title(self):
        return "Breaks the UNet"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p, *args, **kwargs):
        if not any("{BREAK}" in prompt for prompt in p.prompts):
            return
        unet, calls = p.sd_model.forge_objects.unet.clone(), []

        def broken(h, options):
            if options["block"] == ("input", 0):
                calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("{BROKEN}")
            return h

        unet.set_model_input_block_patch(broken)
        p.sd_model.forge_objects.unet = unet
'''


def find() -> hosts.Host | str:
    """The host of FORGE_PATH and FORGE_PYTHON, else the one in ~/stable-diffusion-webui-forge; or why there is none."""
    return hosts.find("FORGE", "~/stable-diffusion-webui-forge", "modules_forge/main_thread.py")


def reforge() -> Path | None:
    """The folder of REFORGE_PATH, else ~/stable-diffusion-webui-reForge, if it is there."""
    path = Path(os.environ.get("REFORGE_PATH") or "~/stable-diffusion-webui-reForge").expanduser()
    return (
        path if (path / "ldm_patched" / "ldm" / "modules" / "diffusionmodules" / "openaimodel.py").is_file() else None
    )


def unet_settings() -> dict[str, Any]:
    """The embedded UNet's, as Forge and reForge read them: attention told for each level."""
    known = demo_files.unet_settings()
    levels, blocks = len(known["channel_mult"]), known["num_res_blocks"]
    kept = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "channel_mult", "num_heads")
    return {
        **{key: known[key] for key in (*kept, "use_spatial_transformer", "context_dim")},
        "num_head_channels": -1,
        "transformer_depth": [0] * levels * blocks,
        "transformer_depth_output": [0] * levels * (blocks + 1),
        "transformer_depth_middle": 1,
    }


def make_base(folder: Path) -> Path:
    """As of AUTOMATIC1111, and a small extension: how the embedded model is built, and how the UNet breaks."""
    hosts.install(folder)
    models = folder / "models" / "Stable-diffusion"
    parts = demo_files.write_parts(folder / "demo-parts")
    demo_files.write_checkpoint(models)
    scripts = folder / "extensions" / "for-tests" / "scripts"
    demo_files.write_guess(scripts, parts)
    (scripts / "breaks.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(hosts.CONFIG), encoding="utf-8")
    return folder


class Server(hosts.Server):
    flags = FLAGS

    def __init__(self, host: hosts.Host, base: Path, *flags: str) -> None:
        # with a data folder elsewhere Forge does not hand out its own scripts, and its page stays dead
        super().__init__(host, base, "--gradio-allowed-path", str(host.path), *flags)
