"""Intervals over seeds, and the distance from a curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.lic.statistics import Difference, holm, mean_curve, psnr_above
from benchmarks.lic.text import join, table, with_interval, with_range
from examples.lic.evaluation import Score

LINE = [Score(2.0**k, 30.0 + 3 * k) for k in range(4)]


@pytest.mark.parametrize("values", [(-0.18, -0.09, -0.15), (0.3, 0.5), (1.0, 2.0, 2.5, -1.0)])
def test_p_and_interval_are_those_of_the_t_test(values):
    expected = ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(0.95)
    difference = Difference(values)
    assert difference.p == pytest.approx(expected.pvalue)
    assert difference.interval == pytest.approx((np.mean(values), interval.low, interval.high))


def test_intervals_of_three_seeds_cover_the_truth_at_their_level():
    draws = np.random.default_rng(0).normal(0.0, 1.0, (1000, 3))
    excluded = sum(Difference(tuple(row)).sign() != 0 for row in draws.tolist())
    assert 30 <= excluded <= 72


def test_one_seed_has_no_interval_and_equal_seeds_no_doubt():
    assert (Difference((2.0,)).sign(), Difference((2.0,)).p) == (0, 1.0)
    assert (Difference((2.0, 2.0)).sign(), Difference((2.0, 2.0)).p) == (1, 0.0)
    assert (Difference((0.0, 0.0)).sign(), Difference((0.0, 0.0)).p) == (0, 1.0)


def test_holm_golden_values():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_psnr_above_a_curve():
    assert psnr_above(Score(2.0, 33.5), LINE) == pytest.approx(0.5)
    assert psnr_above(Score(0.9, 30.0), LINE) is None
    assert psnr_above(Score(8.1, 40.0), LINE) is None
    assert psnr_above(Score(2.0, 33.0), LINE[:2]) is None


def test_a_mean_curve_is_over_seeds_and_photographs():
    runs = [{"scores": {"a": (1.0, 30.0), "b": (2.0, 31.0)}}, {"scores": {"a": (3.0, 32.0)}}]
    assert mean_curve([[run] for run in runs]) == [Score(2.0, 31.0)]


def test_text_of_numbers():
    assert with_interval(Difference((1.0, 3.0)), 1, "dB") == "+2.0 dB [−10.7, +14.7]"
    assert with_interval(Difference((-1.0,)), 1, "%") == "−1.0 % (one seed)"
    assert with_interval(None, 1, "%") == "–"
    assert with_range([1.0, -3.0], 1, "%") == "−1.0 % [−3.0, +1.0]"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert table(("a", "b"), [(1, math.pi)]).splitlines()[1:] == [
        "| --- | --- |", f"| 1 | {math.pi} |"
    ]  # fmt: skip
