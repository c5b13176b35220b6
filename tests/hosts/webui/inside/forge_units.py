"""Runs in Forge's Python: Forge's or reForge's own UNet class, alone.

forge_units.py steered REPOSITORY FOLDER KIND INPUT.npz OUTPUT.npz: the embedded model's weights, steered by our hook,
with each of the input's settings.
forge_units.py halves REPOSITORY FOLDER: Forge's denoiser on a tiny UNet with attention on all levels.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

CLASSES = {
    "forge": ("backend.nn.unet", "IntegratedUNet2DConditionModel"),
    "reforge": ("ldm_patched.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
}
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 12,
}


def unet_class(folder: str, kind: str) -> type:
    sys.path[:0] = [folder, f"{folder}/packages_3rdparty"]
    sys.argv = [sys.argv[0], "--always-cpu"]  # Forge reads its flags when it is imported
    if kind == "reforge":
        importlib.import_module("ldm_patched.modules.args_parser").args.always_cpu = True
    module, name = CLASSES[kind]
    return getattr(importlib.import_module(module), name)


class Sampling:
    """Noise is told by its training timestep."""

    sigma_max = torch.tensor(999.0)

    def timestep(self, sigma):
        return sigma


class Patcher:
    """A model patcher, as far as the hook meets it."""

    def __init__(self, model, patches=()):
        self.model, self.patches = model, list(patches)

    def clone(self):
        return Patcher(self.model, self.patches)

    def set_model_output_block_patch(self, patch):
        self.patches.append(patch)


class Run:
    """p, as far as a job meets it."""

    def __init__(self, batch, objects):
        self.batch_size, self.iteration, self.is_hr_pass = batch, 0, False
        self.sd_model = SimpleNamespace(forge_objects=objects)
        self.extra_generation_params, self.draw = {}, None

    def comment(self, text):
        raise AssertionError(text)

    def sample(self):
        return self.draw()


def steered(repository: str, folder: str, kind: str, source: str, target: str) -> None:
    sys.path.insert(0, repository)
    made = unet_class(folder, kind)
    from safetensors.torch import load_file

    from concept_steer.hosts.webui_hook import ForgeHook
    from concept_steer.hosts.webui_job import Job, begin
    from concept_steer.hosts.webui_schema import Settings
    from concept_steer.vector import ConceptVector

    given = np.load(source)
    about = json.loads(str(given["about"]))
    size = {} if kind == "forge" else {"image_size": given["x"].shape[-1]}
    unet = made(**about["unet"], **size).eval()
    prefix = "model.diffusion_model."
    weights = load_file(about["weights"])
    unet.load_state_dict({k[len(prefix) :]: v.float() for k, v in weights.items() if k.startswith(prefix)})
    x, t, context = (torch.from_numpy(given[key]) for key in ("x", "t", "context"))
    vector = ConceptVector(torch.from_numpy(given["vector"]), about["family"], "vector")
    batch = about["batch"]
    name = "predictor" if kind == "forge" else "model_sampling"
    objects = SimpleNamespace(unet=Patcher(SimpleNamespace(diffusion_model=unet, **{name: Sampling()})))

    def run(settings):
        p = Run(batch, objects)
        begin(p, Settings.from_dict(settings), ForgeHook(), lambda name: vector)

        def draw():
            """All rows in one call, as these hosts order them: the negative prompts' first."""
            inner = SimpleNamespace(inner_model=SimpleNamespace(forge_objects=objects), p=p)
            denoiser = SimpleNamespace(p=p, inner_model=inner)
            params = SimpleNamespace(
                x=x[:batch], sigma=t[:batch], text_cond=context[:batch], text_uncond=context[batch:], denoiser=denoiser
            )
            job = Job.of(p)
            job.careful(lambda: job.before_evaluation(params))
            order = torch.cat([torch.arange(batch, 2 * batch), torch.arange(batch)])
            options = {"patches": {"output_block_patch": objects.unet.patches}, "cond_or_uncond": [1, 0]}
            options["sigmas"] = t[:batch]
            found = unet(x[order], timesteps=t[order], context=context[order], transformer_options=options)
            return torch.cat([found[batch:], found[:batch]])

        p.draw = draw
        result = p.sample()
        assert not objects.unet.patches  # detached
        return result.numpy()

    with torch.no_grad():
        found = {side: run(settings) for side, settings in about["settings"].items()}
        plain = unet(x, timesteps=t, context=context, transformer_options={})
    np.savez(target, plain=plain.numpy(), **found)


def halves(repository: str, folder: str) -> None:
    sys.path.insert(0, repository)
    made = unet_class(folder, "forge")
    from concept_steer.denoiser import Conditioning
    from concept_steer.hosts import webui_denoiser, webui_forge

    modules = {"devices": SimpleNamespace(autocast=contextlib.nullcontext)}
    webui_denoiser.host = webui_forge.host = modules.__getitem__
    webui_forge._memory = lambda: SimpleNamespace(load_models_gpu=lambda models: None)
    torch.manual_seed(0)
    with torch.inference_mode():
        unet = made(**TINY).eval()
        for weight in unet.parameters():  # some begin at zero, which would hide a mistake
            nn.init.normal_(weight, std=0.05)
        inner = SimpleNamespace(diffusion_model=unet, computation_dtype=torch.float32, storage_dtype=torch.float32)
        objects = SimpleNamespace(unet=SimpleNamespace(model=inner, load_device="cpu"))
    denoiser = webui_forge.ForgeDenoiser(SimpleNamespace(forge_objects=objects))
    assert (denoiser.channels, denoiser.family) == (64, "custom:12x64"), denoiser.family
    x, cond, times = torch.randn(3, 4, 8, 8), Conditioning(torch.randn(3, 5, 12)), torch.tensor([0.0, 500.0, 999.0])
    with torch.no_grad():
        state = denoiser.to_h(x, times, cond)
        assert torch.equal(denoiser.from_h(state), denoiser.predict(x, times, cond))
    with denoiser.frozen():
        c = torch.zeros(64, 1, 1, requires_grad=True)
        loss = denoiser.from_h(state.with_h(state.h + c)).square().mean()
        loss.backward()
        with torch.no_grad():
            step = 0.01 * c.grad / c.grad.norm()
            up, down = (denoiser.from_h(state.with_h(state.h + sign * step)).square().mean() for sign in (1, -1))
    slope = float((up - down) / 0.02)
    assert abs(slope / float(c.grad.norm()) - 1) < 0.02, (slope, float(c.grad.norm()))
    print("forge ok", float(c.grad.norm()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"steered": steered, "halves": halves}[sys.argv[1]](*sys.argv[2:])
