"""The figures of noise optimisation: what is asked for, what counts as faithful, and ratios over the same prompts."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from concept_steer.evaluate import latent_clip_reno as reno
from concept_steer.evaluate.latent_clip_reno_bench import Wanted, untrained_pixel_tower, wanted


def row(role: list[int], gender: list[int], seconds: float, distance: float) -> dict:
    return {
        "role": role, "gender": gender, "tone": role, "reward": [0.5] * len(role), "seconds": seconds,
        "processor_seconds": seconds, "unet_rows": 50.0, "noise": {"std": [1.0] * len(role)},
        "latent_distance": [distance], "judge_distance": [distance],
    }  # fmt: skip


FOUND = {
    "none": [row([1, 0], [1, 0], 0.1, 2.0), row([1, 1], [0, 0], 0.1, 4.0)],
    "latent": [row([1, 1], [1, 1], 1.0, 1.0), row([1, 1], [0, 1], 3.0, 2.0)],
    "best_of_50": [row([1, 0], [1, 0], 0.5, 2.0), row([1, 1], [0, 0], 0.5, 4.0)],
    "pixel": [row([1, 1], [1, 1], 20.0, 1.0)],
}


def test_prompts_name_a_role_a_gender_and_a_tone_each_and_do_not_repeat():
    found = wanted(32)
    assert len({one.prompt for one in found}) == 32
    assert Wanted("pilot", "woman", "dark").prompt == "a woman pilot with dark skin"
    assert {one.tone for one in found} == {"light", "medium-light", "medium", "medium-dark", "dark"}
    assert {one.gender for one in found} == {"woman", "man"}


def test_faithful_is_what_has_both_role_and_gender():
    figures = {figure.metric: figure for figure in reno._of_method("none", FOUND["none"], "again")}
    assert (figures["faithfulness"].value, figures["faithfulness"].n) == (0.25, 4)
    assert figures["faithfulness_role"].value == 0.75
    assert figures["noise_std"].value == 1.0


def test_gains_and_ratios_are_of_the_same_prompts_and_one_alone_has_no_interval():
    gains = {figure.method: figure for figure in reno._gains(FOUND, "again")}
    assert gains["latent"].value == 0.5 and gains["best_of_50"].value == 0.0
    ratios = {(figure.method, figure.metric): figure for figure in reno._ratios(FOUND, "again")}
    seconds = ratios["latent", "seconds_ratio"]
    assert (seconds.value, seconds.low, seconds.n) == (0.05, None, 1)
    assert ratios["latent", "diversity_kept"].value == 0.5
    text = reno.reno_section([*gains.values(), *ratios.values()])[1]
    assert "0.05" in text and "0.5 (" in text


def test_the_stand_in_for_a_pixel_tower_is_of_the_latent_ones_size():
    from concept_steer.demo import latent_clip

    mine, theirs = untrained_pixel_tower(), latent_clip.load()
    assert mine.visual.positional_embedding.shape == theirs.visual.positional_embedding.shape
    assert mine.config.vision == theirs.config.vision
