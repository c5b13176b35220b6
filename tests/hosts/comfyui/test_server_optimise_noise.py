"""Optimise Noise in a real graph, on the embedded model's one-step student."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from .graphs import Graph, Node

PROMPT = "a woman pilot"


def optimised(iterations: int, **more: Any) -> tuple[Graph, Node, Node, Node]:
    """(graph, student, latent image, Optimise Noise) of two pictures."""
    g = Graph()
    student = g("ConceptSteerLoadDemoStudent")
    empty = g("EmptyLatentImage", width=128, height=128, batch_size=2)
    settings = {"prompt": PROMPT, "text": "", "absent": "", "start_seed": 7, "steps": 1, "rate": 0.0, **more}
    found = g(
        "ConceptSteerOptimiseNoise",
        latent_clip=g("ConceptSteerLoadLatentClip", name="demo (embedded)"),
        model=student[0],
        clip=student[1],
        latent_image=empty,
        iterations=iterations,
        vae=student[2],
        **settings,
    )
    return g, student, empty, found


def one_step(g: Graph, student: Node, empty: Node, noise: Any) -> Node:
    """SamplerCustomAdvanced: one step from this NOISE, without guidance."""
    guider = g("BasicGuider", model=student[0], conditioning=g.prompt(student, PROMPT))
    sigmas = g("BasicScheduler", model=student[0], scheduler="normal", steps=1, denoise=1.0)
    sampler = g("KSamplerSelect", sampler_name="euler")
    given = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": empty}
    return g("PreviewImage", images=g("VAEDecode", samples=g("SamplerCustomAdvanced", **given), vae=student[2]))


def rewards(report: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"^reward ([-\d.]+) to ([-\d.]+),", report, re.MULTILINE)]


@pytest.mark.slow
def test_the_noise_climbs_and_the_hosts_own_sampler_draws_the_same_pictures_from_it(client):
    g, student, empty, found = optimised(4, absent="alcohol")
    finished = g("PreviewImage", images=g("VAEDecode", samples=found, vae=student[2]))
    again = one_step(g, student, empty, found[1])
    plain = one_step(g, student, empty, g("RandomNoise", noise_seed=7))
    report = g.text(found[2])
    run = client.queue(g)
    pairs = rewards(client.text(run, report))
    assert len(pairs) == 2 and all(after > before for before, after in pairs)
    mine, theirs, start = (client.pictures(run, node) for node in (finished, again, plain))
    for one, other, first in zip(mine, theirs, start, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 1.5
        assert np.abs(one.astype(int) - first).mean() > 3


@pytest.mark.slow
def test_the_first_iteration_is_what_the_sampler_draws_with_that_seed(client):
    g, student, empty, found = optimised(1)
    finished = g("PreviewImage", images=g("VAEDecode", samples=found, vae=student[2]))
    plain = one_step(g, student, empty, g("RandomNoise", noise_seed=7))
    run = client.queue(g)
    for one, other in zip(client.pictures(run, finished), client.pictures(run, plain), strict=True):
        assert np.abs(one.astype(int) - other).mean() < 1.5


@pytest.mark.slow
def test_no_prompt_is_an_error_on_the_node(client):
    g, *_, found = optimised(1, prompt=" ")
    g.text(found[2])
    assert "type one into `prompt`" in client.error(g)
