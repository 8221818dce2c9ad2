"""Differences over seeds, and the distance of a point from a rate-distortion curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from scipy.interpolate import PchipInterpolator
from scipy.stats import t

from examples.lic.bd import CurveError, Interval, front, t_interval
from examples.lic.evaluation import Score


@dataclass(frozen=True)
class Difference:
    """A difference of two methods that share the seed, one value per seed.

    Photographs are the same for all seeds and are averaged before; they are not resampled. So the
    interval is one for further seeds on the same photographs.
    """

    by_seed: tuple[float, ...]

    @cached_property
    def interval(self) -> Interval:
        """The mean with its 95 % t-interval."""
        return t_interval(self.by_seed)

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of 0; 1 for a single seed."""
        n = len(self.by_seed)
        error = stdev(self.by_seed) / math.sqrt(n) if n > 1 else math.inf
        if error == 0:
            return 0.0 if any(self.by_seed) else 1.0
        return float(2 * t.sf(abs(fmean(self.by_seed)) / error, max(1, n - 1)))

    def sign(self) -> int:
        """−1 or +1 if the interval excludes 0, else 0."""
        return int(self.interval.low > 0) - int(self.interval.high < 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down procedure."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def mean_curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[Score]:
    """Return, point by point, the mean over seeds and photographs.

    Args:
        curves: For each seed the runs of one curve, in the same order of λ.
    """
    means = []
    for runs in zip(*curves, strict=True):
        scores = [score for run in runs for score in run["scores"].values()]
        means.append(Score(*(fmean(axis) for axis in zip(*scores, strict=True))))
    return means


def psnr_above(point: Score, curve: Sequence[Score]) -> float | None:
    """Return the PSNR of `point` above a curve at the same rate, in dB.

    The curve is interpolated by PCHIP in log-rate. None outside its rates, or if it has fewer than
    three points that increase.
    """
    try:
        anchor = front(curve)
    except CurveError:
        return None
    if not anchor[0].bpp <= point.bpp <= anchor[-1].bpp:
        return None
    rates = [math.log(score.bpp) for score in anchor]
    interpolated = PchipInterpolator(rates, [score.psnr for score in anchor])
    return point.psnr - float(interpolated(math.log(point.bpp)))
