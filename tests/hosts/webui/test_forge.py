"""The real Forge with the embedded model: the same steering and learning as in AUTOMATIC1111, by Forge's own ways."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from concept_steer.demo import model

from . import forge
from . import host as hosts
from .client import Client, Refused
from .conftest import save_known
from .judged import pictures

# collected here again, with this file's server
from .test_browser import (  # noqa: F401
    page,
    test_a_click_on_a_card_puts_its_tag_into_the_prompt_and_the_picture_is_steered,
    test_a_published_table_is_imported,
    test_a_vector_is_learned_with_progress_and_live_preview,
    test_erasing_is_learned_on_the_page_from_pictures_and_their_captions,
    test_interrupt_on_the_page_keeps_the_best_so_far,
    test_the_accordion_steers_and_a_picture_s_settings_are_pasted_back,
    test_the_library_shows_all_that_a_file_says,
    test_what_is_wrong_is_said_on_the_page,
)
from .test_erasing import (  # noqa: F401
    marked,
    peft,
    test_a_lora_is_learned_and_acts_by_the_stock_tag,
    test_interrupt_keeps_what_is_learned,
    test_the_loras_stock_tag_draws_what_the_same_weights_in_the_checkpoint_draw,
    test_the_same_pictures_give_the_tokens_that_diffusers_gives,
    test_tokens_are_learned_saved_and_act_in_the_next_negative_prompt,
)
from .test_parity import assert_equal, denoiser, given, settings_of  # noqa: F401
from .test_server_steering import (  # noqa: F401
    HIRES,
    one,
    plain,
    png,
    test_a_wrong_tag_ends_the_job_with_its_reason,
    test_layouts_and_samplers_are_steered,
    test_off_and_strength_zero_are_the_picture_without_us_and_write_nothing,
    test_prompt_syntax_the_apis_dict_and_its_list_give_the_same_picture,
    test_settings_that_cannot_be_drawn_end_the_job_with_their_reason,
    test_steering_changes_the_picture_and_the_next_one_is_as_before,
    test_tags_and_rows_add_up,
    test_the_api_lists_vectors_by_name_and_knows_no_paths,
)
from .test_tab import (  # noqa: F401
    test_a_vector_is_learned_saved_and_steers_the_next_picture,
    test_interrupt_keeps_the_best_so_far_and_progress_is_told,
    test_learning_raises_the_judged_share,
    test_pictures_are_learned_from,
    test_what_is_wrong_is_said_and_the_server_goes_on,
)

pytestmark = pytest.mark.usefixtures("known")


@pytest.fixture(scope="module")
def host() -> hosts.Host:
    found = forge.find()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def base(host: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forge.make_base(tmp_path_factory.mktemp("forge"))


@pytest.fixture(scope="module")
def server(host: hosts.Host, base: Path) -> Iterator[hosts.Server]:
    running = forge.Server(host, base)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def vectors(base: Path) -> Path:
    folder = base / "models" / "concept-vectors"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def ui() -> str:
    return "forge"


@pytest.fixture(scope="module")
def known(vectors: Path) -> Path:
    return save_known(vectors)


INSIDE = hosts.ROOT / "tests" / "hosts" / "webui" / "inside" / "forge_units.py"


def test_forges_unet_is_learned_on_through_its_sums_in_place(host: hosts.Host):
    """Attention on all levels, which the embedded model does not have."""
    assert "forge ok" in host.run(INSIDE, "halves", str(hosts.ROOT), str(host.path))


SIDES = ("cond", "uncond", "both")


@pytest.fixture(scope="module", params=["forge", "reforge"])
def unet_predictions(request, host: hosts.Host, given, denoiser, tmp_path_factory):  # noqa: F811
    """What the UNet class of this web UI predicts, all sides in one start of its Python."""
    folder = host.path if request.param == "forge" else forge.reforge()
    if folder is None:
        pytest.skip("no reForge: set REFORGE_PATH to its folder")
    about = {"unet": forge.unet_settings(), "weights": str(model.MODEL_FILE), "family": denoiser.family, "batch": 2}
    about["settings"] = {side: settings_of(side).to_dict() for side in SIDES}
    files = tmp_path_factory.mktemp(request.param)
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    np.savez(files / "in.npz", about=json.dumps(about), t=np.full(4, 501.0, np.float32), **arrays)
    words = (str(hosts.ROOT), str(folder), request.param, str(files / "in.npz"), str(files / "out.npz"))
    host.run(INSIDE, "steered", *words)
    with np.load(files / "out.npz") as file:
        return dict(file)


@pytest.mark.parametrize("side", SIDES)
def test_a_steered_prediction_equals_the_diffusers_hosts(unet_predictions, given, denoiser, side):  # noqa: F811
    assert_equal(unet_predictions["plain"], unet_predictions[side], given, denoiser, side)


def test_each_picture_of_a_batch_is_steered_and_each_batch_of_a_run(client: Client):
    for over in ({"batch_size": 2}, {"n_iter": 2}):
        steered, without = client.draw(one(), **over).pictures, client.draw(**over).pictures
        assert len(steered) == len(without) and not set(steered) & set(without)
        assert client.draw(one(0.0), **over).pictures == without


def test_the_sides_of_guidance_are_told_apart(client: Client):
    sides = [client.draw(one(rows=side)).pictures[0] for side in ("cond", "uncond", "both")]
    assert len({*sides, *client.draw().pictures}) == 4


def test_the_hires_pass_has_its_own_factor_and_its_own_tags(client: Client):
    hires = {**HIRES, "hr_cfg": 3, "hr_additional_modules": ["Use same choices"]}  # Forge's API fails without
    same = client.draw(one(), **hires).pictures
    off = client.draw({**one(), "hires": 0.0}, **hires).pictures
    assert len({*same, *off, *client.draw(**hires).pictures}) == 3
    tag = "a doctor <concept:one:1>"
    assert client.draw(prompt=tag, hr_prompt="a doctor", **hires).pictures == off
    assert client.draw(prompt=tag, hr_prompt=tag, **hires).pictures == same
    with pytest.raises(Refused, match="nobody"):
        client.draw(hr_prompt="a doctor <concept:nobody:1>", **hires)


@pytest.mark.parametrize("more", [{}, {"mask": png("white"), "inpainting_fill": 1}], ids=["img2img", "inpaint"])
def test_img2img_and_inpainting_are_steered(client: Client, more):
    def drawn(**scripts):
        body = {"init_images": [png("grey")], "denoising_strength": 0.8, **more, "alwayson_scripts": scripts}
        return np.asarray(pictures(client, "img2img", **body)[0]).astype(int)

    # Forge reads a picture with noise that no seed repeats, so two runs may differ in the last digit
    without = drawn()
    nothing, steered = (drawn(**{"Concept Steer": {"args": [settings]}}) for settings in (one(0.0), one()))
    assert np.abs(nothing - without).max() <= 3 and np.abs(steered - without).mean() > 1


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_after_interrupt_and_skip_the_next_picture_is_not_steered(client: Client, plain, how):  # noqa: F811
    worker = threading.Thread(target=lambda: client.draw(one(), steps=150))
    worker.start()
    while worker.is_alive():
        if client.call("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] > 2:
            client.call(f"/sdapi/v1/{how}", {})
            break
        time.sleep(0.1)
    worker.join(300)
    assert not worker.is_alive()
    assert client.draw().pictures == plain


def test_after_an_exception_in_the_unet_the_next_picture_is_not_steered(client: Client, plain):  # noqa: F811
    with pytest.raises(Refused, match=forge.BROKEN):
        client.draw(one(), prompt=f"a doctor {forge.BREAK}", steps=6)
    assert client.draw().pictures == plain
    assert client.draw(one()).pictures != plain


def test_the_log_has_no_error_of_ours(client: Client, server):
    """Last of the pictures: nothing was printed that an extension's callback swallowed."""
    for word in ("Error executing callback", "Error loading script", "Error running process"):
        assert word not in server.log()
