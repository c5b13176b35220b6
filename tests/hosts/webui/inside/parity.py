"""Runs in the web UI's Python: ldm's own UNetModel with the embedded model's weights, steered through our hook.

parity.py REPOSITORY WEBUI INPUT.npz OUTPUT.npz; the input holds x, t, context, the vector and the job as JSON.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import torch


class Run:
    """p, as far as a job meets it."""

    def __init__(self, given):
        self.batch_size, self.iteration, self.is_hr_pass = int(given["batch"]), 0, False
        self.extra_generation_params, self.draw = {}, None

    def comment(self, text):
        raise AssertionError(text)

    def sample(self):
        return self.draw()


def main(repository: str, webui: str, source: str, target: str) -> None:
    sys.path[:0] = [repository, f"{webui}/repositories/stable-diffusion-stability-ai"]
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    from safetensors.torch import load_file

    from concept_steer.hosts.webui_hook import TorchHook
    from concept_steer.hosts.webui_job import Job, begin
    from concept_steer.hosts.webui_schema import Settings
    from concept_steer.vector import ConceptVector

    torch.set_num_threads(1)
    given = np.load(source)
    about = json.loads(str(given["about"]))
    unet = UNetModel(**about["unet"]).eval()
    prefix = "model.diffusion_model."
    weights = load_file(about["weights"])
    unet.load_state_dict({k[len(prefix) :]: v.float() for k, v in weights.items() if k.startswith(prefix)})
    x, t, context = (torch.from_numpy(given[key]) for key in ("x", "t", "context"))
    vector = ConceptVector(torch.from_numpy(given["vector"]), about["family"], "vector")
    batch = about["batch"]
    p = Run(about)
    begin(p, Settings.from_dict(about["settings"]), TorchHook(lambda: unet), lambda name: vector)

    def draw():
        denoiser = SimpleNamespace(p=p, sampler=None)
        params = SimpleNamespace(x=x, text_cond=context[:batch], text_uncond=context[batch:], denoiser=denoiser)
        job = Job.of(p)
        job.careful(lambda: job.before_evaluation(params))
        calls = about["calls"]
        parts, row = [], 0
        for size in calls:
            part = slice(row, row + size)
            parts.append(unet(x[part], timesteps=t[part], context=context[part]))
            row += size
        return torch.cat(parts)

    p.draw = draw
    with torch.no_grad():
        steered = p.sample()
        plain = unet(x, timesteps=t, context=context)
    np.savez(target, steered=steered.numpy(), plain=plain.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
