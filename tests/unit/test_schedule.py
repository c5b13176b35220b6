from __future__ import annotations

import math

import pytest

from concept_steer.errors import ConceptSteerError
from concept_steer.schedule import Schedule, percent_of_timestep


@pytest.mark.parametrize("percent", [0.0, 0.3, 1.0])
def test_the_default_schedule_is_exactly_one_everywhere(percent):
    assert Schedule().weight(percent) == 1.0


@pytest.mark.parametrize("percent", [0.0, 0.199, 0.8, 0.9, 1.0, -0.1])
def test_outside_the_window_the_weight_is_exactly_zero(percent):
    assert Schedule(0.2, 0.8).weight(percent) == 0.0


@pytest.mark.parametrize("percent", [0.2, 0.5, 0.799])
def test_inside_the_window_without_fade_the_weight_is_exactly_one(percent):
    assert Schedule(0.2, 0.8).weight(percent) == 1.0


def test_windows_side_by_side_never_act_in_the_same_step():
    first, second = Schedule(0.0, 0.5), Schedule(0.5, 1.0)
    assert all(first.weight(i / 100) + second.weight(i / 100) == 1.0 for i in range(101))


def test_the_ramp_rises_and_falls_linearly_inside_the_window():
    s = Schedule(0.2, 0.8, fade=0.2)
    expected = {0.2: 0, 0.25: 0.25, 0.3: 0.5, 0.4: 1, 0.5: 1, 0.6: 1, 0.7: 0.5, 0.79: 0.05}
    assert {p: s.weight(p) for p in expected} == pytest.approx(expected, abs=1e-9)


def test_the_ramp_never_leaves_zero_to_one():
    s = Schedule(0.1, 0.4, fade=0.15)
    assert all(0.0 <= s.weight(i / 997) <= 1.0 for i in range(998))
    assert s.weight(0.25) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((-0.1, 1.0), "start"),
        ((0.0, 1.1), "end"),
        ((math.nan, 1.0), "start"),
        ((0.0, math.inf), "end"),
        (("0", 1.0), "start"),
        ((0.0, 1.0, -0.1), "fade"),
        ((0.5, 0.5), "never act"),
        ((0.6, 0.5), "never act"),
        ((0.2, 0.6, 0.3), "at most 0.2"),
    ],
)
def test_bad_values_are_value_errors_in_words(values, word):
    with pytest.raises(ValueError, match=word) as caught:
        Schedule(*values)
    assert isinstance(caught.value, ConceptSteerError)


def test_a_percent_that_is_not_a_number_is_an_error():
    with pytest.raises(ValueError, match="not a number"):
        Schedule().weight(percent_of_timestep(math.nan))


@pytest.mark.parametrize(("t", "percent"), [(999, 0.0), (0, 1.0), (499.5, 0.5), (1200, 0.0), (-3, 1.0)])
def test_percent_of_timestep_runs_from_noise_to_picture_and_is_clipped(t, percent):
    assert percent_of_timestep(t) == percent


def test_percent_of_timestep_needs_two_steps():
    with pytest.raises(ValueError, match="at least 2"):
        percent_of_timestep(0, 1)
