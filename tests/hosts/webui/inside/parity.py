"""Runs in the web UI's Python: ldm's own UNetModel with the embedded model's weights, steered through our hook.

parity.py REPOSITORY WEBUI INPUT.npz OUTPUT.npz; the input holds x, t, context, the vector and the jobs as JSON.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import torch


class Run:
    """p, as far as a job meets it."""

    def __init__(self, batch):
        self.batch_size, self.iteration, self.is_hr_pass = batch, 0, False
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

    def steered(settings, calls):
        p = Run(batch)
        begin(p, Settings.from_dict(settings), TorchHook(lambda: unet), lambda name: vector)

        def draw():
            denoiser = SimpleNamespace(p=p, sampler=None)
            params = SimpleNamespace(x=x, text_cond=context[:batch], text_uncond=context[batch:], denoiser=denoiser)
            job = Job.of(p)
            job.careful(lambda: job.before_evaluation(params))
            parts = zip(x.split(calls), t.split(calls), context.split(calls), strict=True)
            return torch.cat([unet(rows, timesteps=times, context=texts) for rows, times, texts in parts])

        p.draw = draw
        return p.sample()

    with torch.no_grad():
        found = {f"steered {i}": steered(**job).numpy() for i, job in enumerate(about["jobs"])}
        plain = unet(x, timesteps=t, context=context)  # last: nothing has stayed
    np.savez(target, plain=plain.numpy(), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
