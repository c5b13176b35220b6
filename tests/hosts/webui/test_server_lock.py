"""The administrator's lock, --concept-steer-safety, in a real AUTOMATIC1111 that also runs with --lowvram."""

from __future__ import annotations

import pytest

from . import host as hosts
from .client import Client

OVER = {"prompt": "a villain with a gun", "steps": 4, "cfg_scale": 5}


@pytest.fixture(scope="module")
def locked(host, tmp_path_factory):
    running = hosts.Server(
        host, hosts.make_base(tmp_path_factory.mktemp("locked")), "--concept-steer-safety", "standard", "--lowvram"
    )
    try:
        running.wait_until_ready()
        yield Client(running.url)
    finally:
        running.stop()


@pytest.mark.parametrize(
    "settings",
    [None, {"safety": "off"}, {"safety": {"level": "gentle", "method": "vectors"}}, [False], {"enabled": False}],
    ids=["no word", "off", "gentler", "list", "all off"],
)
def test_neither_the_page_nor_the_api_can_switch_safety_off_or_make_it_gentler(locked, settings):
    asked = locked.draw({"safety": "standard"}, **OVER)
    drawn = locked.draw(settings, **OVER)
    assert drawn.pictures == asked.pictures
    assert 'Concept Steer: "safety:standard"' in drawn.infotexts[0]
    assert "Safety standard by" in locked.comments()


def test_a_stricter_level_is_allowed(locked):
    drawn = locked.draw({"safety": "strict"}, **OVER)
    assert 'Concept Steer: "safety:strict"' in drawn.infotexts[0]


def test_the_settings_page_cannot_switch_it_off_either(locked):
    with locked.options(concept_steer_safety_on=False):
        assert "safety:standard" in locked.draw(**OVER).infotexts[0]


def test_the_page_shows_a_ticked_box(locked):
    found = next(s for s in locked.call("/sdapi/v1/script-info") if s["name"] == "concept steer")
    values = {arg["label"]: arg["value"] for arg in found["args"]}
    assert values["Safety"] is True and values["Level"] == "standard"


@pytest.mark.parametrize("trouble", ["second picture", "copy"])
def test_a_picture_that_another_extension_draws_without_us_does_not_come_out(locked, trouble):
    """The error is the other extension's, so the web UI prints it and keeps the picture there was before."""
    assert locked.draw(trouble=trouble, **OVER).pictures == locked.draw(**OVER).pictures
    assert locked.call("/trouble/hooks") == 0


def test_img2img_is_under_the_lock_too(locked):
    from .test_server_steering import png

    drawn = locked.draw({"safety": "off"}, "img2img", init_images=[png("grey")], denoising_strength=0.8, **OVER)
    assert "safety:standard" in drawn.infotexts[0]
