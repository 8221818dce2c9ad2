"""From the points of runs to what they show: paired differences, intervals, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from examples.lic.bd import CurveError, Delta, Interval, compare, front
from examples.lic.evaluation import Score

Curve = Sequence[Mapping[str, Any]]
Unit = Mapping[str, Curve]
"""The curves of one solution and its rivals for one seed, by name."""
Images = tuple[str, ...]

OWN = "own mean weights"
STATIC = "static weights"
SEEDS = 3
"""Fewest seeds that have to agree before a difference counts."""
SAMPLES = 2000
LEVEL = 0.95


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
    """Why curves of seeds and photographs could not be compared, if they could not."""

    def sign(self) -> int | None:
        """−1 fewer bits than the rival, +1 more, 0 not distinguishable, None too little to say.

        The interval has to leave out 0, that of the BD-rate, or of the gap in PSNR where curves
        are too short for one; and each of at least three seeds has to agree by its gap.
        """
        if self.gap is None or len(self.gap.by_seed) < SEEDS:
            return None
        agreed = -self.gap.sign()
        if self.rate is None:
            return agreed
        return agreed if agreed * self.rate.low > 0 and agreed * self.rate.high > 0 else 0


def findings(results: Mapping[str, Any]) -> Iterator[Finding]:
    """All comparisons of a study whose seeds have been run."""
    for name, experiment in results["experiments"].items():
        seeds = experiment["seeds"]
        for solution in experiment["lambdas"]:
            units = {int(seed): unit[solution] for seed, unit in seeds.items()}
            if units:
                yield from (finding(name, solution, r, units) for r in experiment["rivals"])


def finding(experiment: str, solution: str, rival: str, units: Mapping[int, Unit]) -> Finding:
    refusals: list[str] = []
    images = tuple(next(iter(units.values()))["balanced"][0]["scores"])

    def bd(seeds: Sequence[int], images: Images) -> Delta | None:
        chosen = [units[seed] for seed in seeds]
        test, anchor = (
            mean_curve([u[name] for u in chosen], images) for name in ("balanced", rival)
        )
        try:
            return compare(test, anchor)
        except CurveError as error:
            refusals.append(str(error))
            return None

    def bd_rate(seeds: Sequence[int], images: Images) -> float | None:
        found = bd(seeds, images)
        return found and found.rate

    @cache
    def gap_of(seed: int, images: Images) -> float | None:
        return gap_in_db(units[seed], rival, images)

    def gap(seeds: Sequence[int], images: Images) -> float | None:
        gaps = [gap_of(seed, images) for seed in seeds]
        return None if None in gaps else fmean(gaps)

    measured = [seed for seed in units if gap([seed], images) is not None]
    overlap = bd(list(units), images)
    return Finding(
        experiment,
        solution,
        rival,
        interval(list(units), images, bd_rate),
        interval(measured, images, gap),
        overlap.psnr_overlap if overlap else 0.0,
        refusals[:1],
    )


def mean_curve(curves: Sequence[Curve], images: Images | None = None) -> list[Score]:
    """Point by point the mean over seeds and photographs; what is named twice counts twice."""
    return [
        _mean_score(runs, images or tuple(runs[0]["scores"])) for runs in zip(*curves, strict=True)
    ]


def _mean_score(runs: Sequence[Mapping[str, Any]], images: Images) -> Score:
    scores = [run["scores"][image] for run in runs for image in images]
    return Score(*(fmean(axis) for axis in zip(*scores, strict=True)))


def interval(
    seeds: Sequence[int],
    images: Images,
    measure: Callable[[Sequence[int], Images], float | None],
) -> Interval | None:
    """A measure of all seeds and photographs, with percentiles of a bootstrap over both.

    A sample draws seeds, then photographs, the same for all its seeds. None when there is no
    measure for all of them together, or for more than a tenth of the samples.
    """
    measured = cache(measure)
    if not seeds or (whole := measured(tuple(seeds), images)) is None:
        return None
    random, samples = np.random.default_rng(0), []
    for _ in range(SAMPLES):
        drawn_seeds, drawn_images = (
            tuple(sorted(items[i] for i in random.integers(len(items), size=len(items))))
            for items in (seeds, images)
        )
        samples.append(measured(drawn_seeds, drawn_images))
    known = [sample for sample in samples if sample is not None]
    if len(known) < 0.9 * SAMPLES:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    alone = [measured((seed,), images) for seed in seeds]
    return Interval(whole, float(low), float(high), [one for one in alone if one is not None])


def gap_in_db(unit: Unit, rival: str, images: Images) -> float | None:
    """Mean over the solution's points of the PSNR above the rival's at the same rate.

    Own mean weights give a point beside each of the solution's, at a slightly different rate; the
    static curve says what that difference is worth, so both are measured from it.
    """
    balanced = mean_curve([unit["balanced"]], images)
    if rival != OWN:
        curve = mean_curve([unit[rival]], images)
        gaps = [above(point, curve) for point in balanced]
    else:
        curve = mean_curve([unit[STATIC]], images)
        pairs = zip(balanced, mean_curve([unit[OWN]], images), strict=True)
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
