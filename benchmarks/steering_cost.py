"""What steering costs: seconds of a steered picture over an unsteered one, in turns in one run, embedded model.

`python benchmarks/steering_cost.py [--rounds 9]` prints the ratio per way of steering (median, minimum and maximum).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from concept_steer import ConceptVector, Steer
from concept_steer.demo import model
from concept_steer.hosts.diffusers import DiffusersDenoiser, steer

STEPS, GUIDANCE = 20, 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    pipe = model.pipeline()
    channels = DiffusersDenoiser(pipe).channels
    generator = torch.Generator().manual_seed(0)
    constant = ConceptVector(0.1 * torch.randn(channels, generator=generator), "demo")
    spatial = ConceptVector(0.1 * torch.randn(channels, 8, 8, generator=generator), "demo")
    ways = {
        "none again": [],
        "one (C,)": [Steer(constant)],
        "one (C, H, W), resized": [Steer(spatial)],
        "gated": [Steer(constant, operator="gated")],
        "five": [Steer(constant, 0.2 * i) for i in range(1, 6)],
    }

    def seconds(steers: list[Steer]) -> float:
        began = time.perf_counter()
        with steer(pipe, steers):
            pipe(
                "a doctor",
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                output_type="latent",
                generator=torch.Generator().manual_seed(1),
            )
        return time.perf_counter() - began

    seconds([])
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    plain: list[float] = []
    for _ in range(rounds):
        for name, steers in ways.items():
            base = seconds([])
            plain.append(base)
            ratios[name].append(seconds(steers) / base)
    print(f"unsteered: {statistics.median(plain):.3f} s for {STEPS} steps with guidance, batch 1 (latents)")
    for name, values in ratios.items():
        print(f"{name}: x {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
