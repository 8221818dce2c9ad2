"""From the points of runs to differences with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.lic.solutions import BALANCED, OWN, STATIC
from benchmarks.lic.statistics import Difference, mean_curve, psnr_above
from examples.lic.bd import CurveError, Delta, compare

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
"""The runs of one solution and its baselines for one seed, by name."""

MIN_SEEDS = 3
"""Fewest seeds for which the page speaks of better or worse."""


@dataclass(frozen=True)
class Finding:
    """One solution against one baseline, over all seeds."""

    experiment: str
    solution: str
    baseline: str
    gap: Difference | None
    """PSNR above the baseline at the same rate, in dB; None if no rates are shared."""
    rate: Difference | None
    """BD-rate in per cent, negative if the solution needs fewer bits; None if a seed has none."""
    overlap: float
    """Mean over seeds of the part of the PSNR range that both curves share."""
    refusal: str
    """Why there is no BD-rate, or nothing."""

    @property
    def verdict(self) -> int | None:
        """−1 better, +1 worse, 0 not distinguishable; None with fewer than three seeds.

        It rests on the PSNR at equal rate, which every experiment has, and on nothing else: a
        second criterion would let the noisier of the two decide.
        """
        if self.gap is None or len(self.gap.by_seed) < MIN_SEEDS:
            return None
        return -self.gap.sign()


def compare_all(experiments: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """All comparisons of the experiments that compare solutions."""
    for title, data in experiments.items():
        if data["kind"] == "solutions":
            for solution in data["lambdas"]:
                seeds = [curves[solution] for curves in data["seeds"].values()]
                for baseline in data["baselines"]:
                    yield compare_seeds(title, solution, baseline, seeds)


def compare_seeds(
    experiment: str, solution: str, baseline: str, seeds: Sequence[Curves]
) -> Finding:
    """Compare one solution with one baseline: seed by seed, then over seeds."""
    gaps = [gap for curves in seeds if (gap := gap_in_db(curves, baseline)) is not None]
    try:
        deltas = [bd_delta(curves, baseline) for curves in seeds]
    except CurveError as error:
        rate, overlap, refusal = None, 0.0, str(error)
    else:
        rate, overlap = (
            Difference(tuple(d.rate for d in deltas)),
            fmean(d.psnr_overlap for d in deltas),
        )
        refusal = ""
    gap = Difference(tuple(gaps)) if gaps else None
    return Finding(experiment, solution, baseline, gap, rate, overlap, refusal)


def bd_delta(curves: Curves, baseline: str) -> Delta:
    """BD-rate of one seed, of curves that are means over the photographs."""
    return compare(mean_curve([curves[BALANCED]]), mean_curve([curves[baseline]]))


def gap_in_db(curves: Curves, baseline: str) -> float | None:
    """Mean over the solution's points of the PSNR above the baseline's at the same rate.

    Own mean weights give one point for each of the solution's, at a slightly different rate. The
    curve of static weights tells what that difference is worth, so both are measured from it.
    """
    balanced = mean_curve([curves[BALANCED]])
    if baseline != OWN:
        curve = mean_curve([curves[baseline]])
        gaps = [psnr_above(point, curve) for point in balanced]
    else:
        curve = mean_curve([curves[STATIC]])
        pairs = zip(balanced, mean_curve([curves[OWN]]), strict=True)
        gaps = [_difference(psnr_above(p, curve), psnr_above(own, curve)) for p, own in pairs]
    known = [gap for gap in gaps if gap is not None]
    return fmean(known) if known else None


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
