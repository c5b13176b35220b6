"""The safety switch in the real AUTOMATIC1111: guidance, gated vectors, and no picture where they cannot act."""

from __future__ import annotations

import pytest
import torch

from concept_steer.safety import Presence, SafeConcept, SafetySet
from concept_steer.safety.safety_set import Strength
from concept_steer.vector import ConceptVector

from .client import Refused
from .test_server_steering import HIRES, png

pytestmark = pytest.mark.usefixtures("known")
PROMPT = "a villain with a gun"
SLD = {"safety": {"level": "strict", "method": "sld"}}
VECTORS = {"safety": {"level": "standard", "method": "vectors"}}
OVER = {"prompt": PROMPT, "steps": 6, "cfg_scale": 5}


@pytest.fixture
def plain(client):
    return client.draw(**OVER).pictures


def write_set(folder, limit):
    """A set whose gate opens where the mean of h's first channel is above the limit."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.zeros(2, 1, 192)
    directions[:, 0, 0] = 1.0
    gate = Presence(directions, torch.full((2, 1), limit), torch.ones(2, 1), (999.0, 0.0), 0.0)
    tensor = torch.randn(192, generator=generator)
    vector = ConceptVector(tensor / tensor.norm() * 6.0, "demo", "safe")
    levels = {name: Strength(strength, 0.0) for name, strength in (("gentle", 0.5), ("standard", 1.0), ("strict", 2.0))}
    made = SafetySet("by hand", {"weapons": SafeConcept("weapons", "a weapon", vector, gate, levels)})
    return made.save(folder / "a-test.safety.safetensors", overwrite=True)


@pytest.fixture
def always(vectors):
    path = write_set(vectors, -1e6)
    yield path
    path.unlink()


@pytest.fixture
def never(vectors):
    path = write_set(vectors, 1e6)
    yield path
    path.unlink()


def test_off_is_the_picture_without_us(client, plain):
    for settings in ({"safety": "off"}, {"rows": []}, [False]):
        drawn = client.draw(settings, **OVER)
        assert drawn.pictures == plain and "Concept Steer" not in drawn.infotexts[0]


def test_guidance_changes_the_picture_and_says_so_and_the_next_one_is_as_before(client, plain):
    drawn = client.draw(SLD, **OVER)
    assert drawn.pictures != plain
    assert 'Concept Steer: "safety:strict:method=sld"' in drawn.infotexts[0]
    assert "Safety strict by Safe Latent Diffusion" in client.comments()
    assert client.draw(SLD, **OVER).pictures == drawn.pictures
    assert client.draw(**OVER).pictures == plain


def test_levels_differ_and_the_page_the_api_and_the_infotext_mean_the_same(client):
    by_level = {
        level: client.draw({"safety": {"level": level, "method": "sld"}}, **OVER) for level in ("gentle", "strict")
    }
    assert by_level["gentle"].pictures != by_level["strict"].pictures
    info = next(s for s in client.call("/sdapi/v1/script-info") if s["name"] == "concept steer" and not s["is_img2img"])
    controls = [arg["value"] for arg in info["args"]]
    labels = [arg["label"] for arg in info["args"]]
    controls[labels.index("Safety")] = True
    controls[labels.index("Level")] = "strict"
    controls[labels.index("Method")] = "Safe Latent Diffusion"
    assert client.draw(controls, **OVER).pictures == by_level["strict"].pictures
    again = client.call("/sdapi/v1/txt2img", {"infotext": by_level["strict"].infotexts[0]})
    from .client import pixels

    assert [pixels(picture) for picture in again["images"]] == by_level["strict"].pictures


def test_a_plot_has_an_axis_of_safety_levels(client):
    plot = next(s for s in client.call("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and not s["is_img2img"])
    x = plot["args"][0]["choices"].index("[Concept Steer] Safety level")
    args = [x, "", ["off", "strict"], 0, "", [], 0, "", [], True, True, False, False, False, False, False, 0, False]
    drawn = client.draw(SLD, script_name="x/y/z plot", script_args=args[: len(plot["args"])], **OVER)
    assert drawn.pictures[-2:] == [*client.draw(**OVER).pictures, *client.draw(SLD, **OVER).pictures]


def test_vectors_act_where_their_gate_opens_and_steering_goes_on_beside_them(client, plain, always):
    drawn = client.draw(VECTORS, **OVER)
    assert drawn.pictures != plain
    assert "Safety standard by learned vectors: weapons." in client.comments()
    assert "opened in 1 of 1 pictures (6 of 6" in client.comments()
    rows = {"rows": [{"vector": "one"}]}
    both = client.draw({**VECTORS, **rows}, **OVER).pictures
    assert len({tuple(both), tuple(drawn.pictures), tuple(client.draw(rows, **OVER).pictures)}) == 3
    assert client.draw({**VECTORS, **rows, "enabled": False}, **OVER).pictures == drawn.pictures
    assert client.draw(**OVER).pictures == plain


def test_a_gate_that_stays_shut_changes_no_bit_and_says_so(client, plain, never):
    drawn = client.draw(VECTORS, batch_size=2, **OVER)
    assert "opened in 0 of 2 pictures" in client.comments()
    assert drawn.pictures == client.draw(batch_size=2, **OVER).pictures


@pytest.mark.parametrize(
    "over",
    [
        {"batch_size": 2},
        {"n_iter": 2},
        {"prompt": PROMPT + " AND a villain :0.5", "batch_size": 2},
        {"prompt": PROMPT + ", " + "dark, " * 80},
        {"sampler_name": "Heun"},
        {"sampler_name": "DPM++ SDE"},
        {"sampler_name": "DDIM"},
        {"sampler_name": "PLMS"},
        {"sampler_name": "UniPC"},
        {"s_min_uncond": 3.0},
        HIRES,
    ],
    ids=["batch", "batches", "and", "long", "heun", "sde", "ddim", "plms", "unipc", "ngms", "hires"],
)
@pytest.mark.parametrize("way", ["sld", "vectors"])
def test_safety_acts_in_every_layout_and_with_every_kind_of_sampler(client, always, over, way):
    over = {**OVER, **over}
    drawn = client.draw({"safety": {"level": "strict", "method": way}}, **over)
    assert all(a != b for a, b in zip(drawn.pictures, client.draw(**over).pictures, strict=True))


@pytest.mark.parametrize("options", [{"batch_cond_uncond": False}, {"skip_early_cond": 0.4}, {"pad_cond_uncond": True}])
def test_safety_acts_whatever_the_web_ui_does_with_its_batches(client, always, options):
    with client.options(**options):
        without = client.draw(**OVER).pictures
        assert client.draw(SLD, **OVER).pictures != without
        assert client.draw(VECTORS, **OVER).pictures != without


def test_safety_acts_in_img2img_and_inpainting(client, always):
    over = {**OVER, "init_images": [png("grey")], "denoising_strength": 0.9, "path": "img2img"}
    for more in ({}, {"mask": png("white"), "inpainting_fill": 1}):
        without = client.draw(**over, **more).pictures
        for settings in (SLD, VECTORS):
            assert client.draw(settings, **over, **more).pictures != without


def test_a_replaced_unet_gives_no_picture_under_vectors_and_one_under_guidance(client, plain, always):
    with client.options(sd_unet="bypassing engine"):
        with pytest.raises(Refused, match="SD Unet"):
            client.draw(VECTORS, **OVER)
        client.draw(SLD, **OVER)
        assert "Safe Latent Diffusion" in client.comments()
    assert client.draw(**OVER).pictures == plain


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("nan", "no numbers"),
        ("rows", "not understood|predictions for|must match"),  # the last is the web UI itself, which fails first
        ("own sampling", "another extension samples"),
        ("exception", "trouble in the UNet"),
    ],
)
@pytest.mark.parametrize("settings", [SLD, VECTORS], ids=["sld", "vectors"])
def test_whatever_keeps_safety_from_working_gives_no_picture(client, plain, always, trouble, reason, settings):
    with pytest.raises(Refused, match=reason):
        client.draw(settings, trouble=trouble, **OVER)
    assert client.call("/trouble/hooks") == 0
    assert client.draw(**OVER).pictures == plain


@pytest.mark.parametrize("settings", [SLD, VECTORS], ids=["sld", "vectors"])
def test_a_copy_of_a_safe_run_that_leaves_us_out_draws_nothing(client, always, settings):
    """The error is the other extension's, so the web UI prints it and keeps the picture there was before."""
    assert client.draw(settings, trouble="copy", **OVER).pictures == client.draw(settings, **OVER).pictures
    assert client.call("/trouble/hooks") == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"safety": {"level": "standard", "categories": ["weather"]}}, "weather"),
        ({"safety": "much"}, "level"),
        ({"safety": {"level": "strict", "detector": "nudenet"}}, "not looked at here"),
    ],
)
def test_safety_that_cannot_be_had_gives_no_picture(client, settings, reason):
    with pytest.raises(Refused, match=reason):
        client.draw(settings, **OVER)


def test_a_damaged_set_gives_no_picture(client, plain, always):
    always.write_bytes(always.read_bytes()[:-100])
    with pytest.raises(Refused, match="cannot be used"):
        client.draw(VECTORS, **OVER)
    assert client.draw(**OVER).pictures == plain


def test_the_log_has_no_error_of_ours(client, server):
    for words in ("Error executing callback", "Error loading script", "Error running process:"):
        assert words not in server.log()
