"""Bjøntegaard deltas and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from examples.lic.bd import CurveError, Interval, bootstrap, compare, front
from examples.lic.evaluation import Score

ANCHOR = [
    Score(9487.76, 40.037), Score(4593.60, 38.615), Score(2486.44, 36.845), Score(1358.24, 34.851),
]  # fmt: skip
TEST = [
    Score(9787.80, 40.121), Score(4469.00, 38.651), Score(2451.52, 36.970), Score(1356.24, 34.987),
]  # fmt: skip
LINE = [Score(2.0**k, 30.0 + 3 * k) for k in range(5)]


@pytest.mark.parametrize(("method", "rate"), [("pchip", -4.417485), ("akima", -4.425245)])
def test_golden_values(method, rate):
    assert compare(TEST, ANCHOR, method=method).rate == pytest.approx(rate, abs=1e-5)
    assert compare(TEST[::-1], ANCHOR, method=method).rate == pytest.approx(rate, abs=1e-5)


@pytest.mark.parametrize("method", ["pchip", "akima"])
def test_a_shifted_line_has_a_known_distance_and_overlap(method):
    cheaper = [Score(0.9 * s.bpp, s.psnr) for s in LINE]
    delta = compare(cheaper, LINE, method=method)
    assert delta.rate == pytest.approx(-10)
    assert delta.psnr == pytest.approx(3 * math.log2(1 / 0.9))
    assert delta.psnr_overlap == pytest.approx(1)
    assert delta.rate_overlap == pytest.approx(
        (math.log(16) - math.log(1 / 0.9)) / (math.log(16) + math.log(1 / 0.9))
    )
    assert compare(LINE, LINE, method=method).rate == pytest.approx(0)


def test_overlap_is_the_shared_part_of_both_ranges():
    assert compare(LINE[1:4], LINE).psnr_overlap == pytest.approx(0.5)
    assert compare(LINE[:4], LINE[1:]).psnr_overlap == pytest.approx(0.5)


def test_beaten_points_are_left_out():
    beaten = [Score(3.0, 31.0), Score(2.0, 32.0), Score(4.0, 36.0)]
    assert front([*beaten, *LINE]) == LINE
    assert compare([*LINE, *beaten], LINE).rate == pytest.approx(0)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (LINE[:2], "test should have at least 3 points .* Found 2 among 2"),
        ([Score(s.bpp, 60 - s.psnr) for s in LINE], "Found 1 among 5"),
        ([Score(s.bpp, s.psnr + 20) for s in LINE], "should overlap in PSNR. Found 50 to 62 dB"),
        ([Score(100 * s.bpp, s.psnr) for s in LINE], "should overlap in rate. Found 100 to"),
        ([Score(s.bpp, s.psnr + 11.5) for s in LINE], "at least 25% of the shorter .* Found 4%"),
        ([*LINE, Score(0.0, 20.0)], "positive rate and a finite PSNR. Found 0 bpp"),
        ([*LINE, Score(20.0, math.inf)], "positive rate and a finite PSNR"),
    ],
)
def test_curves_that_cannot_be_compared(points, message):
    with pytest.raises(CurveError, match=message):
        compare(points, LINE)


def test_an_interval_covers_the_mean_at_about_its_level():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        table = random.normal(1.0, 1.0, (12, 1)) + random.normal(0.0, 0.5, (1, 8))
        values = {s: dict(zip("abcdefgh", row, strict=True)) for s, row in enumerate(table)}
        interval = bootstrap(values, samples=400, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 170 <= hits <= 196


def test_an_interval_widens_with_seeds_and_with_images_that_differ():
    def width(by_seed, by_image):
        values = {s: {str(i): by_seed * s + by_image * i for i in range(4)} for s in range(4)}
        interval = bootstrap(values, samples=1000)
        assert interval.mean == pytest.approx(1.5 * (by_seed + by_image))
        return interval.high - interval.low

    assert width(0, 0) == pytest.approx(0)
    assert width(0, 1) == pytest.approx(width(1, 0), abs=0.15)
    assert width(0, 1) > 1
    assert width(1, 1) > 1.2 * width(1, 0)


def test_a_seed_that_disagrees_takes_the_sign_away():
    assert Interval(-2.0, -3.0, -1.0, [-1.0, -3.0]).sign() == -1
    assert Interval(2.0, 1.0, 3.0, [1.0, 3.0]).sign() == 1
    assert Interval(-2.0, -3.0, 0.5, [-1.0, -3.0]).sign() == 0
    assert Interval(-2.0, -3.0, -1.0, [1.0, -5.0]).sign() == 0


@pytest.mark.parametrize("values", [{}, {0: {}}, {0: {"a": 1.0}, 1: {"b": 1.0}}])
def test_a_bootstrap_needs_a_full_table(values):
    with pytest.raises(CurveError, match="a value for each image and seed"):
        bootstrap(values)
