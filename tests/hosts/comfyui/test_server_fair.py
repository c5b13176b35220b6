"""Fair Sampling inside a graph: learned, balanced within one batch, left alone where the prompt says it."""

from __future__ import annotations

import numpy as np
import pytest

from .graphs import FASTEST, Graph

VALUES = "woman = a woman {} | a female {}\nman = a man {} | a male {}"
ROLES = "doctor\ndetective\nscientist\nteacher\nsinger\njudge"
PICTURES = 8


def fair_graph(prompt: str, save_as: str = "", **more):
    """(graph, node of the fair pictures, of the plain ones, of the judge's report, of Fair Sampling's report)"""
    g = Graph()
    demo = g.demo()
    latent = g("EmptyLatentImage", width=128, height=128, batch_size=PICTURES)
    learned = g(
        "ConceptSteerLearnAttribute",
        model=demo[0],
        clip=demo[1],
        name="gender",
        values=VALUES,
        roles=ROLES,
        method=FASTEST,
        vector_seed=0,
        size=0,
        save_as=save_as,
    )
    settings = {"targets": "", "mode": "exact shares (quota)", "run_seed": 0, "first": 0, "strength": 1.0, **more}
    fair = g(
        "ConceptSteerFair",
        model=demo[0],
        clip=demo[1],
        latent=latent,
        attribute=learned[0],
        prompt=prompt,
        phrases=True,
        **settings,
    )
    shown = []
    for model in (fair[0], demo[0]):
        sampled = g(
            "KSampler",
            model=model,
            positive=fair[1],
            negative=g.prompt(demo, ""),
            latent_image=latent,
            seed=1,
            steps=20,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        shown.append(g("VAEDecode", samples=sampled, vae=demo[2]))
    judge = g("ConceptSteerJudge", images=shown[0], attribute="gender")
    pictures = [g("PreviewImage", images=images) for images in shown]
    return g, pictures[0], pictures[1], g.text(judge[0]), g.text(fair[2])


@pytest.mark.slow
def test_one_batch_of_a_biased_role_is_balanced(client, vectors):
    g, fair, plain, judged, told = fair_graph("a mechanic", save_as="gender")
    run = client.queue(g)
    report = client.text(run, told)
    print(client.text(run, judged), report)
    assert "woman 4 (50%), man 4 (50%)" in report and "picture 7:" in report
    assert sorted(client.text(run, judged).split(", ")) == ["man 50%", "woman 50%"]
    assert np.abs(client.pictures(run, fair).astype(int) - client.pictures(run, plain)).max() > 30
    assert (vectors / "gender.attribute.safetensors").is_file()


@pytest.mark.slow
def test_a_prompt_that_names_the_attribute_is_drawn_as_it_is(client):
    g, fair, plain, _, told = fair_graph("a woman doctor")
    run = client.queue(g)
    assert "left alone" in client.text(run, told)
    assert np.array_equal(client.pictures(run, fair), client.pictures(run, plain))
