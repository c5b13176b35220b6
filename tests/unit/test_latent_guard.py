"""The latent check: pictures are looked at while they are drawn, flagged ones get their answer, and it fails closed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from PIL import Image

from concept_steer.cli import latent_check, main
from concept_steer.demo import latent_clip as embedded
from concept_steer.demo import latent_guard as demo_guard
from concept_steer.demo import model as demo_model
from concept_steer.errors import ConceptSteerError, FamilyMismatch, SafetyError, SettingError
from concept_steer.latent_clip import LatentCheck, LatentDetector, Limits, calibrate, draw_guarded, make_guard, space
from concept_steer.latent_clip import guarded as guarded_module
from concept_steer.latent_clip.guard import read_limits, save_limits
from concept_steer.latent_clip.guarded import RETRY_SEED, Estimates
from concept_steer.safety import SafetySettings, check, plan
from concept_steer.safety.check import PLAIN
from concept_steer.sampling import sample, timesteps
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
PROMPTS = ["a knife", "a doctor", "a cat", "a beer mug"]
SEEDS, STEPS = [1, 2, 3, 4], 4
HOW = {"steps": STEPS, "guidance": 4.0, "batch": 4}
FLAGGED, FINE = [0, 3], [1, 2]  # as `watching` limits are set


@pytest.fixture(scope="module")
def clip():
    return embedded.load()


@pytest.fixture(scope="module")
def denoiser():
    from concept_steer.hosts.diffusers import DiffusersDenoiser

    return DiffusersDenoiser(demo_model.pipeline())


@pytest.fixture(scope="module")
def plain(denoiser):
    return sample(denoiser, PROMPTS, seeds=SEEDS, **HOW)


def always(value: float) -> Limits:
    """One limit for all categories and times."""
    count = len(demo_guard.CATEGORIES)
    return Limits((0.0,), torch.full((1, count), value), torch.ones(1, count))


@pytest.fixture(scope="module")
def blind(clip):
    return demo_guard.load_guard(clip, always(1e6))


@pytest.fixture(scope="module")
def watching(clip, denoiser):
    """Limits between what shows a category at the second step and what does not."""
    seen = Estimates()
    sample(denoiser, PROMPTS, seeds=SEEDS, watch=seen, **HOW)
    t = timesteps(denoiser.schedule, STEPS)[2]
    worst = demo_guard.load_guard(clip, always(0.0)).log_odds(seen.by_time()[t]).amax(1)
    assert worst[FLAGGED].min() > worst[FINE].max()  # what the tests below rely on
    return demo_guard.load_guard(clip, always(float(worst[FLAGGED].min() + worst[FINE].max()) / 2))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


def cost(denoiser, draw) -> float:
    before = denoiser.cost.snapshot()
    draw()
    return denoiser.cost.since(before).unet_rows


@pytest.mark.parametrize("answer", ["stop", "steer", "retry"])
def test_where_nothing_is_flagged_pictures_and_cost_are_those_without_the_check(denoiser, blind, plain, answer):
    harder = plan(SafetySettings(), "demo", denoiser.channels)
    found = draw_guarded(denoiser, blind, PROMPTS, SEEDS, check=LatentCheck(answer), harder=harder, **HOW)
    assert same(found.latents, plain)
    assert found.flagged == (False,) * 4 and found.done == ("kept",) * 4 and found.tries == (0,) * 4
    rows = cost(denoiser, lambda: draw_guarded(denoiser, blind, PROMPTS, SEEDS, check=LatentCheck(), **HOW))
    assert rows == 2 * STEPS * len(PROMPTS)


def test_with_the_switch_on_unflagged_pictures_are_the_switchs_own(denoiser, blind):
    made = plan(SafetySettings(), "demo", denoiser.channels)
    alone = sample(denoiser, PROMPTS, seeds=SEEDS, steers=made.steers, guide=made.guidance, **HOW)
    found = draw_guarded(denoiser, blind, PROMPTS, SEEDS, check=LatentCheck("steer"), plan=made, **HOW)
    assert same(found.latents, alone)


def test_stop_withholds_the_flagged_picture_only(denoiser, watching, plain):
    found = draw_guarded(denoiser, watching, PROMPTS, SEEDS, check=LatentCheck("stop"), **HOW)
    assert [i for i, flag in enumerate(found.flagged) if flag] == FLAGGED
    assert found.withheld == (True, False, False, True) and found.latents[FLAGGED].abs().max() == 0
    assert same(found.latents[FINE], plain[FINE])
    assert found.verdicts[0].score >= 0.5 > found.verdicts[1].score
    assert "2 of 4 pictures: 2 withheld" in found.text() and json.dumps(found.to_dict())


def test_a_batch_of_which_nothing_is_left_ends_at_the_step_of_the_check(denoiser, watching):
    told = []

    def draw():
        how = {**HOW, "batch": 1, "progress": lambda done, total: told.append((done, total))}
        return draw_guarded(denoiser, watching, PROMPTS, SEEDS, check=LatentCheck("stop"), **how)

    assert cost(denoiser, draw) == 2 * (2 * STEPS + 2 * 3)  # two whole pictures, and three of four steps of two
    assert told[-1][0] <= told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)


def test_steer_acts_on_the_flagged_pictures_only_and_costs_rows_there_only(denoiser, watching, plain):
    harder = plan(SafetySettings(), "demo", denoiser.channels)
    how = {"check": LatentCheck("steer"), "harder": harder, **HOW}
    found = draw_guarded(denoiser, watching, PROMPTS, SEEDS, **how)
    assert found.done == ("steered", "kept", "kept", "steered")
    assert same(found.latents[FINE], plain[FINE])
    assert all((found.latents[i] - plain[i]).abs().max() > 0.1 for i in FLAGGED)
    rows = cost(denoiser, lambda: draw_guarded(denoiser, watching, PROMPTS, SEEDS, **how))
    plain_rows = 2 * STEPS * len(PROMPTS)
    assert rows == plain_rows + 2 * len(FLAGGED)  # the safety text, at two steps of four


def test_steer_opens_the_gates_of_the_switch_that_is_on_already(denoiser, watching):
    quiet = plan(SafetySettings(level="gentle"), "demo", denoiser.channels)
    shut = replace(quiet, steers=tuple(replace(s, gate=s.gate.with_threshold(1e9)) for s in quiet.steers))
    alone = sample(denoiser, PROMPTS, seeds=SEEDS, steers=shut.steers, guide=shut.guidance, **HOW)
    found = draw_guarded(denoiser, watching, PROMPTS, SEEDS, check=LatentCheck("steer"), plan=shut, **HOW)
    assert same(found.latents[FINE], alone[FINE])
    assert all((found.latents[i] - alone[i]).abs().max() > 0.1 for i in FLAGGED)


def test_retry_draws_again_from_a_new_seed_until_nothing_is_flagged(denoiser, watching, plain, monkeypatch):
    asked = []
    whole = guarded_module.sample

    def harmless_at_the_second_try(model, prompts, *, seeds, **settings):
        asked.append(list(seeds))
        attempt, seed = divmod(seeds[0], RETRY_SEED)  # the first try is the very picture again
        if attempt == 2:
            return whole(model, [PROMPTS[FINE[0]]], seeds=[SEEDS[FINE[0]]], **settings)
        return whole(model, prompts, seeds=seeds if len(seeds) > 1 else [seed], **settings)

    monkeypatch.setattr(guarded_module, "sample", harmless_at_the_second_try)
    found = draw_guarded(denoiser, watching, PROMPTS, SEEDS, check=LatentCheck("retry", retries=2), **HOW)
    assert asked[:3] == [SEEDS, [SEEDS[0] + RETRY_SEED], [SEEDS[0] + 2 * RETRY_SEED]]
    assert found.done[0] == "drawn again" and found.tries == (2, 0, 0, 2) and not found.verdicts[0].flagged
    assert same(found.latents[FINE], plain[FINE]) and found.latents[0].abs().max() > 0


def test_retry_withholds_what_no_try_makes_harmless(denoiser, watching, monkeypatch):
    monkeypatch.setattr(guarded_module, "RETRY_SEED", 0)  # the very picture again
    found = draw_guarded(
        denoiser, watching, ["a knife"], [1], check=LatentCheck("retry", at=0.5, retries=1), **{**HOW, "batch": 1}
    )
    assert found.done == ("withheld",) and found.tries == (1,) and found.latents.abs().max() == 0


def test_without_a_model_no_picture_is_drawn(denoiser):
    with pytest.raises(SafetyError, match="no latent CLIP is loaded"):
        draw_guarded(denoiser, None, PROMPTS, SEEDS, check=LatentCheck(), **HOW)
    with pytest.raises(SafetyError, match="no latent CLIP"):
        make_guard(None, {"weapons": ["a knife"]})  # type: ignore[arg-type]


def test_a_model_of_another_latent_space_is_refused_and_both_are_named(denoiser, blind, clip, monkeypatch):
    class Other:
        space, scale, encode_latents, encode_text = space("sdxl"), clip.scale, clip.encode_latents, clip.encode_text

    other = replace(blind, clip=Other())
    with pytest.raises(FamilyMismatch, match=r"embedded demo model.*SDXL"):
        draw_guarded(denoiser, other, PROMPTS, SEEDS, check=LatentCheck(), **HOW)
    with pytest.raises(ConceptSteerError, match="is not known"):
        blind.check_model("custom:24x32")


def test_numbers_that_are_none_give_no_picture(denoiser, blind, monkeypatch):
    nan = torch.full((4, *denoiser.latent_shape), torch.nan)
    with pytest.raises(SafetyError, match="not finite"):
        draw_guarded(denoiser, blind, PROMPTS, SEEDS, check=LatentCheck(), start_latents=nan, **HOW)


@pytest.mark.parametrize("fault", ["raises", "nan", "too few"])
def test_a_check_that_fails_gives_no_picture(denoiser, blind, clip, fault):
    class Broken:
        space, scale = clip.space, clip.scale

        def encode_latents(self, latents):
            if fault == "raises":
                raise RuntimeError("out of memory")
            found = clip.encode_latents(latents)
            return found * torch.nan if fault == "nan" else found[1:]

        encode_text = clip.encode_text

    with pytest.raises(SafetyError, match=r"no picture|none comes out"):
        draw_guarded(denoiser, replace(blind, clip=Broken()), PROMPTS, SEEDS, check=LatentCheck(), **HOW)


def test_what_draws_around_the_check_gives_no_picture(denoiser, blind, monkeypatch):
    def without_looking(model, prompts, *, watch, **settings):
        return sample(model, prompts, **settings)

    monkeypatch.setattr(guarded_module, "sample", without_looking)
    with pytest.raises(SafetyError, match="looked at 0 of 4"):
        draw_guarded(denoiser, blind, PROMPTS, SEEDS, check=LatentCheck(), **HOW)


def test_steer_with_nothing_to_steer_with_is_refused(denoiser, watching):
    off = plan(SafetySettings(level="off"), "demo", denoiser.channels)
    for nothing in (None, off):
        with pytest.raises(SafetyError, match="nothing to steer them with"):
            draw_guarded(denoiser, watching, PROMPTS, SEEDS, check=LatentCheck("steer"), plan=nothing, **HOW)


@pytest.mark.parametrize("bad", [{"answer": "blur"}, {"at": 1.5}, {"at": float("nan")}, {"retries": -1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(SettingError):
        LatentCheck(**bad)


def test_the_check_of_finished_latents_is_a_detector(denoiser, watching, plain):
    detector = LatentDetector(watching, denoiser.encode_pictures)
    verdicts = detector.scores_of_latents(plain)
    assert [one.flagged for one in verdicts] == [True, False, False, True]
    pixels = ((denoiser.decode(plain).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(picture) for picture in pixels]
    done = check(images, detector, SafetySettings(on_flag="withhold"))
    assert done.report.detector == "latent-clip" and done.report.flags == (True, False, False, True)
    assert done.images[1] is images[1] and done.images[0] is not images[0]


def test_one_text_of_each_kind_is_the_published_pair(clip, plain):
    pair = make_guard(clip, {"weapons": ["a knife"]}, templates=["an image of {}"])
    texts = clip.encode_text(["an image of a knife", "an image of no knife"])
    wanted = clip.scale * clip.encode_latents(plain) @ (texts[0] - texts[1])
    torch.testing.assert_close(pair.log_odds(plain)[:, 0], wanted, atol=1e-4, rtol=1e-4)


def test_calibration_flags_the_share_of_harmless_pictures_that_was_asked_for(clip):
    latents = {t: torch.randn(100, 4, 16, 16, generator=torch.Generator().manual_seed(int(t))) for t in (0.0, 500.0)}
    made = calibrate(demo_guard.load_guard(clip, always(0.0)), latents, rate=0.05)
    for t, some in latents.items():
        assert sum(one.flagged for one in made.verdicts(some, t)) == 5
    middle = made.limits.at(250.0)[0]
    torch.testing.assert_close(middle, (made.limits.limits[0] + made.limits.limits[1]) / 2)
    with pytest.raises(SafetyError, match="too few"):
        calibrate(made, {0.0: latents[0.0][:10]}, rate=0.05)


def test_limits_of_other_categories_and_damaged_ones_are_refused(tmp_path, clip):
    names = tuple(demo_guard.CATEGORIES)
    path = save_limits(always(1.0), names, tmp_path / "limits.json")
    assert torch.equal(read_limits(path, names).limits, always(1.0).limits)
    with pytest.raises(SafetyError, match="holds limits for"):
        read_limits(path, names[:-1])
    path.write_text("{}")
    with pytest.raises(SafetyError, match="calibrate it again"):
        read_limits(path, names)
    with pytest.raises(SafetyError, match="calibrate it again"):
        read_limits(tmp_path / "missing.json", names)
    with pytest.raises(SafetyError, match="finite limit"):
        always(float("nan"))


def test_the_shipped_check_ranks_what_it_looks_for_above_the_rest_and_flags_no_harmless_picture(denoiser):
    shown = ["a knife", "a cigarette", "a middle finger", "a beer mug", "a syringe", "a bomb"]
    harmless = ["a cat", "a doctor", "a house", "a woman pilot", "a pizza", "a happy face"]
    how = {"check": LatentCheck(), "steps": 6, "guidance": 5.0, "batch": 12}
    found = draw_guarded(denoiser, demo_guard.load_guard(), [*shown, *harmless], range(10, 22), **how)
    scores = [one.score for one in found.verdicts]
    above = sum(bad > fine for bad in scores[:6] for fine in scores[6:])
    assert above >= 27  # of 36 pairs; by chance 18
    assert not any(found.flagged[6:])


def test_the_command_line_knows_the_answers_there_are():
    assert get_args(guarded_module.Answer) == latent_check.ANSWERS


def test_apply_looks_at_its_pictures_and_tells_of_it(tmp_path, capsys, monkeypatch, denoiser, watching):
    vector = ConceptVector(torch.zeros(denoiser.channels), "demo", "nothing").save(tmp_path / "nothing.safetensors")
    monkeypatch.setattr(demo_guard, "load_guard", lambda: watching)
    words = ["apply", "--prompt", "a knife", "--vector", str(vector), "--count", "1", "--seed", "1", "--steps", "4"]
    words += ["--guidance", "4", "--device", "cpu", "--latent-check", "stop", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "The latent check flagged 1 of 1 pictures: 1 withheld." in capsys.readouterr().out
    picture = Image.open(next((tmp_path / "out").glob("*-without.png")))
    assert picture.convert("RGB").getpixel((2, 2)) == PLAIN
    assert '"done": ["withheld"]' in json.dumps(dict(picture.info)).replace('\\"', '"')
