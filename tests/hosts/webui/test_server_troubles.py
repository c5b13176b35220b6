"""What other extensions do, what the web UI changes in mid-run, and what goes wrong: never the next picture."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from . import host as hosts
from .client import Client, Refused
from .test_server_steering import HIRES

pytestmark = pytest.mark.usefixtures("known")
ONE = {"rows": [{"vector": "one"}]}
MODEL, TWIN = "concept-steer-demo", "twin"


@pytest.fixture
def plain(client):
    return client.draw().pictures


@pytest.fixture(scope="module")
def twin(server, base):
    """The same model as a second file with other weights, for the refiner and for a change of models."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = base / "models" / "Stable-diffusion"
    with safe_open(folder / f"{MODEL}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    for key in tensors:
        if key.startswith("model.diffusion_model.output_blocks") and key.endswith("bias"):
            tensors[key] = tensors[key] + 0.02
    save_file(tensors, folder / f"{TWIN}.safetensors")
    (folder / f"{TWIN}.yaml").write_text((folder / f"{MODEL}.yaml").read_text())
    return TWIN


@pytest.mark.slow
def test_off_is_to_the_bit_a_web_ui_without_the_extension(host, client, tmp_path):
    base = hosts.make_base(tmp_path)
    shutil.rmtree(base / "extensions" / hosts.EXTENSION)
    other = hosts.Server(host, base)
    try:
        other.wait_until_ready()
        for over in ({}, HIRES, {"sampler_name": "DDIM", "batch_size": 2}, {"prompt": "a doctor AND a nurse"}):
            without = Client(other.url).draw(**over)
            for settings in (None, {**ONE, "enabled": False}, {"rows": [{"vector": "one", "strength": 0}]}):
                drawn = client.draw(settings, **over)
                assert drawn.pictures == without.pictures and drawn.infotexts == without.infotexts
    finally:
        other.stop()


def test_after_an_exception_in_the_unet_the_next_picture_is_not_steered(client, plain):
    with pytest.raises(Refused, match="trouble in the UNet"):
        client.draw(ONE, trouble="exception")
    assert client.call("/trouble/hooks") == 0
    assert client.draw().pictures == plain
    assert client.draw(ONE).pictures == client.draw(ONE).pictures != plain


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_after_interrupt_and_skip_the_next_picture_is_not_steered(client, plain, how):
    worker = threading.Thread(target=lambda: client.draw(ONE, steps=400))
    worker.start()
    for _ in range(600):
        if client.call("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] > 2:
            break
        time.sleep(0.1)
    client.call(f"/sdapi/v1/{how}", {})
    worker.join(300)
    assert not worker.is_alive()
    assert client.call("/trouble/hooks") == 0
    assert client.draw().pictures == plain


def test_a_further_pass_of_the_prompt_is_steered_and_one_of_the_negative_prompt_is_not(client, plain):
    """Each note is how far the own pass is from the web UI's: nothing, when both are steered alike."""
    alone = client.draw(ONE).pictures
    for kind in ("further prompt pass", "further negative pass"):
        before = len(client.call("/trouble/notes"))
        assert client.draw(ONE, trouble=kind).pictures == alone
        notes = client.call("/trouble/notes")[before:]
        assert len(notes) == 3 and max(notes) < 1e-3
    both = {"rows": [{"vector": "one", "rows": "both"}]}
    before = len(client.call("/trouble/notes"))
    client.draw(both, trouble="further negative pass")
    assert max(client.call("/trouble/notes")[before:]) < 1e-3
    assert client.draw().pictures == plain


def test_a_batch_that_another_extension_changed_ends_the_job(client, plain):
    with pytest.raises(Refused, match="layout is not understood"):
        client.draw(ONE, trouble="rows")
    assert client.draw().pictures == plain


def test_a_replaced_unet_is_told_under_the_picture(client, plain):
    client.call("/sdapi/v1/refresh-checkpoints", {})
    with client.options(sd_unet="bypassing engine"):
        without = client.draw()
        assert "nothing was steered" not in client.comments()
        steered = client.draw(ONE)
        assert steered.pictures == without.pictures != plain
        assert "nothing was steered" in client.comments() and "SD Unet" in client.comments()
        assert "Concept Steer" not in steered.infotexts[0]  # it would claim what did not happen
    assert client.draw().pictures == plain


def test_an_extension_that_takes_sampling_over_ends_the_job_instead_of_leaving_hooks(client, plain):
    with pytest.raises(Refused, match="another extension samples"):
        client.draw(ONE, trouble="own sampling")
    assert client.call("/trouble/hooks") == 0
    assert client.draw().pictures == plain
    assert client.draw(trouble="own sampling").pictures == plain


@pytest.mark.parametrize("kind", ["second picture", "copy"])
def test_a_picture_that_another_extension_draws_in_the_same_job_is_not_steered(client, plain, kind):
    assert client.draw(ONE, trouble=kind).pictures == plain
    assert client.draw(ONE).pictures != plain


def test_the_refiner_is_steered_too_and_nothing_stays_on_either_model(client, plain, twin):
    client.call("/sdapi/v1/refresh-checkpoints", {})
    over = {"refiner_checkpoint": twin, "refiner_switch_at": 0.5, "steps": 6}
    without = client.draw(**over)
    steered = client.draw(ONE, **over)
    late = client.draw({"rows": [{"vector": "one", "start": 0.6}]}, **over)
    assert len({without.pictures[0], steered.pictures[0], late.pictures[0], client.draw(steps=6).pictures[0]}) == 4
    assert client.draw(**over).pictures == without.pictures
    assert client.draw().pictures == plain


def test_after_a_change_of_models_steering_goes_on_and_nothing_stays(client, plain, twin):
    client.call("/sdapi/v1/refresh-checkpoints", {})
    steered = client.draw(ONE).pictures
    with client.options(sd_model_checkpoint=twin):
        other = client.draw()
        assert other.pictures != plain and client.draw(ONE).pictures not in (other.pictures, steered)
        assert client.draw().pictures == other.pictures
    assert client.draw().pictures == plain and client.draw(ONE).pictures == steered


def test_reloading_the_user_interface_keeps_one_set_of_callbacks(client, server, plain):
    steered = client.draw(ONE).pictures
    tagged = client.draw(prompt="a doctor <concept:one:1>").pictures
    client.call("/trouble/restart", {})
    server.wait_until_ready(starts=2)
    assert client.draw().pictures == plain and client.draw(ONE).pictures == steered
    assert client.draw(prompt="a doctor <concept:one:1>").pictures == tagged == steered
    plot = next(s for s in client.call("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and not s["is_img2img"])
    assert plot["args"][0]["choices"].count("[Concept Steer] Strength 1") == 1
