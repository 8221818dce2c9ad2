"""Bjøntegaard deltas of rate-distortion curves, and confidence intervals for their means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from examples.lic.evaluation import Score

POINTS = 3
"""Fewest points a curve needs: with two, every interpolation is a straight line."""

OVERLAP = 0.5
"""Least part of the shorter curve's PSNR range that the other one has to cover.

Where curves share less, a BD-rate rests on their ends: those of mean curves were seen to contradict
the curves of all seeds and photographs."""


class CurveError(Exception):
    """Curves that cannot be compared; the message says why, and what would help."""


class Delta(NamedTuple):
    """The distance of one curve from another."""

    rate: float
    """BD-rate in per cent: bits more (positive) or fewer (negative) for the same PSNR."""
    psnr: float
    """BD-PSNR in dB: gained (positive) or lost at the same rate."""
    psnr_overlap: float
    """Part of the shorter curve's PSNR range that they share, where `rate` is a mean."""


def compare(test: Sequence[Score], anchor: Sequence[Score]) -> Delta:
    """Return the mean distance of curve `test` from curve `anchor`, each first made a front.

    The log-rate is interpolated by PCHIP between the points, which may come in any order.

    Raises:
        CurveError: When a curve has fewer than three points that increase, or the two overlap in
            less than half of the shorter one's PSNR range.
    """
    test, anchor = front(test, "test"), front(anchor, "anchor")
    overlap = _overlap([s.psnr for s in test], [s.psnr for s in anchor], "PSNR", "dB")
    _overlap([s.bpp for s in test], [s.bpp for s in anchor], "rate", "bpp")
    if overlap < OVERLAP:
        raise CurveError(
            f"The curves should share at least {OVERLAP:.0%} of the shorter one's PSNR range. "
            f"Found {overlap:.0%}. Choose λ so that they cover the same rates."
        )
    import bjontegaard  # here, because it imports pyplot, which takes a second

    points = [list(axis) for curve in (anchor, test) for axis in zip(*curve, strict=True)]
    # The package warns below an overlap of its own choice; here the overlap is part of the answer.
    options = {"method": "pchip", "require_matching_points": False, "min_overlap": 0}
    rate, psnr = (f(*points, **options) for f in (bjontegaard.bd_rate, bjontegaard.bd_psnr))
    return Delta(float(rate), float(psnr), overlap)


def front(points: Sequence[Score], name: str = "curve") -> list[Score]:
    """Return the points that no other point beats in both rate and PSNR, in order of rate.

    Interpolation needs curves that increase; in short trainings a point can fall below others.
    """
    if bad := [p for p in points if not (0 < p.bpp < math.inf and math.isfinite(p.psnr))]:
        raise CurveError(
            f"Points of the {name} should have a positive rate and a finite PSNR. Found "
            f"{bad[0].bpp:g} bpp at {bad[0].psnr:g} dB. Leave that image or run out."
        )
    kept: list[Score] = []
    for point in sorted(points, key=lambda p: (p.bpp, -p.psnr)):
        if not kept or point.psnr > kept[-1].psnr:
            kept.append(point)
    if len(kept) < POINTS:
        raise CurveError(
            f"The {name} should have at least {POINTS} points that increase in rate and PSNR. "
            f"Found {len(kept)} among {len(points)}. Add λ, or train longer."
        )
    return kept


def _overlap(test: Sequence[float], anchor: Sequence[float], axis: str, unit: str) -> float:
    """The common part of two sorted ranges, relative to the shorter one."""
    left, right = max(test[0], anchor[0]), min(test[-1], anchor[-1])
    if left >= right:
        raise CurveError(
            f"The curves should overlap in {axis}. Found {test[0]:.3g} to {test[-1]:.3g} {unit} "
            f"against {anchor[0]:.3g} to {anchor[-1]:.3g} {unit}. Choose λ so that they cover "
            "the same rates."
        )
    return (right - left) / min(test[-1] - test[0], anchor[-1] - anchor[0])


def gap_above(point: Score, curve: Sequence[Score]) -> float | None:
    """PSNR of `point` above a curve at the same rate, in dB; None outside of the curve's rates.

    The curve is linear in log-rate between its points. Unlike a BD-rate, it needs only one point.
    """
    for left, right in pairwise(sorted(curve)):
        if left.bpp <= point.bpp <= right.bpp and left.bpp < right.bpp:
            along = math.log(point.bpp / left.bpp) / math.log(right.bpp / left.bpp)
            return point.psnr - (left.psnr + along * (right.psnr - left.psnr))
    return None


class Interval(NamedTuple):
    """A mean, and a confidence interval for it."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of independent values with Student's t-interval; infinite for a single value.

    Of two or three values it is wide, as it has to be.
    """
    if not values:
        raise CurveError("An interval needs at least one value. Found none. Compare more images.")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    half = stdtrit(count - 1, (1 + level) / 2) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)
