"""Erasing in the real AUTOMATIC1111: what `erase learn` writes, as stock files, and learning it there."""

from __future__ import annotations

import base64
import io
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from concept_steer.demo import drawing, model
from concept_steer.geom_erasing import Examples, LocationTokens, learn_erasing, lora
from concept_steer.geom_erasing.dataset import detect
from concept_steer.geom_erasing.descent import Tokens
from concept_steer.geom_erasing.detectors import detector_of
from concept_steer.geom_erasing.reading import encode
from concept_steer.geom_erasing.request import ErasingRequest
from concept_steer.hosts.diffusers import DiffusersDenoiser
from concept_steer.unet_names import unet_key

from . import demo_files
from .client import Client, Refused, as_picture

ERASE = "/concept-steer/v1/erase"
QUICK = {"detector": "demo-watermark", "captions": "a doctor", "steps": 4, "batch": 2, "overwrite": True}
COUNT, MARKED = 10, 6


@pytest.fixture(scope="module")
def denoiser():
    return DiffusersDenoiser(model.pipeline())


def test_the_embedding_acts_in_the_negative_prompt_and_nowhere_else(client, denoiser, base):
    words = denoiser.text_reader().vectors_of("watermark")
    unit = float(words["clip_l"].square().mean().sqrt())
    places = {"clip_l": 3 * unit * torch.randn(4, 128, generator=torch.Generator().manual_seed(1))}
    folder = base / "embeddings"
    folder.mkdir(exist_ok=True)
    made = LocationTokens("no-watermark", "watermark", 2, words, places)
    made.save(folder / "no-watermark.safetensors", overwrite=True)
    client.call("/sdapi/v1/refresh-embeddings", {})
    loaded = client.call("/sdapi/v1/embeddings")["loaded"]
    assert loaded["no-watermark"]["vectors"] == len(made)
    plain = client.draw()
    without = client.draw(negative_prompt="no-watermark")
    assert without.pictures != plain.pictures
    assert client.draw().pictures == plain.pictures


def test_the_loras_stock_tag_draws_what_the_same_weights_in_the_checkpoint_draw(client, denoiser, base):
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(2)
    with lora.adapted(denoiser, 4):
        found = lora.state_of(denoiser)
    state = {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=generator) for name, value in found.items()
    }
    loras, models = base / "models" / "Lora", base / "models" / "Stable-diffusion"
    loras.mkdir(parents=True, exist_ok=True)
    lora.save(state, loras / "no-marks-lora.safetensors", {"concept": "marks"}, overwrite=True)
    with_it = merged(state, models / "demo-with-lora.safetensors")
    client.call("/sdapi/v1/refresh-loras", {})
    client.call("/sdapi/v1/refresh-checkpoints", {})
    plain = client.draw()
    worn = client.draw(prompt="a doctor <lora:no-marks-lora:1>")
    assert client.draw().pictures == plain.pictures
    with client.options(sd_model_checkpoint=with_it.stem):
        wanted = client.draw()
    assert client.draw().pictures == plain.pictures
    one, other, known = (np.asarray(as_picture(drawn.sent[0]), float) for drawn in (plain, worn, wanted))
    assert np.abs(one - known).mean() > 5 * np.abs(other - known).mean() and np.abs(other - known).mean() < 0.5


def merged(state: dict[str, torch.Tensor], path: Path) -> Path:
    """The embedded model's checkpoint with a LoRA's weights added, and what the host needs beside it."""
    tensors = load_file(model.MODEL_FILE)
    with safe_open(model.MODEL_FILE, "pt") as file:
        about = file.metadata()
    for name in {key.rpartition(".lora_")[0] for key in state}:
        down, up = (state[f"{name}.lora_{part}.weight"] for part in "AB")
        own = f"model.diffusion_model.{unet_key(name + '.weight')}"
        change = (up.flatten(1) @ down.flatten(1)).reshape(tensors[own].shape)
        tensors[own] = (tensors[own].float() + change).to(tensors[own].dtype)
    save_file(tensors, path, about)
    settings = path.with_name(f"{demo_files.NAME}.yaml")
    if settings.is_file():
        path.with_suffix(".yaml").write_bytes(settings.read_bytes())
    return path


@pytest.fixture(scope="module")
def marked(server) -> list[str]:
    """COUNT pictures of the model as PNG in base64; a watermark is painted on the first MARKED."""
    drawn = Client(server.url).draw(batch_size=COUNT, steps=8).sent
    rng = np.random.default_rng(0)
    frames = [np.asarray(as_picture(one)) for one in drawn]
    return [as_sent(drawing.watermark(one, rng)[0] if i < MARKED else one) for i, one in enumerate(frames)]


def as_sent(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def peft(host) -> None:
    """What trains a LoRA must be installed beside the web UI."""
    if subprocess.run([str(host.python), "-c", "import peft"], capture_output=True, timeout=300).returncode:
        pytest.skip(f"training a LoRA needs peft: {host.python} -m pip install --no-deps peft==0.13.2")


def test_tokens_are_learned_saved_and_act_in_the_next_negative_prompt(client, base, marked):
    plain = client.draw().pictures
    answer = client.call(ERASE, {**QUICK, "pictures": marked, "name": "no-mark"})
    told = answer["summary"]
    assert f"'watermark' was found in {MARKED} of {COUNT} pictures (60%)" in told and not answer["interrupted"]
    assert "finished after 4 steps" in told and "Saved: embeddings/no-mark.safetensors." in told
    assert "no-mark in the negative prompt" in told
    assert [np.asarray(as_picture(one)).std() > 5 for one in answer["images"]] == [True, True]
    saved = LocationTokens.load(base / "embeddings" / "no-mark.safetensors")
    assert (saved.concept, saved.bins, saved.info["family"]) == ("watermark", 4, "demo")
    assert client.draw().pictures == plain  # learning leaves nothing behind
    assert client.draw(negative_prompt="no-mark").pictures != plain


def test_the_same_pictures_give_the_tokens_that_diffusers_gives(client, base, marked, denoiser):
    """The web UI's own text encoder and UNet pass the same gradients."""
    client.call(ERASE, {**QUICK, "pictures": marked, "name": "again"})
    here = LocationTokens.load(base / "embeddings" / "again.safetensors")
    request = ErasingRequest(**{key: value for key, value in QUICK.items() if key != "overwrite"})
    pictures = [as_picture(one) for one in marked]
    found = detect(pictures, ["a doctor"] * COUNT, [detector_of(request.detector, request.threshold)])
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    boxes = [one.boxes.get("watermark", []) for one in found]
    examples = Examples(encode(denoiser, pixels), ["a doctor"] * COUNT, boxes)
    there = learn_erasing(denoiser, examples, "watermark", name="again", settings=request.settings).tokens
    start = Tokens(denoiser.text_reader(), "watermark", "again", request.settings).at()
    moved = (there.places["clip_l"] - start.places["clip_l"]).norm()
    apart = (there.places["clip_l"] - here.places["clip_l"]).norm()
    print(f"moved {moved:.4f}, apart {apart:.2g}")
    assert torch.allclose(here.words["clip_l"], there.words["clip_l"], atol=1e-6)
    assert apart < 0.02 * moved


@pytest.mark.parametrize("way", ["masked LoRA", "tokens and LoRA"])
def test_a_lora_is_learned_and_acts_by_the_stock_tag(client, base, server, marked, peft, way):
    plain = client.draw().pictures
    body = {**QUICK, "pictures": marked, "name": "no-mark-lora", "way": way, "rank": 4, "steps": 8}
    told = client.call(ERASE, body)["summary"]
    assert "loras/no-mark-lora.safetensors" in told and "In the prompt: <lora:no-mark-lora:1>." in told
    assert ("embeddings/" in told) == (way != "masked LoRA")
    assert client.draw().pictures == plain
    client.call("/sdapi/v1/refresh-loras", {})
    worn = client.draw(prompt="a doctor <lora:no-mark-lora:1>")
    assert worn.pictures != plain
    assert "keys weren't matched" not in server.log() and "Couldn't find Lora" not in server.log()
    assert client.draw().pictures == plain


def test_interrupt_keeps_what_is_learned(client, base, marked):
    done: dict = {}
    body = {**QUICK, "pictures": marked, "name": "half", "steps": 20_000}
    thread = threading.Thread(target=lambda: done.update(client.call(ERASE, body)))
    thread.start()
    try:
        while thread.is_alive():
            if "step " in (client.call("/sdapi/v1/progress?skip_current_image=true")["textinfo"] or ""):
                client.call("/sdapi/v1/interrupt", {})
                break
            time.sleep(0.2)
    finally:
        thread.join(600)
    assert done["interrupted"] and "stopped by request" in done["summary"]
    assert LocationTokens.load(base / "embeddings" / "half.safetensors").concept == "watermark"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"colour": 1}, "colour"),
        ({"detector": "model:/etc/passwd"}, "no detector"),
        ({"name": "../outside"}, "cannot be the name"),
        ({"captions": "a doctor <lora:x:1>"}, "<lora:x:1>"),
        ({"captions": "a doctor\na nurse"}, "2 captions"),
        ({"pictures": []}, "no pictures"),
        ({"pictures": ["AAAA"]}, "cannot be read"),
        ({"threshold": 2.0}, "between 0.05 and 1"),
        ({"name": "taken", "overwrite": False}, "is there already"),
        ({"detector": "demo-qr"}, "0 of 10 pictures"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(client, base, marked, body, words):
    taken = base / "embeddings" / "taken.safetensors"
    taken.parent.mkdir(exist_ok=True)
    taken.write_bytes(b"kept")
    before = sorted(path.name for path in taken.parent.iterdir())
    with pytest.raises(Refused) as refused:
        client.call(ERASE, {**QUICK, "pictures": marked, **body})
    assert words in str(refused.value) and str(base) not in str(refused.value) and "/tmp" not in str(refused.value)
    assert taken.read_bytes() == b"kept" and sorted(path.name for path in taken.parent.iterdir()) == before
    assert client.call("/sdapi/v1/progress")["state"]["job"] == ""
