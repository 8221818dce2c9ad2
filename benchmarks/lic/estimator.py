r"""The difference of two codecs in per cent of the rate, from runs that land close together.

With R and PSNR as means over fixed photographs (of :math:`\ln R` and of dB), and a curve of runs
with constant weights that share start, crops and noise,

.. math:: b = \Delta \ln R - \Delta\mathrm{PSNR} / k

is how much more a run costs than another one at the same quality: 0 for two points of the curve.
:math:`k`, in dB per nat, is the slope of the chord of the curve between their two rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr

from examples.lic.bd import CurveError, t_interval

LEVEL = 0.95
"""Of all intervals."""


class EstimateError(Exception):
    """Runs that no difference can be estimated from; the message says why."""


class Point(NamedTuple):
    """Where a run landed."""

    log_rate: float
    """Mean over the photographs of the natural logarithm of bits per pixel."""
    psnr: float
    """Mean over the photographs, in dB."""


def to_point(images: Mapping[str, Sequence[float]]) -> Point:
    """From bits per pixel and PSNR of each photograph."""
    rates, psnrs = zip(*images.values(), strict=True)
    return Point(fmean(map(math.log, rates)), fmean(psnrs))


class Pair(NamedTuple):
    """Runs of one seed, which share start, crops and noise.

    Attributes:
        test: What is judged.
        anchors: What it is compared with; of several, the mean.
        static: Runs with different constant weights.
    """

    test: Point
    anchors: Sequence[Point]
    static: Sequence[Point]


class Curve(NamedTuple):
    """PSNR over log-rate, but for a constant of each seed: a parabola."""

    center: float
    slope: float
    """At `center`, in dB per nat."""
    bend: float
    """Half of the second derivative, in dB per nat²."""

    def chord(self, first: Point, second: Point) -> float:
        """The slope between two rates, in dB per nat."""
        return self.slope + self.bend * (first.log_rate + second.log_rate - 2 * self.center)


def fit_curve(pairs: Sequence[Pair]) -> Curve:
    """Least squares over the runs with constant weights of all seeds, each with its own constant.

    From two such runs per seed a straight line.

    Raises:
        EstimateError: A seed has fewer than two of these runs.
    """
    if min(len(pair.static) for pair in pairs) < 2:
        raise EstimateError("A curve needs two runs with different constant weights in each seed.")
    center = fmean(point.log_rate for pair in pairs for point in pair.static)
    degree = 1 if len(pairs[0].static) < 3 else 2
    rows, values = [], []
    for pair in pairs:
        x = np.array([point.log_rate - center for point in pair.static])
        powers, psnr = np.stack([x, x**2][:degree], 1), np.array([p.psnr for p in pair.static])
        rows.append(powers - powers.mean(0))
        values.append(psnr - psnr.mean())
    solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0]
    slope, bend = map(float, (*solution, 0.0)[:2])
    return Curve(center, slope, bend)


def excess(pairs: Sequence[Pair]) -> float:
    """The mean over the seeds of b, in per cent; negative if the test needs fewer bits.

    Raises:
        EstimateError: PSNR does not rise with the rate between two points.
    """
    curve = fit_curve(pairs)

    def difference(test: Point, anchor: Point) -> float:
        if (slope := curve.chord(test, anchor)) <= 0:
            raise EstimateError("PSNR should rise with the rate. Here it falls: train longer.")
        return test.log_rate - anchor.log_rate - (test.psnr - anchor.psnr) / slope

    return 100 * fmean(
        fmean(difference(pair.test, anchor) for anchor in pair.anchors) for pair in pairs
    )


def by_seed(pairs: Sequence[Pair]) -> list[float]:
    """A value for each seed, whose mean is the estimate and whose spread its uncertainty.

    They are the jackknife's pseudo-values: what a seed contributes by its own runs and by its part
    in the slope, so that the uncertainty of the slope is in the interval.
    """
    if (count := len(pairs)) == 1:
        return [excess(pairs)]
    whole = excess(pairs)
    without = [excess([*pairs[:index], *pairs[index + 1 :]]) for index in range(count)]
    return [count * whole - (count - 1) * value for value in without]


class Estimate(NamedTuple):
    """A mean over seeds or photographs, with Student's t-interval."""

    mean: float
    half: float
    """Half-width of the interval; infinite for a single value."""
    p: float
    """Two-sided p-value of a mean of 0; 1 for a single value."""
    deviation: float
    """Standard deviation of a single value; NaN for a single value."""
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values."""
    mean, low, high = t_interval(values, level=LEVEL)
    if (count := len(values)) == 1:
        return Estimate(mean, math.inf, 1.0, math.nan, 1)
    deviation = stdev(values)
    error = deviation / math.sqrt(count)
    p = 2 * float(stdtr(count - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Estimate(mean, (high - low) / 2, p, deviation, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, by Holm's step-down procedure."""
    corrected, largest = [1.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


class Question(NamedTuple):
    """A comparison, before its runs are known.

    Attributes:
        name: What is compared with what.
        setting: Where, such as ``"λ 0.0035"``.
        values: Gives a value for each seed or photograph, in per cent of the rate.
        paper: What the paper reports, in the same unit, if it does.
        null: Whether both sides are the same but for their rate, so that 0 is right.
    """

    name: str
    setting: str
    values: Callable[[], Sequence[float]]
    paper: float | None = None
    null: bool = False


def answer(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Each as a JSON object; Holm's correction is over those that are no null pairs."""
    answers = []
    for question in questions:
        about = {key: getattr(question, key) for key in ("name", "setting", "paper", "null")}
        try:
            answers.append({**about, **estimate(question.values())._asdict()})
        except (EstimateError, CurveError) as error:
            answers.append({**about, "error": str(error)})
    planned = [a for a in answers if "p" in a and not a["null"]]
    for row, p in zip(planned, holm([row["p"] for row in planned]), strict=True):
        row["holm"] = p
    return answers
