"""Bjøntegaard deltas of rate-distortion curves, with the doubt that belongs to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import bjontegaard
import numpy as np

from examples.lic.evaluation import Score

POINTS = 3
"""Fewest points a curve needs: with two, every interpolation is a straight line."""

OVERLAP = 0.25
"""Least part of the shorter curve's PSNR range that the other one has to cover."""

Interpolation = Literal["pchip", "akima"]


class CurveError(Exception):
    """Curves that cannot be compared; the message says why, and what would help."""


@dataclass(frozen=True)
class Delta:
    """How far one curve lies from another."""

    rate: float
    """BD-rate in per cent: bits more (positive) or fewer (negative) for the same PSNR."""
    psnr: float
    """BD-PSNR in dB: gained (positive) or lost at the same rate."""
    psnr_overlap: float
    """Part of the PSNR range of both curves together that they share, where `rate` is a mean."""
    rate_overlap: float
    """The same of the log-rate range, for `psnr`."""


def compare(
    test: Sequence[Score],
    anchor: Sequence[Score],
    *,
    method: Interpolation = "pchip",
    least_overlap: float = OVERLAP,
) -> Delta:
    """Return the mean distance of curve `test` from curve `anchor`, each first made a front.

    Args:
        test: Points of a curve, in any order.
        anchor: Points of the curve that it is held against.
        method: How the log-rate is interpolated between points.
        least_overlap: Refuse to speak about curves that share less of the shorter one's PSNR
            range. A long anchor is no fault; two curves that meet at their ends alone are one.

    Raises:
        CurveError: When a curve has fewer than three points that increase, or the two hardly
            overlap.
    """
    test, anchor = front(test, "test"), front(anchor, "anchor")
    psnr_overlap, covered = _overlap([s.psnr for s in test], [s.psnr for s in anchor], "PSNR", "dB")
    rate_overlap, _ = _overlap([s.bpp for s in test], [s.bpp for s in anchor], "rate", "bpp")
    if covered < least_overlap:
        raise CurveError(
            f"The curves should share at least {least_overlap:.0%} of the shorter one's PSNR "
            f"range. Found {covered:.0%}. Choose λ so that they cover the same rates."
        )
    points = [list(axis) for curve in (anchor, test) for axis in zip(*curve, strict=True)]
    # The package warns below an overlap of its own choice; here the overlap is part of the answer.
    options = {"method": method, "require_matching_points": False, "min_overlap": 0}
    return Delta(
        float(bjontegaard.bd_rate(*points, **options)),
        float(bjontegaard.bd_psnr(*points, **options)),
        psnr_overlap,
        rate_overlap,
    )


def front(points: Sequence[Score], name: str = "curve") -> list[Score]:
    """Return the points that no other point beats in both rate and PSNR, by rate.

    Interpolation needs curves that increase. In short trainings a point can fall below its
    neighbours; nobody would use that model, since another costs fewer bits and looks better. So
    beaten points are left out, of both curves alike.

    Raises:
        CurveError: When a value is not finite or not positive, or fewer than three points remain.
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


def _overlap(
    test: Sequence[float], anchor: Sequence[float], axis: str, unit: str
) -> tuple[float, float]:
    """What both share, as part of their joint range and of the shorter one's; rates as log."""
    scale = math.log if axis == "rate" else float
    ranges = [(scale(curve[0]), scale(curve[-1])) for curve in (test, anchor)]
    (low, left), (right, high) = (sorted(ends) for ends in zip(*ranges, strict=True))
    if left >= right:
        raise CurveError(
            f"The curves should overlap in {axis}. Found {test[0]:.3g} to {test[-1]:.3g} {unit} "
            f"against {anchor[0]:.3g} to {anchor[-1]:.3g} {unit}. Choose λ so that they cover "
            "the same rates."
        )
    shorter = min(end - start for start, end in ranges)
    return (right - left) / (high - low), (right - left) / shorter


@dataclass(frozen=True)
class Interval:
    """A mean, and where it would lie for other seeds and other images."""

    mean: float
    low: float
    high: float
    by_seed: list[float]
    """The mean over the images, for each seed."""

    def sign(self) -> int:
        """−1 or +1 when the interval leaves out 0 and no seed disagrees, else 0."""
        values = (self.mean, self.low, self.high, *self.by_seed)
        return -1 if all(v < 0 for v in values) else int(all(v > 0 for v in values))


def bootstrap(
    values: Mapping[int, Mapping[str, float]],
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean over seeds and images with its percentile interval.

    Each sample draws as many seeds as there are, with replacement, and then as many images. The
    images drawn are those of all drawn seeds: every seed was scored on the same photographs, and
    drawing for each seed anew would average away how much photographs differ. Pair first: a value
    is to be the difference of two methods that share seed and image.

    Args:
        values: For each seed, the value of each image; all seeds have the same images.
        samples: How many samples are drawn.
        level: The part of them inside the interval.
        seed: Of the draws.

    Raises:
        CurveError: When there is nothing, or seeds differ in their images.
    """
    images = sorted(next(iter(values.values()), {}))
    if not images or any(sorted(row) != images for row in values.values()):
        raise CurveError(
            "A bootstrap needs at least one seed, and a value for each image and seed. Found "
            f"{ {seed: sorted(row) for seed, row in values.items()} }. Compare what all have."
        )
    table = np.array([[row[image] for image in images] for row in values.values()])
    random = np.random.default_rng(seed)
    rows, columns = (random.integers(n, size=(samples, n)) for n in table.shape)
    means = table[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        float(table.mean()), float(low), float(high), [float(m) for m in table.mean(axis=1)]
    )
