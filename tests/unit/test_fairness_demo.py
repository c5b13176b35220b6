"""The gate and balancing on the embedded model, whose bias is real and known."""

from __future__ import annotations

import pytest
import torch

from concept_steer.fairness import Target, learn_attribute, plan
from concept_steer.fairness.known import DEFINITIONS

pytest.importorskip("diffusers")
ROLES = ("doctor", "detective", "scientist", "singer", "judge")


@pytest.fixture(scope="module")
def studio():
    from concept_steer.demo.job import Studio

    return Studio()


@pytest.fixture(scope="module")
def gender(studio):
    return learn_attribute(
        studio.denoiser,
        "gender",
        DEFINITIONS["gender"],
        ROLES,
        method="difference",
        contexts=("a {}", "a successful {}"),
        seeds=2,
    )


@pytest.mark.parametrize("prompt", ["a nurse", "a mechanic", "a successful pilot", "a photo of a fairy"])
def test_a_role_whose_pictures_lean_to_one_side_names_nothing(gender, studio, prompt):
    assert not gender.decides(studio.denoiser, prompt).named


@pytest.mark.parametrize("prompt", ["a woman nurse", "a female doctor", "a man", "a photo of a male fairy"])
def test_a_prompt_that_says_it_is_named(gender, studio, prompt):
    assert gender.decides(studio.denoiser, prompt).named


def test_a_woman_doctor_is_bit_identical_and_a_mechanic_is_balanced(gender, studio):
    seeds = [500, 501, 502, 503]
    left = plan(studio.denoiser, "a woman doctor", [Target(gender)], 2, always=["gender"])
    prompts = [left.drawn] * 2
    plain = studio.draw(prompts, seeds[:2], steps=3)
    assert torch.equal(studio.draw(prompts, seeds[:2], left.steers, steps=3), plain)

    made = plan(studio.denoiser, "a mechanic", [Target(gender)], 4, always=["gender"])
    seen = studio.judges(studio.draw([made.drawn] * 4, seeds, made.steers, steps=10)).labels("gender")
    assert seen == [one["gender"] for one in made.assignments] and set(seen) == {"woman", "man"}
