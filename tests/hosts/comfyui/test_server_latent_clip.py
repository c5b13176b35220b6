"""Load Latent CLIP, Score Latents and Pick Best Latents in a real graph, on the embedded model."""

from __future__ import annotations

import numpy as np
import pytest

from .graphs import Graph

PROMPT, OTHER = "a woman doctor", "a man firefighter"


def drawn(batch: int = 4):
    """(graph, demo model, its latent CLIP, KSampler's latents, the pictures of all of them)"""
    g = Graph()
    demo = g.demo()
    pictures = g.sample(demo, prompt=PROMPT, batch=batch)
    return g, demo, g("ConceptSteerLoadLatentClip", name="demo (embedded)"), g.sampler, pictures


def places(report: str) -> list[int]:
    return [int(line.split(":")[0]) - 1 for line in report.splitlines()]


@pytest.mark.slow
def test_the_best_of_a_batch_are_decoded_best_first_and_the_scores_agree(client):
    g, demo, clip, latents, everything = drawn()
    scored = g("ConceptSteerScoreLatents", latent_clip=clip, samples=latents, texts=f"{PROMPT}\n{OTHER}", model=demo[0])
    picked = g(
        "ConceptSteerPickLatents", latent_clip=clip, samples=latents, text=PROMPT, count=2, avoid="", model=demo[0]
    )
    best = g("PreviewImage", images=g("VAEDecode", samples=picked, vae=demo[2]))
    every = g("PreviewImage", images=everything)
    told, order = g.text(scored), g.text(picked[1])
    run = client.queue(g)
    lines = client.text(run, told).splitlines()
    cosines = [float(line.split(f"{PROMPT} ")[1].split()[0]) for line in lines]
    ranked = places(client.text(run, order))
    assert len(lines) == 4 and [cosines[i] for i in ranked] == sorted(cosines, reverse=True)
    kept, pictures = client.pictures(run, best), client.pictures(run, every)
    assert len(kept) == 2
    for picture, place in zip(kept, ranked, strict=False):
        assert np.abs(picture.astype(int) - pictures[place]).max() <= 3  # decoded in another batch


@pytest.mark.slow
def test_what_cannot_be_judged_is_an_error_on_the_node(client):
    g, demo, clip, latents, _ = drawn(1)
    empty = g("EmptyLatentImage", width=128, height=128, batch_size=1)
    g.text(g("ConceptSteerScoreLatents", latent_clip=clip, samples=empty, texts=PROMPT, model=demo[0]))
    assert "nothing has been drawn" in client.error(g)
    g, demo, clip, latents, _ = drawn(1)
    picked = {"latent_clip": clip, "samples": latents, "text": PROMPT, "avoid": "", "model": demo[0]}
    g.text(g("ConceptSteerPickLatents", count=2, **picked)[1])
    assert "best 2 of 1" in client.error(g)
