"""What Concept Steer costs in ComfyUI, in one process, as ratios: run it with ComfyUI's own Python.

`COMFYUI_PATH=~/ComfyUI ~/ComfyUI/venv/bin/python benchmarks/comfyui_cost.py [--rounds 5] [--cells 32 64]`
Steering: one model evaluation of an SD1.5-sized UNet (random weights) with both rows, steered over unsteered, in turns.
Learning: seconds and peak memory against sampling of the same size, on the same UNet.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

HOST = Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
HERE = Path(__file__).resolve().parents[1]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", help="only these ways, e.g. 'one vector'")
    parser.add_argument("--learn", action="store_true", help="also measure learning (minutes on a CPU)")
    return parser.parse_args()


def main() -> None:
    asked = options()
    sys.argv = ["main.py", "--cpu"]
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "concept_steer").symlink_to(HERE / "concept_steer")
    others = [p for p in sys.path if Path(p or ".").resolve() not in (HERE, HERE / "benchmarks")]
    sys.path[:] = [str(HOST), folder.name, *others]  # ComfyUI's `nodes` must be found, not ours
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(asked.threads)
    with torch.inference_mode():
        model = sd15()
        for cells in asked.cells:
            steering(model, cells, asked.rounds, asked.ways)
        if asked.learn:
            learning(model, min(asked.cells))


def sd15() -> Any:
    """A MODEL with SD 1.5's UNet from ComfyUI's own classes, random weights."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "context_dim": 768, "use_spatial_transformer": True, "use_linear_in_transformer": False,
        "adm_in_channels": None, "legacy": False, "dtype": torch.float32,
    }  # fmt: skip
    torch.manual_seed(0)
    made = comfy.supported_models.SD15(unet).get_model({}, "", device=torch.device("cpu"))
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(made, load_device=device, offload_device=device)


def clock() -> float:
    """Processor seconds on a CPU: other work on the machine hardly shows in them. Wall seconds elsewhere."""
    import comfy.model_management

    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()


def steering(model: Any, cells: int, rounds: int, only: list[str] | None = None) -> None:
    import comfy.samplers
    import torch

    from concept_steer import ConceptVector, Steer
    from concept_steer.hosts.comfy import steer_model

    vectors = [ConceptVector(0.1 * torch.randn(1280), "sd1") for _ in range(4)]
    mask = torch.zeros(cells * 8, cells * 8)
    mask[:, : cells * 4] = 1
    ways = {
        "unsteered again": model,
        "one vector": steer_model(model, [Steer(vectors[0])]),
        "four vectors": steer_model(model, [Steer(v) for v in vectors]),
        "one with a mask": steer_model(model, [Steer(vectors[0], mask=mask)]),
        "four with a mask": steer_model(model, [Steer(v, mask=mask) for v in vectors]),
    }
    ways = {name: patched for name, patched in ways.items() if not only or name in only}
    text = [[torch.randn(1, 77, 768), {}]]
    latent = torch.randn(1, 4, cells, cells)

    def seconds(patched: Any, steps: int = 3) -> list[float]:
        """Each step of one run but the first, which also pays for the set-up."""
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(text, text)
        guider.set_cfg(7.0)
        marks: list[float] = []
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.linspace(10.0, 1.0, steps + 1)
        guider.sample(
            latent, torch.zeros_like(latent), sampler, sigmas, disable_pbar=True,
            callback=lambda *_: marks.append(clock()), seed=1,
        )  # fmt: skip
        return [after - before for before, after in pairwise(marks)]

    seconds(model)
    for name, patched in ways.items():
        if patched is not model:
            own, whole = own_seconds(lambda way=patched: seconds(way, 2))
            print(
                f"  {name}: {1000 * own:.1f} ms of its own in {whole:.2f} s of sampling: x {1 + own / whole:.5f}",
                flush=True,
            )
    if not rounds:
        return
    base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, patched in ways.items():
            # plain and steered in turns, either first: what drifts (heat, other work) falls on both alike
            first, second = seconds(patched if turn % 2 else model), seconds(model if turn % 2 else patched)
            steered, plain = (first, second) if turn % 2 else (second, first)
            base += plain
            ratios[name] += [a / b for a, b in zip(steered, plain, strict=True)]
    middle = statistics.median(base)
    print(f"{cells} x {cells} latent: {middle:.3f} s a step, both rows, unsteered ({len(base)} steps)")
    for name, values in ratios.items():
        low, high = interval(values)
        print(
            f"  {name}: x {statistics.median(values):.3f} (95 % interval of the median {low:.3f} to {high:.3f})",
            flush=True,
        )


def own_seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that Concept Steer's functions and what they call took (the profiler's own time included), and all.

    What they call on the host's side is the model itself, which is not theirs: it runs with or without them.
    """
    profile = cProfile.Profile()
    began = time.perf_counter()
    profile.runcall(run)
    whole, own = time.perf_counter() - began, 0.0
    for entry in profile.getstats():
        if _ours(entry.code):
            own += entry.inlinetime + sum(
                call.totaltime for call in entry.calls or () if not _ours(call.code) and not _hosts(call.code)
            )
    return own, whole


def _ours(code: Any) -> bool:
    return "/concept_steer/" in getattr(code, "co_filename", "")


def _hosts(code: Any) -> bool:
    return str(HOST) + "/comfy" in getattr(code, "co_filename", "")


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def learning(model: Any, cells: int) -> None:
    import torch

    from concept_steer.denoiser import Conditioning
    from concept_steer.hosts.comfy_denoiser import ComfyDenoiser
    from concept_steer.learn import learn_score
    from concept_steer.sampling import sample

    class Random(ComfyDenoiser):
        def encode_text(self, prompts):  # no text encoder of SD's size at hand: a fixed random text for each prompt
            rows = [torch.randn(77, 768, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
            return Conditioning(torch.stack(rows))

    denoiser = Random(model, size=8 * cells)
    before = peak()
    began = time.perf_counter()
    sample(denoiser, ["a doctor"] * 4, seeds=range(4), steps=4, batch=4)
    sampled, at_sampling = time.perf_counter() - began, peak()
    result = learn_score(
        denoiser, [("a doctor", "a woman doctor")], steps=8, trajectories=4, sample_steps=3, batch=4, calibrate=False
    )
    print(f"sampling: 16 steps of 4 pictures, {sampled:.1f} s, peak {at_sampling:.0f} MB (at start {before:.0f})")
    print(f"learning: {result.seconds:.1f} s, {result.unet_rows:.0f} rows forward, {result.backward_rows} backward")
    print(f"  peak {peak():.0f} MB: x {peak() / at_sampling:.2f}")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
