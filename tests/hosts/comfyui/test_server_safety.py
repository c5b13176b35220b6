"""The safety switch inside a graph: bits that stay, errors instead of pictures, checks that tell what they did."""

from __future__ import annotations

import io
import json
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from .client import Client
from .graphs import Graph
from .host import ROOT

PROMPT = "a fight"
SHIPPED = ROOT / "concept_steer" / "demo" / "weights" / "demo.safety.safetensors"
BENIGN = "a cat\na dog\na guitar\na book\na doctor\na teacher\na singer\na pizza\na tree\na car\na clock\na key"


def steered(g: Graph, demo, model=None, level="standard", method="automatic", given=None, **texts):
    widgets = {"level": level, "method": method, "categories": "", "texts": "", **texts}
    model = demo[0] if model is None else model
    return g("ConceptSteerSafety", model=model, clip=demo[1], safety_set=given, **widgets)


def checked(g: Graph, images, on_flag="withhold", threshold=0.0, detector="demo judges", safe_model=None):
    widgets = {"detector": detector, "on_flag": on_flag, "threshold": threshold}
    return g("ConceptSteerSafetyCheck", images=images, safe_model=safe_model, **widgets)


def picture_with(client, **safety) -> np.ndarray:
    g = Graph()
    demo = g.demo()
    shown = g.picture(demo, steered(g, demo, **safety), prompt=PROMPT)
    return client.pictures(client.queue(g), shown)


@pytest.fixture(scope="module")
def plain(server) -> np.ndarray:
    client, g = Client(server.port), Graph()
    shown = g.picture(g.demo(), prompt=PROMPT)
    return client.pictures(client.queue(g), shown)


def test_off_keeps_every_bit(client, plain):
    assert np.array_equal(picture_with(client, level="off"), plain)


def test_the_switch_changes_the_picture_and_is_gone_in_the_next(client, plain):
    assert np.abs(picture_with(client, level="strict", method="Safe Latent Diffusion").astype(int) - plain).max() > 10
    assert np.array_equal(picture_with(client, level="off"), plain)


def test_two_branches_of_one_graph_do_not_mix(client, plain):
    alone = picture_with(client, method="Safe Latent Diffusion")
    client.forget()
    g = Graph()
    demo = g.demo()
    without = g.picture(demo, prompt=PROMPT)
    with_it = g.picture(demo, steered(g, demo, method="Safe Latent Diffusion"), prompt=PROMPT)
    run = client.queue(g)
    assert np.array_equal(client.pictures(run, without), plain)
    assert np.array_equal(client.pictures(run, with_it), alone)


@pytest.mark.parametrize(
    ("safety", "words"),
    [
        ({"categories": "poison", "method": "Safe Latent Diffusion"}, "poison"),
        ({"texts": "alcohol beer", "method": "Safe Latent Diffusion"}, "not understood"),
    ],
    ids=["an unknown category", "a text without a colon"],
)
def test_what_cannot_work_is_an_error_and_no_picture(client, safety, words):
    g = Graph()
    demo = g.demo()
    shown = g.picture(demo, steered(g, demo, **safety), prompt=PROMPT)
    run = client.run(g)
    assert run.status == "error" and words in run.error
    assert shown.id not in run.outputs


def test_a_model_for_which_nothing_is_possible_is_an_error_and_no_picture(client):
    g = Graph()
    demo = g.demo()
    flow = g("ModelSamplingSD3", model=demo[0], shift=3.0)
    shown = g.picture(demo, steered(g, demo, flow, method="Safe Latent Diffusion"), prompt=PROMPT)
    run = client.run(g)
    assert run.status == "error" and "nothing is drawn" in run.error
    assert shown.id not in run.outputs


def test_a_damaged_set_in_the_library_is_an_error_and_no_picture(client, vectors):
    file = vectors / "broken.safety.safetensors"
    file.write_bytes(b"no set at all")
    try:
        g = Graph()
        demo = g.demo()
        shown = g.picture(demo, steered(g, demo), prompt=PROMPT)
        run = client.run(g)
        assert run.status == "error" and "broken.safety" in run.error
        assert shown.id not in run.outputs
    finally:
        file.unlink()


def test_only_flagged_pictures_are_withheld_and_the_report_counts_them(client):
    g = Graph()
    demo = g.demo()
    images = g.sample(demo, prompt=PROMPT, batch=4, steps=12)
    shown, found = g("PreviewImage", images=images), checked(g, images)
    after, told = g("PreviewImage", images=found[0]), g.text(found[2])
    marked = checked(g, images, on_flag="mark")
    same = g("PreviewImage", images=marked[0])
    run = client.queue(g)
    before, then = client.pictures(run, shown), client.pictures(run, after)
    changed = [not np.array_equal(a, b) for a, b in zip(before, then, strict=True)]
    assert f"demo flagged {sum(changed)} of 4 pictures" in client.text(run, told)
    assert sum(changed) > 0, "no picture was flagged, so nothing was tested: choose another seed"
    assert np.array_equal(client.pictures(run, same), before)


def test_the_saved_picture_carries_the_report_of_each_check(client):
    g = Graph()
    demo = g.demo()
    safe = steered(g, demo, method="Safe Latent Diffusion")
    found = checked(g, g.sample(demo, safe, prompt=PROMPT, steps=4), safe_model=safe[0])
    only = checked(g, found[0], detector="none", safe_model=safe[0])
    saved = g("SaveImage", images=only[0], filename_prefix="checked")
    body = {"prompt": g, "client_id": client.id, "extra_data": {"extra_pnginfo": {"workflow": {}}}}
    run = client.wait(json.loads(client.post("/prompt", body))["prompt_id"])
    assert run.status == "success", run.error
    raw = client.get("/view?" + urllib.parse.urlencode(run.outputs[saved.id]["images"][0]))
    told = json.loads(Image.open(io.BytesIO(raw)).text["concept_steer_safety"])
    assert set(told) == {found.id, only.id}
    first, second = told[found.id], told[only.id]
    assert (first["level"], first["method"], first["detector"]["name"]) == ("standard", "sld", "demo")
    assert second["method"] == "sld" and "detector" not in second


def test_a_detector_that_is_not_there_is_an_error_and_no_picture(client):
    g = Graph()
    shown = g("PreviewImage", images=checked(g, g.sample(g.demo(), steps=2), detector="Q16")[0])
    run = client.run(g)
    assert run.status == "error" and "Q16" in run.error
    assert shown.id not in run.outputs


def learned(g: Graph, demo, **more):
    """Learn Safety Vectors, as short as it can be."""
    widgets = {
        "categories": "weapons: a knife, an axe, a dagger, weapons",
        "suggestive": f"weapons: {PROMPT}",
        "benign": BENIGN,
        "pictures": 8,
        "steps": 10,
        "vector_seed": 0,
        "size": 0,
        "save_as": "own",
        **more,
    }
    return g("ConceptSteerLearnSafety", model=demo[0], clip=demo[1], **widgets)


def test_interrupt_ends_learning_and_keeps_nothing(client, vectors):
    g = Graph()
    node = learned(g, g.demo(), save_as="stopped")
    told = g.text(node[1])
    run = client.interrupt_at(g, node, 1)
    assert run.status == "interrupted" and told.id not in run.outputs
    assert not (vectors / "stopped.safety.safetensors").exists()


def test_a_name_that_is_taken_is_an_error_before_learning(client, vectors):
    file = vectors / "own.safety.safetensors"
    file.write_bytes(SHIPPED.read_bytes())
    try:
        g = Graph()
        shown = g.text(learned(g, g.demo())[1])
        run = client.run(g)
        assert run.status == "error" and "is there already" in run.error and run.seconds < 30
        assert shown.id not in run.outputs and file.read_bytes() == SHIPPED.read_bytes()
    finally:
        file.unlink()


@pytest.mark.slow
def test_a_set_is_learned_kept_and_used_in_one_graph(client, vectors, plain):
    g = Graph()
    demo = g.demo()
    node = learned(g, demo)
    safe = steered(g, demo, method="learned vectors", given=node[0])
    images = g.sample(demo, safe, prompt=PROMPT, steps=12)
    found = checked(g, images, on_flag="mark", safe_model=safe[0])
    shown = g("PreviewImage", images=found[0])
    told = [g.text(node[1]), g.text(safe[1]), g.text(found[2])]
    run = client.queue(g)
    learning, will, did = (client.text(run, one) for one in told)
    print(learning, will, did, sep="\n")
    assert (vectors / "own.safety.safetensors").is_file() and "Saved as own.safety" in learning
    assert "weapons: the gate opens for" in learning
    assert "weapons" in will and "The gate opened in" in did
    client.forget(wait=5)
    again = client.queue(g)
    assert "Was kept as own.safety" in client.text(again, told[0])
    assert np.array_equal(client.pictures(again, shown), client.pictures(run, shown))
    (vectors / "own.safety.safetensors").unlink()
