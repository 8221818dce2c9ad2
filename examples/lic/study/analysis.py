"""From the points of runs to what they show: paired differences, intervals, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy.interpolate import PchipInterpolator

from examples.lic.bd import CurveError, Interval, bootstrap, compare, front
from examples.lic.evaluation import Score

Curve = Sequence[Mapping[str, Any]]
OWN = "own mean weights"
STATIC = "static weights"


@dataclass(frozen=True)
class Finding:
    """One solution against one rival, over all seeds and photographs."""

    experiment: str
    solution: str
    rival: str
    rate: Interval | None
    """BD-rate in per cent, negative where the solution needs fewer bits; None if refused."""
    gap: Interval | None
    """PSNR above the rival at the same rate, in dB; None where nothing could be compared."""
    overlap: float
    """Mean part of the PSNR range that the two curves share."""
    refusals: list[str]
    """Why pairs of curves could not be compared."""

    def sign(self) -> int | None:
        """−1 fewer bits than the rival, +1 more, 0 not distinguishable, None not compared.

        By the BD-rate, and by the gap in PSNR where curves are too short for one.
        """
        if self.rate is not None:
            return self.rate.sign()
        return -self.gap.sign() if self.gap is not None else None


def findings(results: Mapping[str, Any]) -> Iterator[Finding]:
    """All comparisons of a study whose seeds have been run."""
    for name, experiment in results["experiments"].items():
        seeds = experiment["seeds"]
        for solution in experiment["lambdas"]:
            curves = {int(seed): unit[solution] for seed, unit in seeds.items()}
            if curves:
                yield from (finding(name, solution, r, curves) for r in experiment["rivals"])


def finding(
    experiment: str, solution: str, rival: str, curves: Mapping[int, Mapping[str, Curve]]
) -> Finding:
    overlaps: list[float] = []
    refusals: list[str] = []

    def bd_rate(unit: Mapping[str, Curve], image: str) -> float | None:
        try:
            delta = compare(points(unit["balanced"], image), points(unit[rival], image))
        except CurveError as error:
            refusals.append(str(error))
            return None
        overlaps.append(delta.psnr_overlap)
        return delta.rate

    def gap(unit: Mapping[str, Curve], image: str) -> float | None:
        return gap_in_db(unit, rival, image)

    rate = interval(curves, bd_rate)
    overlap = fmean(overlaps) if overlaps else 0.0
    return Finding(experiment, solution, rival, rate, interval(curves, gap), overlap, refusals)


def points(curve: Curve, image: str) -> list[Score]:
    return [Score(*run["scores"][image]) for run in curve]


def mean_points(curve: Curve) -> list[Score]:
    """The same as means over the photographs."""
    return [
        Score(*(fmean(axis) for axis in zip(*run["scores"].values(), strict=True))) for run in curve
    ]


def interval(
    curves: Mapping[int, Mapping[str, Curve]],
    measure: Callable[[Mapping[str, Curve], str], float | None],
) -> Interval | None:
    """Bootstrap `measure` over the seeds that have it for every photograph; None if none has."""
    table = {}
    for seed, unit in curves.items():
        row = {image: measure(unit, image) for image in unit["balanced"][0]["scores"]}
        if None not in row.values():
            table[seed] = row
    return bootstrap(table) if table else None


def gap_in_db(unit: Mapping[str, Curve], rival: str, image: str) -> float | None:
    """Mean over the solution's points of the PSNR above the rival's at the same rate.

    Own mean weights give a point beside each of the solution's, at a slightly different rate; the
    static curve says what that difference is worth, so both are measured from it.
    """
    balanced = points(unit["balanced"], image)
    if rival != OWN:
        gaps = [above(point, points(unit[rival], image)) for point in balanced]
    else:
        curve = points(unit[STATIC], image)
        pairs = zip(balanced, points(unit[OWN], image), strict=True)
        both = [(above(point, curve), above(own, curve)) for point, own in pairs]
        gaps = [None if None in pair else pair[0] - pair[1] for pair in both]
    found = [gap for gap in gaps if gap is not None]
    return fmean(found) if found else None


def above(point: Score, curve: Sequence[Score]) -> float | None:
    """PSNR of `point` above a curve, interpolated in log-rate; None outside of its rates."""
    try:
        anchor = front(curve)
    except CurveError:
        return None
    if not anchor[0].bpp <= point.bpp <= anchor[-1].bpp:
        return None
    rates = [math.log(score.bpp) for score in anchor]
    interpolated = PchipInterpolator(rates, [score.psnr for score in anchor])
    return point.psnr - float(interpolated(math.log(point.bpp)))
