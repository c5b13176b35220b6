"""Learning inside a graph: a vector that works at once, interrupts that keep the best so far, kept results."""

from __future__ import annotations

import re

import numpy as np
import pytest

from concept_steer.vector import ConceptVector

from .client import Client
from .graphs import BEST, Graph


def plain_picture(client, **more) -> np.ndarray:
    g = Graph()
    shown = g.picture(g.demo(), **more)
    return client.pictures(client.queue(g), shown)


@pytest.fixture(scope="module")
def plain(server) -> np.ndarray:
    return plain_picture(Client(server.port))


def learn_and_steer(**settings):
    """(graph, the learning node, the picture's node)"""
    g = Graph()
    demo = g.demo()
    learn = g.learn(demo, **settings)
    return g, learn, g.picture(demo, g.steer(demo, learn))


def test_difference_of_means_is_learned_used_and_reported(client, plain):
    g, learn, shown = learn_and_steer(preview=True)
    told = g.text(learn[1])
    run = client.queue(g)
    assert np.abs(client.pictures(run, shown).astype(int) - plain).max() > 30
    report = client.text(run, told)
    assert "a woman doctor: learned by difference" in report and "tells the two prompts apart" in report
    images = run.outputs[learn.id]["images"]
    assert len(images) == 1  # before and after; there is no curve without steps


def test_learning_is_not_done_again_while_nothing_changes(client):
    g, learn, shown = learn_and_steer()
    client.queue(g)
    run = client.queue(g)
    assert learn.id in run.cached and shown.id in run.outputs
    changed, learn, _ = learn_and_steer(vector_seed=1)
    assert learn.id not in client.queue(changed).cached


def test_the_same_seed_learns_the_same_vector_twice(client, vectors):
    for name in ("once", "twice"):
        client.forget()
        g = Graph()
        g.save(g.learn(g.demo(), vector_seed=3), name, overwrite=True)
        client.queue(g)
    once, twice = (ConceptVector.load(vectors / f"{name}.safetensors") for name in ("once", "twice"))
    assert once == twice and once.family == "demo" and once.info["prompt_positive"] == "a woman doctor"


def test_learning_shows_its_progress_and_pictures(client):
    g, learn, _ = learn_and_steer(method=BEST, steps=8, preview=True)
    with client.listening() as listener:
        client.queue(g)
        values = [
            message["data"]["value"]
            for message in listener.messages
            if message.get("type") == "progress" and message["data"].get("node") == learn.id
        ]
    assert values and values == sorted(values) and values[-1] == 100
    assert len(set(values)) > 8 and listener.pictures >= 2


def test_an_interrupt_while_learning_keeps_the_vector_for_the_next_run(client, plain):
    g, learn, shown = learn_and_steer(method=BEST, steps=400)
    stopped = client.interrupt_at(g, learn, 46)
    assert stopped.status == "interrupted" and shown.id not in stopped.outputs
    run = client.queue(g)
    assert learn.id in run.cached
    assert run.seconds < 30
    assert np.abs(client.pictures(run, shown).astype(int) - plain).max() > 10
    client.forget()
    assert np.array_equal(plain_picture(client), plain)


def test_an_interrupt_while_trajectories_are_drawn_is_a_plain_interrupt(client, plain):
    g, learn, _ = learn_and_steer(method=BEST, steps=400, examples=256)
    assert client.interrupt_at(g, learn, 2).status == "interrupted"
    assert np.array_equal(plain_picture(client), plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"positive": "a doctor"}, ("'a doctor'", "nothing to learn")),
        ({"neutral": "a\nb", "positive": "c\nd\ne"}, ("2 neutral prompts", "3 with the concept")),
        ({"neutral": " \n"}, ("neutral prompt",)),
    ],
    ids=["equal prompts", "uneven lists", "no prompt"],
)
def test_prompts_that_cannot_teach_are_refused_with_words(client, settings, words):
    text = client.error(learn_and_steer(**settings)[0])
    assert all(word in text for word in words), text


def test_pictures_teach_a_concept(client, vectors):
    g = Graph()
    demo = g.demo()
    shown = g.sample(demo, prompt="a woman doctor", batch=5, steps=10)
    settings = {"prompt": "a doctor", "steps": 6, "vector_seed": 0, "title": "mine", "size": 0, "spatial": False}
    learn = g("ConceptSteerLearnPictures", model=demo, clip=demo[1], vae=demo[2], images=shown, **settings)
    g.save(learn, "mine", overwrite=True)
    told = g.text(learn[1])
    run = client.queue(g)
    found = ConceptVector.load(vectors / "mine.safetensors")
    assert found.family == "demo" and found.norm > 0 and "mine" in client.text(run, told)


@pytest.mark.slow
def test_learn_steer_and_judge_in_one_graph(client):
    """The share of women among doctors rises; the judges are those of `concept-steer demo`."""
    pairs = {
        "neutral": "a doctor\na detective\na scientist\na villain",
        "positive": "a woman doctor\na woman detective\na woman scientist\na woman villain",
    }
    g = Graph()
    demo = g.demo()
    learn = g.learn(demo, method=BEST, steps=60, examples=24, **pairs)
    shares = {}
    for name, model in (("plain", demo), ("steered", g.steer(demo, learn))):
        images = g.sample(demo, model, prompt="a pilot", steps=15, batch=16)
        shares[name] = g.text(g("ConceptSteerJudge", images=images, attribute="gender"))
    told = g.text(learn[1])
    run = client.queue(g)
    found = {name: _women(client.text(run, node)) for name, node in shares.items()}
    print(found, client.text(run, told))
    assert found["steered"] >= 0.6 and found["steered"] >= found["plain"] + 0.2


def _women(report: str) -> float:
    match = re.search(r"\bwoman (\d+)%", report)
    return int(match[1]) / 100 if match else 0.0
