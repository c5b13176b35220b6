"""Learn Erasing and Erase Prompt in real graphs: files that stock nodes use, errors in words, Interrupt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from concept_steer.demo import architecture, drawing
from concept_steer.geom_erasing.embedding import LocationTokens

from .client import Client
from .graphs import Graph, Node

TOKENS, BOTH, MASKED = "tokens (model removal)", "tokens + LoRA (data removal)", "masked LoRA (no words needed)"
COUNT, MARKED = 10, 6


def files_of(base: Path, server: Any, folder: str, mark: int) -> str:
    """A picture file of COUNT frames, which Load Image gives as a batch; a watermark is painted on the first `mark`."""
    client, g = Client(server.port), Graph()
    shown = g.picture(g.demo(), batch=COUNT)
    drawn = client.pictures(client.queue(g), shown)
    rng = np.random.default_rng(0)
    frames = [drawing.watermark(one, rng)[0] if i < mark else one for i, one in enumerate(drawn)]
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(base / "input" / folder, save_all=True, append_images=rest)
    return folder


@pytest.fixture(scope="module")
def marked(base: Path, server: Any) -> str:
    return files_of(base, server, "marked.png", MARKED)


def learn(g: Graph, demo: Node, file: str, way: str = TOKENS, **more: Any) -> Node:
    settings = {
        "captions": "a doctor",
        "detector": "demo-watermark",
        "threshold": 0.5,
        "concept": "",
        "bins": 4,
        "steps": 4,
        "batch": 2,
        "rank": 4,
        "token_seed": 0,
        "name": "",
        "save": True,
        "overwrite": True,
        **more,
    }
    pictures = g("LoadImage", image=file)
    return g("ConceptSteerLearnErasing", model=demo[0], clip=demo[1], vae=demo[2], images=pictures, way=way, **settings)


def erase(g: Graph, demo: Node, text: str = "", embedding: str = "", learned: Any = None) -> Node:
    return g("ConceptSteerErasePrompt", clip=demo[1], text=text, embedding=embedding, learned=learned)


def picture(g: Graph, demo: Node, model: Any = None, negative: Any = "") -> Node:
    """Two pictures with this negative prompt, read by the stock node."""
    latent = g(
        "KSampler",
        model=demo[0] if model is None else model,
        positive=g.prompt(demo, "a pilot"),
        negative=g("CLIPTextEncode", clip=demo[1], text=negative),
        latent_image=g("EmptyLatentImage", width=128, height=128, batch_size=2),
        seed=3,
        steps=6,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return g("PreviewImage", images=g("VAEDecode", samples=latent, vae=demo[2]))


def test_an_embedding_is_learned_and_stock_nodes_use_it_in_the_same_graph_and_in_the_next(client, marked, base):
    g = Graph()
    demo = g.demo()
    found = learn(g, demo, marked, name="no-mark")
    prompt = erase(g, demo, "blurry,", learned=found[1])
    report, written, tokens, name = (g.text(one) for one in (found[2], prompt[0], prompt[1], found[1]))
    plain, erased = picture(g, demo, negative="blurry"), picture(g, demo, negative=prompt[0])
    where = g("PreviewImage", images=found[3])
    with client.listening() as listener:
        run = client.queue(g)
        assert listener.pictures >= 2
    told = client.text(run, report)
    assert f"'watermark' was found in {MARKED} of {COUNT} pictures (60%)" in told
    assert "finished after 4 steps" in told and "Saved: embeddings/no-mark.safetensors." in told
    assert client.text(run, name) == "no-mark"
    assert client.text(run, written) == "blurry, embedding:no-mark"
    assert "'watermark' (3) and 4 x 4 places (16)\ntogether: 23 of 75" in client.text(run, tokens)
    assert client.pictures(run, where).std() > 5 and len(run.outputs[found.id]["images"]) == 2
    first, second = (client.pictures(run, one).astype(int) for one in (plain, erased))
    assert np.abs(first - second).max() > 10

    saved = LocationTokens.load(base / "models" / "embeddings" / "no-mark.safetensors")
    assert (saved.concept, saved.bins, saved.info["family"]) == ("watermark", 4, "demo")
    g = Graph()
    again = picture(g, g.demo(), negative="blurry, embedding:no-mark")
    assert np.array_equal(client.pictures(client.queue(g), again), second)
    chosen = client.object_info()["ConceptSteerErasePrompt"]["input"]["required"]["embedding"]
    assert "no-mark" in str(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("way", [MASKED, BOTH])
def test_a_lora_is_learned_and_the_stock_loader_loads_the_same(client, marked, base, peft, way):
    g = Graph()
    demo = g.demo()
    found = learn(g, demo, marked, way, name="no-mark-lora", steps=12)
    report, name = g.text(found[2]), g.text(found[1])
    plain, erased = picture(g, demo), picture(g, demo, found[0])
    run = client.queue(g)
    assert "loras/no-mark-lora.safetensors" in client.text(run, report)
    assert client.text(run, name) == ("" if way == MASKED else "no-mark-lora")
    first, second = (client.pictures(run, one).astype(int) for one in (plain, erased))
    assert np.abs(first - second).max() > 3
    g = Graph()
    demo = g.demo()
    file = {"lora_name": "no-mark-lora.safetensors", "strength_model": 1.0}
    again = picture(g, demo, g("LoraLoaderModelOnly", model=demo[0], **file))
    assert np.array_equal(client.pictures(client.queue(g), again), second)


def test_an_interrupt_keeps_what_is_learned(client, marked, base):
    g = Graph()
    demo = g.demo()
    found = learn(g, demo, marked, steps=400, name="stopped")
    shown = picture(g, demo, negative=erase(g, demo, learned=found[1])[0])
    stopped = client.interrupt_at(g, found, 16)
    assert stopped.status == "interrupted" and shown.id not in stopped.outputs
    saved = LocationTokens.load(base / "models" / "embeddings" / "stopped.safetensors")
    assert 0 < int(saved.info["steps"]) < 400
    run = client.queue(g)
    assert found.id in run.cached and shown.id in run.outputs


def test_an_interrupt_while_the_pictures_are_looked_at_is_a_plain_interrupt(client, marked, base):
    g = Graph()
    found = learn(g, g.demo(), marked, name="never")
    assert client.interrupt_at(g, found, 1).status == "interrupted"
    assert not (base / "models" / "embeddings" / "never.safetensors").exists()


def test_pictures_without_the_thing_teach_nothing_and_say_so(client, base, server):
    clean = files_of(base, server, "clean.png", 0)
    g = Graph()
    learn(g, g.demo(), clean, detector="demo-watermark", threshold=1.0)
    text = client.error(g)
    assert "found 'watermark' in 0 of 10 pictures" in text and "lower the detector's threshold" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"captions": "one\ntwo"}, ("10 pictures", "2 captions")),
        ({"name": "../up"}, ("'../up'", "name of an embedding")),
        ({"bins": 8, "concept": "a watermark that says so " * 4, "name": "no-room"}, ("do not fit", "fewer bins")),
    ],
    ids=["captions", "a path as a name", "too many places"],
)
def test_settings_that_cannot_work_are_refused_with_words(client, marked, settings, words):
    g = Graph()
    learn(g, g.demo(), marked, **settings)
    text = client.error(g)
    assert all(word in text for word in words), text


def test_a_name_that_is_taken_is_refused_before_learning_unless_it_may_be_overwritten(client, marked):
    for overwrite, name in ((True, "taken"), (False, "taken")):
        g = Graph()
        learn(g, g.demo(), marked, name=name, overwrite=overwrite, steps=1)
        if overwrite:
            client.queue(g)
        else:
            assert "is there already" in client.error(g)


def test_what_is_not_saved_is_not_there_and_that_is_said(client, marked, base):
    g = Graph()
    demo = g.demo()
    found = learn(g, demo, marked, name="not-kept", save=False, steps=1)
    g.text(erase(g, demo, learned=found[1])[0])
    text = client.error(g)
    assert "no embedding 'not-kept'" in text and "save" in text
    assert not (base / "models" / "embeddings" / "not-kept.safetensors").exists()


def test_a_negative_prompt_that_does_not_fit_is_an_error(client, base):
    tokens = LocationTokens("many", "mark", 8, {"clip_l": random_rows(1)}, {"clip_l": random_rows(64)})
    tokens.save(base / "models" / "embeddings" / "many.safetensors", overwrite=True)
    g = Graph()
    demo = g.demo()
    told = g.text(erase(g, demo, "blurry", "many")[1])
    assert "of 75 tokens" in client.text(client.queue(g), told)
    g = Graph()
    g.text(erase(g, g.demo(), "blurry and ugly " * 8, "many")[0])
    text = client.error(g)
    assert "75 fit" in text and "fewer words" in text


def test_an_embedding_of_another_model_is_refused(client, base):
    tokens = LocationTokens("wide", "mark", 2, {"clip_l": random_rows(1, 768)}, {"clip_l": random_rows(4, 768)})
    tokens.save(base / "models" / "embeddings" / "wide.safetensors", overwrite=True)
    g = Graph()
    g.text(erase(g, g.demo(), embedding="wide")[0])
    assert "tokens of 768 numbers" in client.error(g)


def random_rows(count: int, width: int = 0) -> Any:
    return torch.randn(count, width or architecture.TEXT_WIDTH, generator=torch.Generator().manual_seed(0)) * 0.05
