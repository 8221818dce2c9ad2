"""The estimator: no bias on a curve, the coverage that it promises, and the power that it needs."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from benchmarks.lic.estimator import (
    EstimateError,
    Pair,
    Point,
    Question,
    answer,
    by_seed,
    estimate,
    excess,
    fit_curve,
    holm,
    to_point,
)
from tests.benchmarks.lic.made_up import psnr_at

STATIC = (-0.12, 0.0, 0.02, 0.11)


def on_curve(log_rate, gain=0.0, seed=0.0):
    """A point with `gain` per cent more bits than the curve of a seed, which lies `seed` higher."""
    return Point(log_rate + gain / 100, psnr_at(log_rate) + seed)


def pairs(draw, count, *, gain=0.0, moved=-0.035, noise=0.0):
    """Seeds with a run that lands `moved` from the static one at 0."""
    made = []
    for _ in range(count):
        seed, center = draw.gauss(0, 0.3), -1 + draw.gauss(0, 0.05)
        noisy = lambda x, g=0.0: on_curve(center + x, g + draw.gauss(0, noise), seed)  # noqa: B023, E731
        static = [noisy(x) for x in STATIC]
        made.append(Pair(noisy(moved, gain), [static[1]], static))
    return made


def test_a_point_is_the_mean_of_log_rates_and_of_decibels():
    point = to_point({"a": [0.1, 30.0], "b": [0.4, 32.0]})
    assert point == pytest.approx((math.log(0.2), 31.0))


@pytest.mark.parametrize("moved", [-0.2, -0.035, 0.1])
def test_runs_on_one_curve_do_not_differ_wherever_they_land(moved):
    assert excess(pairs(random.Random(0), 4, moved=moved)) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("gain", [-3.0, 2.0])
def test_a_gain_at_equal_quality_is_found(gain):
    assert excess(pairs(random.Random(0), 4, gain=gain)) == pytest.approx(gain, rel=0.03)


def test_the_slope_is_that_of_the_curve_and_a_constant_of_each_seed_does_not_matter():
    curve = fit_curve(pairs(random.Random(0), 3))
    derivative = (psnr_at(curve.center + 1e-4) - psnr_at(curve.center - 1e-4)) / 2e-4
    assert curve.slope == pytest.approx(derivative, rel=1e-3)
    assert curve.bend == pytest.approx(-0.3, rel=1e-3)


def test_intervals_contain_the_truth_as_often_as_they_say():
    draw, gain, contained = random.Random(1), -0.5, 0
    for _ in range(300):
        e = estimate(by_seed(pairs(draw, 6, gain=gain, moved=-0.15, noise=0.5)))
        contained += e.low <= gain <= e.high
    assert 0.92 <= contained / 300 <= 0.98


def test_six_seeds_find_one_per_cent_nearly_always():
    draw = random.Random(2)
    found = [estimate(by_seed(pairs(draw, 6, gain=1.0, noise=0.4))).p < 0.05 for _ in range(100)]
    assert fmean(found) > 0.8


def test_a_slope_that_is_not_known_well_makes_the_interval_wider():
    draw = random.Random(3)
    near = [estimate(by_seed(pairs(draw, 6, moved=0.0, noise=0.4))).half for _ in range(40)]
    far = [estimate(by_seed(pairs(draw, 6, moved=-0.5, noise=0.4))).half for _ in range(40)]
    assert fmean(far) > 1.5 * fmean(near)


def test_a_single_seed_says_nothing():
    (value,) = by_seed(pairs(random.Random(0), 1, gain=1.0))
    e = estimate([value])
    assert value == pytest.approx(1, rel=0.05)
    assert (e.half, e.p) == (math.inf, 1.0)


def test_a_curve_that_falls_is_refused():
    static = [Point(0.0, 30.0), Point(0.1, 29.0)]
    with pytest.raises(EstimateError, match="PSNR should rise with the rate"):
        by_seed([Pair(Point(0.05, 29.5), static[:1], static)] * 2)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_null_pairs_do_not_count_in_the_correction_and_a_failure_is_a_sentence():
    def fail():
        raise EstimateError("too short")

    rows = answer([
        Question("null", "", lambda: [0.1, -0.1, 0.0], null=True),
        Question("clear", "", lambda: [1.0, 1.1, 0.9]),
        Question("failed", "", fail),
    ])  # fmt: skip
    assert "holm" not in rows[0]
    assert rows[1]["holm"] == rows[1]["p"]
    assert rows[2]["error"] == "too short"
