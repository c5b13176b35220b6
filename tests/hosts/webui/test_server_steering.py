"""Steering in the real AUTOMATIC1111, through its API; pictures are compared bit for bit within one process."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from concept_steer.fairness import Attribute
from concept_steer.fairness.attributes import Value
from concept_steer.vector import ConceptVector

from .client import Refused, pixels

pytestmark = pytest.mark.usefixtures("known")


@pytest.fixture
def plain(client):
    return client.draw().pictures


def png(colour):
    """A plain picture for the API."""
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def one(strength=1.0, **more):
    return {"rows": [{"vector": "one", "strength": strength, **more}]}


def test_off_and_strength_zero_are_the_picture_without_us_and_write_nothing(client, plain):
    for settings in (one(0.0), {**one(), "enabled": False}, [False, "one", 1.0], [True, "one", 0.0]):
        drawn = client.draw(settings)
        assert drawn.pictures == plain
        assert "Concept Steer" not in drawn.infotexts[0]


def test_steering_changes_the_picture_and_the_next_one_is_as_before(client, plain):
    steered = client.draw(one())
    assert steered.pictures != plain
    assert 'Concept Steer: "concept:one:1"' in steered.infotexts[0]
    assert client.draw().pictures == plain


def test_prompt_syntax_the_apis_dict_and_its_list_give_the_same_picture(client, plain):
    by_dict = client.draw(one(0.8, start=0.2, end=0.9)).pictures
    assert by_dict != plain
    assert client.draw([True, "one", 0.8, 0.2, 0.9, "prompt"]).pictures == by_dict
    assert client.draw(prompt="a doctor <concept:one:0.8:start=0.2:end=0.9>").pictures == by_dict


def test_tags_and_rows_add_up(client):
    both = {"rows": [{"vector": "one"}, {"vector": "two", "strength": -0.5}]}
    assert client.draw(one(), prompt="a doctor <concept:two:-0.5>").pictures == client.draw(both).pictures


@pytest.mark.parametrize("prompt", ["a doctor <concept:nobody:1>", "a doctor <concept:one:much>", "<concept:../one:1>"])
def test_a_wrong_tag_ends_the_job_with_its_reason(client, plain, prompt):
    with pytest.raises(Refused, match=r"nobody|not understood|finite number|cannot name"):
        client.draw(prompt=prompt)
    assert client.draw().pictures == plain


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rows": [{"vector": "nobody"}]}, "nobody"),
        ({"rows": [{"vector": "foreign"}]}, r"Stable Diffusion 1\.x"),
        ({"row": []}, "is not among them"),
        ({"rows": [{"vector": "one", "end": 3}]}, "end is 3"),
    ],
)
def test_settings_that_cannot_be_drawn_end_the_job_with_their_reason(client, settings, reason):
    with pytest.raises(Refused, match=reason):
        client.draw(settings)


@pytest.mark.parametrize("batch_cond_uncond", [True, False])
def test_each_picture_of_a_batch_is_steered_as_alone(client, batch_cond_uncond):
    with client.options(batch_cond_uncond=batch_cond_uncond):
        drawn, without = client.draw(one(), batch_size=2), client.draw(batch_size=2)
        assert len(drawn.pictures) == 2 and not set(drawn.pictures) & set(without.pictures)
        assert client.draw(one(), batch_size=2).pictures == drawn.pictures


def test_a_batch_in_one_call_or_in_several_is_steered_alike(client):
    """Sides of CFG told wrongly would change pictures far more than rounding does: the sides are compared."""
    sides = {}
    for cut in (True, False):
        with client.options(batch_cond_uncond=cut):
            sides[cut] = [client.draw(one(rows=side)).pictures for side in ("cond", "uncond", "both")]
    for found in sides.values():
        assert len({tuple(pictures) for pictures in found}) == 3


@pytest.mark.parametrize(
    "over",
    [
        {"prompt": "a doctor AND a nurse :0.5", "batch_size": 2},
        {"prompt": "a doctor, " * 40, "batch_size": 2},
        {"prompt": "a doctor, " * 40 + " AND a nurse", "batch_size": 2},
        {"sampler_name": "Heun"},
        {"sampler_name": "DDIM"},
        {"sampler_name": "DPM++ 2M"},
        {"n_iter": 2},
        {"sampler_name": "DPM2"},
        {"sampler_name": "DPM++ SDE"},
        {"sampler_name": "PLMS"},
        {"sampler_name": "UniPC"},
        {"s_min_uncond": 3.0, "steps": 6},
        {"cfg_scale": 1},
    ],
    ids=["and", "long", "long and", "heun", "ddim", "dpm", "two batches", "dpm2", "sde", "plms", "unipc", "ngms", "1"],
)
def test_layouts_and_samplers_are_steered(client, over):
    without = client.draw(**over)
    drawn = client.draw(one(), **over)
    assert all(a != b for a, b in zip(drawn.pictures, without.pictures, strict=True))
    assert client.draw(one(0.0), **over).pictures == without.pictures
    # the other side too: rows that are told apart wrongly would be the same
    if over.get("cfg_scale") != 1:
        assert client.draw(one(rows="uncond"), **over).pictures != drawn.pictures


@pytest.mark.parametrize(
    ("options", "over"),
    [
        ({"pad_cond_uncond": True}, {"prompt": "a doctor, " * 40}),
        ({"pad_cond_uncond_v0": True}, {"prompt": "a doctor, " * 40}),
        ({"batch_cond_uncond": False}, {"prompt": "a doctor, " * 40 + " AND a nurse", "batch_size": 2}),
        ({"skip_early_cond": 0.4}, {"steps": 6}),
        ({"s_min_uncond_all": True}, {"steps": 6, "s_min_uncond": 3.0}),
    ],
    ids=["padded", "padded as before 1.6", "cut", "early steps without negative prompt", "ngms in all steps"],
)
def test_whatever_the_web_ui_does_with_its_batches_both_sides_are_steered_by_themselves(client, options, over):
    with client.options(**options):
        found = [client.draw(**over), *(client.draw(one(rows=side), **over) for side in ("cond", "uncond", "both"))]
        assert len({tuple(drawn.pictures) for drawn in found}) == 4
        assert client.draw(one(0.0), **over).pictures == found[0].pictures


HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 2,
}


def test_the_hires_pass_has_its_own_factor_and_its_own_tags(client):
    same = client.draw(one(), **HIRES).pictures
    off = client.draw({**one(), "hires": 0.0}, **HIRES).pictures
    plain = client.draw(**HIRES).pictures
    assert len({tuple(same), tuple(off), tuple(plain)}) == 3
    tagged = client.draw(prompt="a doctor <concept:one:1>", hr_prompt="a doctor", **HIRES).pictures
    assert tagged == off
    again = client.draw(prompt="a doctor <concept:one:1>", hr_prompt="a doctor <concept:one:1>", **HIRES).pictures
    assert again == same
    with pytest.raises(Refused, match="nobody"):
        client.draw(hr_prompt="a doctor <concept:nobody:1>", **HIRES)


def test_img2img_and_inpainting_are_steered(client):
    over = {"init_images": [png("grey")], "denoising_strength": 0.8, "path": "img2img"}
    for more in ({}, {"mask": png("white"), "inpainting_fill": 1}):
        without = client.draw(**over, **more)
        assert client.draw(one(), **over, **more).pictures != without.pictures
        assert client.draw(one(0.0), **over, **more).pictures == without.pictures


def test_the_infotext_draws_the_same_picture_again(client):
    settings = {
        "rows": [{"vector": "one", "strength": 0.8, "start": 0.2}, {"vector": "two", "strength": -0.5, "rows": "both"}]
    }
    drawn = client.draw(settings)
    again = client.call("/sdapi/v1/txt2img", {"infotext": drawn.infotexts[0]})
    info = json.loads(again["info"])
    assert info["infotexts"][0] == drawn.infotexts[0]

    assert [pixels(picture) for picture in again["images"]] == drawn.pictures


@pytest.fixture
def kinds(known):
    """An attribute of two values, which are the vectors one and two."""
    values = {name: Value(ConceptVector.load(known / f"{name}.safetensors"), (f"a {name} {{}}",)) for name in WANTED}
    path = Attribute("kind", values).save(known / "kind.attribute.safetensors", overwrite=True)
    yield "kind"
    path.unlink()


WANTED = ("one", "two")


def test_fair_gives_each_picture_of_a_run_its_value_and_the_infotext_draws_one_alone_again(client, kinds):
    assert kinds in client.call("/concept-steer/v1/attributes")
    over = {"batch_size": 2, "n_iter": 2}
    with client.options(return_grid=False):
        fair = client.draw({"fair": {"attribute": kinds}}, **over)
        assert kinds in client.comments() and "one" in client.comments()
        by_value = {name: client.draw({"rows": [{"vector": name}]}, **over).pictures for name in WANTED}
    got = [[name for name in WANTED if by_value[name][i] == fair.pictures[i]] for i in range(4)]
    assert sorted(name for names in got for name in names) == ["one", "one", "two", "two"]
    for number, infotext in enumerate(fair.infotexts):
        assert "fair:kind" in infotext
        answer = client.call("/sdapi/v1/txt2img", {"infotext": infotext})
        alone = client.draw({"rows": [{"vector": got[number][0]}]}, seed=7 + number)
        assert [pixels(picture) for picture in answer["images"]] == alone.pictures


def test_fair_shares_and_what_cannot_be_shared_out(client, kinds):
    with client.options(return_grid=False):
        all_one = client.draw({"fair": {"attribute": kinds, "targets": "one=1,two=0"}}, batch_size=3)
        assert all_one.pictures == client.draw(one(), batch_size=3).pictures
    for fair, reason in (({"attribute": "nothing"}, "no attribute"), ({"attribute": kinds, "targets": "x=1"}, "x")):
        with pytest.raises(Refused, match=reason):
            client.draw({"fair": fair})


def test_an_xyz_plot_has_our_axes(client):
    types = client.call("/sdapi/v1/script-info")
    plot = next(s for s in types if s["name"] == "x/y/z plot" and not s["is_img2img"])
    labels = plot["args"][0]["choices"]
    assert "[Concept Steer] Vector 1" in labels and "[Concept Steer] Strength 1" in labels
    x, y = labels.index("[Concept Steer] Strength 1"), labels.index("[Concept Steer] Vector 1")
    args = [x, "0,1", [], y, "", ["one", "two"], 0, "", [], True, True, False, False, False, False, False, 0, False]
    known = len(plot["args"])
    drawn = client.draw(script_name="x/y/z plot", script_args=args[:known], send_images=True)
    cells = drawn.pictures[-4:]
    plain = client.draw().pictures[0]
    want = {(name, s): client.draw({"rows": [{"vector": name, "strength": s}]}).pictures[0]
            for name in ("one", "two") for s in (0.0, 1.0)}  # fmt: skip
    assert cells == [want["one", 0.0], want["one", 1.0], want["two", 0.0], want["two", 1.0]]
    assert want["one", 0.0] == plain


def test_the_api_lists_vectors_by_name_and_knows_no_paths(client, base):
    listed = client.call("/concept-steer/v1/vectors")
    assert {"one", "two", "foreign"} <= {entry["name"] for entry in listed}
    about = client.call("/concept-steer/v1/vectors/one")
    assert about["family"] == "demo" and about["shape"] == [192]
    assert client.call(f"/concept-steer/v1/vectors/{about['hash'][:12]}")["name"] == "one"
    assert str(base) not in json.dumps([listed, about])
    with pytest.raises(Refused) as refused:
        client.call("/concept-steer/v1/vectors/nobody")
    assert "nobody" in str(refused.value) and str(base) not in str(refused.value)


def test_cards_are_of_vectors_for_the_model_that_is_loaded(client):
    cards = client.call("/trouble/cards")
    assert {"one", "two"} <= set(cards) and "foreign" not in cards
    assert cards["one"].startswith('"<concept:one:"')
    with client.options(concept_steer_all_cards=True):
        assert "foreign" in client.call("/trouble/cards")
    single = client.call("/sd_extra_networks/get-single-card?page=concepts&tabname=txt2img&name=foreign")
    assert "foreign" in single["html"]


def test_the_log_has_no_error_of_ours(client, server):
    """Last in this file: nothing was printed that an extension's callback swallowed."""
    assert "Error executing callback" not in server.log()
    assert "Error loading script" not in server.log()
    assert "Error running process" not in server.log()
