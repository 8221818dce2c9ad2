"""Bjøntegaard deltas and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from examples.lic.bd import CurveError, compare, front, gap_above, t_interval
from examples.lic.evaluation import Score

ANCHOR = [
    Score(9487.76, 40.037), Score(4593.60, 38.615), Score(2486.44, 36.845), Score(1358.24, 34.851),
]  # fmt: skip
TEST = [
    Score(9787.80, 40.121), Score(4469.00, 38.651), Score(2451.52, 36.970), Score(1356.24, 34.987),
]  # fmt: skip
LINE = [Score(2.0**k, 30.0 + 3 * k) for k in range(5)]


def test_the_published_check_of_the_bd_rate():
    assert compare(TEST, ANCHOR).rate == pytest.approx(-4.417485, abs=1e-5)
    assert compare(TEST[::-1], ANCHOR).rate == pytest.approx(-4.417485, abs=1e-5)


def test_a_shifted_line_has_a_known_distance():
    cheaper = [Score(0.9 * s.bpp, s.psnr) for s in LINE]
    delta = compare(cheaper, LINE)
    assert delta == pytest.approx((-10, 3 * math.log2(1 / 0.9), 1))
    assert compare(LINE, LINE).rate == pytest.approx(0)


def test_overlap_is_the_shared_part_of_the_shorter_range():
    assert compare(LINE[1:4], LINE).psnr_overlap == pytest.approx(1)
    assert compare(LINE[:4], LINE[1:]).psnr_overlap == pytest.approx(2 / 3)


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
        ([Score(s.bpp, s.psnr + 8.6) for s in LINE], "at least 50% of the shorter .* Found 28%"),
        ([*LINE, Score(0.0, 20.0)], "positive rate and a finite PSNR. Found 0 bpp"),
        ([*LINE, Score(20.0, math.inf)], "positive rate and a finite PSNR"),
    ],
)
def test_curves_that_cannot_be_compared(points, message):
    with pytest.raises(CurveError, match=message):
        compare(points, LINE)


def test_an_interval_contains_the_mean_at_its_level():
    """Of three seeds, where percentile bootstraps left it out far too often."""
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 3))
    intervals = [t_interval(list(row)) for row in draws]
    hits = sum(i.low <= 1.0 <= i.high for i in intervals) / len(intervals)
    assert hits == pytest.approx(0.95, abs=0.015)


def test_an_interval_is_students():
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, 2.48414, 2.48414), abs=1e-5)
    assert t_interval([5.0]) == (5.0, -math.inf, math.inf)
    with pytest.raises(CurveError, match="at least one value"):
        t_interval([])


def test_gap_to_a_curve():
    curve = [Score(0.4, 30.0), Score(0.1, 26.0)]
    assert gap_above(Score(0.2, 28.5), curve) == pytest.approx(0.5)
    assert gap_above(Score(0.1, 25.0), curve) == pytest.approx(-1)
    assert gap_above(Score(0.5, 31.0), curve) is None
    assert gap_above(Score(0.05, 31.0), curve) is None
