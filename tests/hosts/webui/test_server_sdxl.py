"""Steering and safety on an SDXL model of sgm's classes (small, random UNet) in the real AUTOMATIC1111."""

from __future__ import annotations

import pytest
import torch

from concept_steer.geom_erasing import LocationTokens
from concept_steer.vector import ConceptVector

from . import small_sdxl
from .client import Refused
from .test_erasing import ERASE, QUICK, marked, peft  # noqa: F401
from .test_server_steering import HIRES

STEER = {"rows": [{"vector": "for-sdxl"}]}
SLD = {"safety": {"level": "strict", "method": "sld"}}


@pytest.fixture(scope="module", autouse=True)
def sdxl(host, server, base, known):
    """The model is loaded for this module's tests, the embedded one again after them."""
    from .client import Client

    small_sdxl.write(host, base / "models" / "Stable-diffusion")
    tensor = torch.randn(small_sdxl.CHANNELS, generator=torch.Generator().manual_seed(3))
    vector = ConceptVector(tensor * 3, small_sdxl.FAMILY, "for-sdxl")
    vector.save(known / "for-sdxl.safetensors", overwrite=True)
    client = Client(server.url)
    client.call("/sdapi/v1/refresh-checkpoints", {})
    with client.options(sd_model_checkpoint=small_sdxl.NAME):
        yield


@pytest.mark.parametrize(
    "over",
    [
        {"batch_size": 2},
        {"prompt": "a doctor AND a nurse :0.5"},
        {"prompt": "a doctor, " * 40},
        {"sampler_name": "DDIM"},
        HIRES,
    ],
    ids=["batch", "and", "long", "ddim", "hires"],
)
def test_each_side_of_the_guidance_is_steered_by_itself(client, over):
    plain = client.draw(**over).pictures
    found = [client.draw({"rows": [{"vector": "for-sdxl", "rows": side}]}, **over).pictures
             for side in ("cond", "uncond", "both")]  # fmt: skip
    assert len({tuple(plain), *map(tuple, found)}) == 4
    assert client.draw({"rows": [{"vector": "for-sdxl", "strength": 0.0}]}, **over).pictures == plain


@pytest.mark.parametrize("over", [{"batch_size": 2}, {"sampler_name": "DDIM"}, {"s_min_uncond": 4.0}, HIRES])
def test_safe_latent_diffusion_has_its_own_sizes_and_embeddings(client, over):
    plain = client.draw(**over).pictures
    assert all(a != b for a, b in zip(client.draw(SLD, **over).pictures, plain, strict=True))
    assert client.draw(**over).pictures == plain


def test_a_vector_of_another_family_is_refused(client):
    with pytest.raises(Refused, match="one"):
        client.draw({"rows": [{"vector": "one"}]})


def test_learning_needs_no_download_for_its_live_preview(client, known):
    """With live previews on, and offline, the web UI itself draws no picture by SDXL: it looks for a small decoder."""
    with client.options(live_previews_enable=True, show_progress_every_n_steps=1):
        body = {"neutral": "a doctor", "positive": "a woman doctor", "method": "difference", "size": 128}
        answer = client.call("/concept-steer/v1/learn", {**body, "name": "learned-sdxl", "overwrite": True})
    assert len(answer["images"]) == 2
    vector = ConceptVector.load(known / "learned-sdxl.safetensors")
    assert (vector.family, vector.channels) == (small_sdxl.FAMILY, small_sdxl.CHANNELS)
    rows = {"rows": [{"vector": "learned-sdxl"}]}
    assert client.draw(rows).pictures != client.draw().pictures


@pytest.mark.parametrize("way", ["tokens", "masked LoRA"])
def test_erasing_is_learned_through_sgms_conditioner_and_acts(client, base, peft, marked, way):  # noqa: F811
    """The gradient reaches the tokens: more steps give other ones."""
    body = {**QUICK, "way": way, "size": 128, "rank": 4, "pictures": marked, "name": "no-mark-sdxl"}
    assert "'watermark' was found in" in client.call(ERASE, body)["summary"]
    plain = client.draw().pictures
    if way == "tokens":
        file = base / "embeddings" / "no-mark-sdxl.safetensors"
        first = LocationTokens.load(file).places["clip_l"]
        client.call(ERASE, {**body, "steps": 8})
        assert float((LocationTokens.load(file).places["clip_l"] - first).abs().max()) > 1e-4
        assert client.draw(negative_prompt="no-mark-sdxl").pictures != plain
    else:
        client.call("/sdapi/v1/refresh-loras", {})
        assert client.draw(prompt="a doctor <lora:no-mark-sdxl:1>").pictures != plain
    assert client.draw().pictures == plain
