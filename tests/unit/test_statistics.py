"""The statistics behind every figure: checked against cases that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from concept_steer import statistics


def test_a_wilson_interval_is_that_of_the_textbook_and_never_leaves_zero_to_one():
    low, high = statistics.wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Newcombe 1998, method 3
    assert statistics.wilson(0, 20)[0] == 0 and 0 < statistics.wilson(0, 20)[1] < 0.17
    assert statistics.wilson(0, 0) == (0.0, 1.0)


def test_the_deviation_ratio_is_zero_at_equal_shares_and_one_when_a_single_class_is_left():
    assert statistics.deviation_ratio({"woman": 5, "man": 5}) == 0
    assert statistics.deviation_ratio({"woman": 0, "man": 9}) == 1
    assert statistics.deviation_ratio({"a": 3, "b": 3, "c": 0}) == pytest.approx((1 / 3) / (2 / 3))
    assert statistics.deviation_ratio({"woman": 3, "man": 1}, {"woman": 0.75, "man": 0.25}) == 0
    assert math.isnan(statistics.deviation_ratio({"woman": 0, "man": 0}))


def test_a_bootstrap_interval_of_the_mean_is_seeded_and_as_wide_as_theory_says():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
    low, high = statistics.bootstrap(values, lambda part: sum(part) / len(part))
    assert (low, high) == statistics.bootstrap(values, lambda part: sum(part) / len(part))
    assert low < sum(values) / 200 < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.15)


def test_the_frechet_distance_of_two_normal_sets_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(4000, 3, generator=generator)
    other = 2 * torch.randn(4000, 3, generator=generator) + torch.tensor([1.0, 0.0, 0.0])
    # |mu|^2 + tr(1 + 4 - 2 * sqrt(4)) = 1 + 3 * 1
    assert statistics.frechet(one, other) == pytest.approx(4.0, abs=0.25)
    assert statistics.frechet(one, one) == pytest.approx(0.0, abs=1e-6)


def test_rank_correlation_sees_order_only_and_ties_share_a_rank():
    assert statistics.rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert statistics.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert statistics.rank_correlation([1, 1, 2], [1, 1, 5]) == pytest.approx(1)
    assert math.isnan(statistics.correlation([1, 2], [3, 3]))
