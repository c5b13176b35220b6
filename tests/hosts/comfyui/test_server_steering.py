"""Steering through POST /prompt, as a browser would: the same pictures where nothing is to change, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from .graphs import Graph
from .vectors import random_vector


@pytest.fixture(scope="module", autouse=True)
def files(vectors):
    """Two vectors of the demo family, under names of their own."""
    random_vector(1).save(vectors / "first.safetensors", overwrite=True)
    random_vector(2).save(vectors / "second.safetensors", overwrite=True)


def plain_picture(client, **more) -> np.ndarray:
    g = Graph()
    shown = g.picture(g.demo(), **more)
    return client.pictures(client.queue(g), shown)


def steered_picture(client, *names: str, strength: float = 1.0, **settings) -> np.ndarray:
    g = Graph()
    demo = g.demo()
    model = demo
    for name in names:
        model = g.steer(model, g.vector(name), strength, **settings)
    shown = g.picture(demo, model)
    return client.pictures(client.queue(g), shown)


@pytest.fixture(scope="module")
def plain(server) -> np.ndarray:
    from .client import Client

    return plain_picture(Client(server.port))


def test_every_node_and_input_is_explained(client):
    info = {name: node for name, node in client.object_info().items() if name.startswith("ConceptSteer")}
    wanted = {"LoadDemo", "Judge", "LoadVector", "SaveVector", "Info", "Mix", "", "Prompt", "Strip"}
    assert {f"ConceptSteer{name}" for name in wanted | {"LearnPrompts", "LearnPictures"}} <= set(info)
    for name, node in info.items():
        assert node["display_name"] and node["description"] and node["category"] == "Concept Steer", name
        for inputs in node["input"].values():
            for key, given in inputs.items():
                if given[0] not in ("UNIQUE_ID", "PROMPT", "EXTRA_PNGINFO"):
                    assert given[1].get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]), name


def test_the_demo_model_draws_two_different_pictures(plain):
    assert plain.shape == (2, 128, 128, 3) and plain.std() > 20
    assert np.abs(plain[0].astype(int) - plain[1]).max() > 50


@pytest.mark.parametrize(
    ("strength", "settings"),
    [(0.0, {}), (1.0, {"start": 0.3, "end": 0.31}), (0.0, {"rows": "both", "operator": "remove"})],
    ids=["strength 0", "outside the window", "strength 0 of remove"],
)
def test_neutral_settings_keep_every_bit_of_the_picture(client, plain, strength, settings):
    assert np.array_equal(steered_picture(client, "first", strength=strength, **settings), plain)


def test_a_vector_changes_the_picture_and_is_gone_in_the_next(client, plain):
    assert np.abs(steered_picture(client, "first").astype(int) - plain).max() > 30
    client.forget()
    assert np.array_equal(plain_picture(client), plain)


@pytest.mark.parametrize("steered_first", [True, False])
def test_two_branches_of_one_graph_do_not_mix(client, plain, steered_first):
    alone = steered_picture(client, "first")
    client.forget()
    g = Graph()
    demo = g.demo()
    steered = lambda: g.picture(demo, g.steer(demo, g.vector("first")))  # noqa: E731
    if steered_first:
        with_vector, without = steered(), g.picture(demo)
    else:
        without, with_vector = g.picture(demo), steered()
    run = client.queue(g)
    assert np.array_equal(client.pictures(run, without), plain)
    assert np.array_equal(client.pictures(run, with_vector), alone)


def test_the_order_of_the_stack_does_not_matter(client):
    both = steered_picture(client, "first", "second")
    assert np.array_equal(steered_picture(client, "second", "first"), both)
    assert not np.array_equal(steered_picture(client, "first"), both)


def test_a_mix_with_weight_2_at_strength_1_is_the_vector_at_2(client):
    g = Graph()
    demo = g.demo()
    weights = {"weight_1": 2.0, "weight_2": 1.0, "weight_3": 1.0, "weight_4": 1.0}
    mix = g("ConceptSteerMix", vector_1=g.vector("first"), mode="weighted sum", **weights)
    doubled, strong = g.picture(demo, g.steer(demo, mix)), g.picture(demo, g.steer(demo, g.vector("first"), 2.0))
    run = client.queue(g)
    assert np.array_equal(client.pictures(run, doubled), client.pictures(run, strong))


def test_steering_the_only_prompt_is_steering_the_model(client):
    g = Graph()
    demo = g.demo()
    settings = {"strength": 1.0, "start": 0.0, "end": 1.0, "fade": 0.0, "operator": "add"}
    prompt = g("ConceptSteerPrompt", conditioning=g.prompt(demo, "a doctor"), vector=g.vector("first"), **settings)
    shown = g.picture(demo, positive=prompt)
    assert np.array_equal(client.pictures(client.queue(g), shown), steered_picture(client, "first"))


def test_a_mask_says_where_and_a_black_one_is_nowhere(client, plain):
    """That the vector keeps to its region is proved on h, in inside/check_prompt.py; pictures mix their regions."""
    g = Graph()
    demo = g.demo()
    black = g("SolidMask", value=0.0, width=128, height=128)
    white = g("SolidMask", value=1.0, width=64, height=128)
    half = g("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")
    nowhere, left = (g.picture(demo, g.steer(demo, g.vector("first"), mask=mask)) for mask in (black, half))
    run = client.queue(g)
    assert np.array_equal(client.pictures(run, nowhere), plain)
    found = client.pictures(run, left)
    assert not np.array_equal(found, plain)
    assert not np.array_equal(found, steered_picture(client, "first"))


def test_an_interrupt_while_sampling_leaves_nothing_behind(client, plain):
    g = Graph()
    demo = g.demo()
    g.picture(demo, g.steer(demo, g.vector("first")), steps=500)
    assert client.interrupt_at(g, g.sampler, 3).status == "interrupted"
    client.forget()
    assert np.array_equal(plain_picture(client), plain)


def test_an_error_while_sampling_leaves_nothing_behind(client, plain, vectors):
    """A vector of another family on a prompt is found out when the sampler runs."""
    random_vector(3, "sd1", 1280).save(vectors / "for sd.safetensors", overwrite=True)
    g = Graph()
    demo = g.demo()
    settings = {"strength": 1.0, "start": 0.0, "end": 1.0, "fade": 0.0, "operator": "add"}
    wrong = g("ConceptSteerPrompt", conditioning=g.prompt(demo, "a doctor"), vector=g.vector("for sd"), **settings)
    g.picture(demo, g.steer(demo, g.vector("first")), positive=wrong)
    text = client.error(g)
    assert "Stable Diffusion 1.x (sd1)" in text and "demo model (demo)" in text
    assert np.array_equal(plain_picture(client), plain)


def test_a_strip_has_a_cell_for_every_strength_and_seed_and_strength_0_is_the_samplers_picture(client):
    g = Graph()
    demo = g.demo()
    latent = g("EmptyLatentImage", width=128, height=128, batch_size=1)
    settings = {"first_seed": 7, "seeds": 2, "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    positive, negative = g.prompt(demo, "a doctor"), g.prompt(demo, "")
    sockets = {"positive": positive, "negative": negative, "vae": demo[2], "latent": latent}
    vector = g.vector("first")
    g("ConceptSteerStrip", model=demo, vector=vector, strengths="-1, 0, 1", **sockets, **settings)
    (strip,) = client.pictures(client.queue(g), str(len(g)))
    assert strip.shape[0] > 2 * 128 and strip.shape[1] > 3 * 128
    single = plain_picture(client, batch=1)[0].astype(int)
    tops, lefts = strip.shape[0] - 127, strip.shape[1] - 127
    coarse = single[::16, ::16]
    off = {
        (t, x): np.abs(strip[t : t + 128 : 16, x : x + 128 : 16] - coarse).max()
        for t in range(tops)
        for x in range(lefts)
    }
    top, left = min(off, key=lambda place: off[place])
    assert np.abs(strip[top : top + 128, left : left + 128] - single).max() <= 2
