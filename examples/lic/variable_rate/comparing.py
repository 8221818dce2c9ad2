"""How far runs lie apart, paired by seed and photograph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from examples.lic.bd import CurveError, Interval, bootstrap, compare
from examples.lic.evaluation import Score

Run = Mapping[str, Any]
Results = Mapping[str, Any]
"""What ``study.run`` returns."""


def curve(run: Run, image: str, *, between: bool = False) -> list[Score]:
    """Points of one photograph at the trained levels, with `between` at those in between too."""
    return [Score(*p["images"][image]) for p in run["points"] if p["trained"] or between]


def gap(results: Results, test: str, anchor: str, *, between: bool = False) -> Interval | None:
    """BD-rate of `test` over `anchor` in per cent, paired by seed and photograph.

    None where some pair of curves cannot be compared, as after a training of seconds.
    """
    return _bootstrap(
        results,
        lambda runs, image: (
            compare(curve(runs[test], image, between=between), curve(runs[anchor], image)).rate
        ),
    )


def loss_ratio(results: Results, test: str, anchor: str, lmbda: float) -> Interval | None:
    """By how many per cent R + λD of `test` lies above that of `anchor`."""

    def ratio(runs: Mapping[str, Run], image: str) -> float:
        own, other = (rate_distortion_loss(runs[name], image, lmbda) for name in (test, anchor))
        return 100 * (own / other - 1)

    return _bootstrap(results, ratio)


def rate_distortion_loss(run: Run, image: str, lmbda: float) -> float:
    """R + λ · 255² · MSE on one photograph, at the step of λ."""
    (score,) = (Score(*p["images"][image]) for p in run["points"] if p["lambda"] == lmbda)
    return score.bpp + lmbda * 255**2 * 10 ** (-score.psnr / 10)


def _bootstrap(
    results: Results, measure: Callable[[Mapping[str, Run], str], float]
) -> Interval | None:
    try:
        return bootstrap(
            {
                int(seed): {image: measure(runs, image) for image in results["held_out"]}
                for seed, runs in results["runs"].items()
            }
        )
    except CurveError:
        return None
