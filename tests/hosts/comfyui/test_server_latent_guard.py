"""Latent Guard in a real graph: flagged pictures are withheld or steered, the others keep every bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from concept_steer.demo import latent_clip as embedded
from concept_steer.latent_clip import ClipConfig, LatentClipModel, convert, space
from concept_steer.latent_clip.model import TowerSize
from concept_steer.safety.check import withheld

from .graphs import Graph, Node

SUGGESTIVE, HARMLESS = "a night out", "a cat"
SMALL = ClipConfig(16, TowerSize(64, 1, 1), TowerSize(64, 1, 1), patch=4, size=16, vocabulary=0)


def guarded(g: Graph, demo: Node, model: Any = None, name: str = "demo (embedded)", **more: Any) -> Node:
    settings = {"answer": "stop", "at": 0.5, "texts": "", "threshold": 0.5, **more}
    towers = g("ConceptSteerLoadLatentClip", name=name)
    return g("ConceptSteerLatentGuard", model=demo[0] if model is None else model, latent_clip=towers, **settings)


def checked(g: Graph, images: Any, model: Any) -> Node:
    """Safety Check that only tells what the guard did."""
    widgets = {"detector": "none", "on_flag": "mark", "threshold": 0.0}
    return g("ConceptSteerSafetyCheck", images=images, safe_model=model, **widgets)


def drawn(client, prompt: str, batch: int = 8, guidance: bool = False, **settings: Any):
    """(pictures without and with the guard, behind Safety Check, its report, what became of each)"""
    g = Graph()
    demo = g.demo()
    guard = guarded(g, demo, clip=demo[1] if guidance else None, **settings)
    plain = g.picture(demo, prompt=prompt, batch=batch, steps=12)
    found = checked(g, g.sample(demo, guard, prompt=prompt, batch=batch, steps=12), guard[0])
    shown, told = g("PreviewImage", images=found[0]), g.text(found[2])
    run = client.queue(g)
    report = client.text(run, told)
    done = re.findall(r"^picture \d+: (\w+),", report, re.MULTILINE)
    assert len(done) == batch and "step 7 of 12" in report, report
    return client.pictures(run, plain), client.pictures(run, shown), report, done


def test_flagged_pictures_get_the_card_and_the_others_keep_every_bit(client):
    plain, found, report, done = drawn(client, SUGGESTIVE)
    print(report)
    assert {"kept", "withheld"} == set(done), "none or all were flagged, so nothing was tested: choose another seed"
    assert f"flagged {done.count('withheld')} of 8 pictures" in report and "no step was saved" in report
    card = np.asarray(withheld(Image.new("RGB", (128, 128))))
    for before, after, what in zip(plain, found, done, strict=True):
        if what == "kept":
            assert np.array_equal(before, after)
        else:
            assert np.abs(after.astype(int) - card).mean() < 3  # drawn with the host's version of the font


@pytest.mark.parametrize("guidance", [False, True], ids=["vectors", "vectors and guidance"])
def test_flagged_pictures_are_steered_and_the_others_keep_every_bit(client, guidance):
    plain, found, report, done = drawn(client, SUGGESTIVE, answer="steer", guidance=guidance)
    assert {"kept", "steered"} == set(done), report
    for before, after, what in zip(plain, found, done, strict=True):
        changed = np.abs(before.astype(int) - after).mean()
        assert changed > 1 if what == "steered" else changed == 0


def test_harmless_pictures_keep_every_bit(client):
    plain, found, report, done = drawn(client, HARMLESS, batch=4)
    assert set(done) == {"kept"}, report
    assert np.array_equal(plain, found)


def test_when_every_picture_is_flagged_sampling_ends_at_the_look(client):
    g = Graph()
    demo = g.demo()
    guard = guarded(g, demo, threshold=0.0, at=0.25)
    found = checked(g, g.sample(demo, guard, prompt=HARMLESS, batch=2, steps=12), guard[0])
    shown, told = g("PreviewImage", images=found[0]), g.text(found[2])
    run = client.queue(g)
    assert "2 withheld. It looked at step 4 of 12; 8 steps were saved" in client.text(run, told)
    first, second = client.pictures(run, shown)
    assert np.array_equal(first, second)


def test_another_latent_space_is_an_error_that_names_both(client, base: Path, tmp_path: Path):
    """A CLIP for the latents of SDXL, with weights by chance."""
    tokenizer = embedded.load().tokenizer
    sizes = ClipConfig(**{**vars(SMALL), "vocabulary": len(tokenizer)})
    torch.manual_seed(0)
    towers = LatentClipModel(sizes, space("sdxl"), tokenizer)
    state = {key.replace("visual.", "visual.latent_vit.", 1): value for key, value in towers.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "public.safetensors")
    folder = base / "models" / "latent_clip"
    folder.mkdir(exist_ok=True)
    file = folder / "of sdxl.safetensors"
    convert(tmp_path / "public.safetensors", file, tokenizer)
    try:
        g = Graph()
        demo = g.demo()
        shown = g.picture(demo, guarded(g, demo, name=file.name))
        run = client.run(g)
        assert run.status == "error" and "the VAE of SDXL" in run.error and "embedded demo model" in run.error
        assert shown.id not in run.outputs
    finally:
        file.unlink()


def test_a_check_that_is_asked_for_other_pictures_is_an_error(client):
    g = Graph()
    demo = g.demo()
    guard = guarded(g, demo)
    images = g.sample(demo, guard, prompt=HARMLESS, batch=2, steps=2)
    g.text(checked(g, g("ImageFromBatch", image=images, batch_index=0, length=1), guard[0])[2])
    assert "connect all pictures of that run" in client.error(g)
