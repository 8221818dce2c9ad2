r"""The worth of a method: how many trials of a random search for static weights it saves.

Scores of a problem are compared on the scale of ranks, on which no unit and no outlier decides: the
rank :math:`q \in [0, 1]` of a score is the fraction of the M static trials with a better test
score, ties counted half. A search of N trials takes N of them at random and keeps the one that is
best on validation data. If :math:`q_{(r)}` are the ranks of the trials in the order of their
validation scores, best first, the rank that the search reaches on test data is expected to be

.. math::
    Q(N) = \sum_{r=1}^{M} \big[(1 - \tfrac{r-1}{M})^N - (1 - \tfrac{r}{M})^N\big]\, q_{(r)}, \qquad
    Q(1) = \tfrac 12

The worth of a method with mean rank :math:`\bar q` is the N at which :math:`Q(N) = \bar q`. A
method that draws static weights at random has :math:`\bar q = 1/2` on average, and worth 1; N below
1 means worse than a single random trial. At equal time, a method whose step costs c plain steps is
set against a search that has c trials in its place: :math:`N/c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

SMALLEST = 1 / 16
"""A worth below this one is not told from it."""

REPLICATES = 400


@dataclass(frozen=True, eq=False)
class Search:
    """The trials of a search for static weights.

    Args:
        validation: Score of each trial on validation data, shape [M]; infinite if it broke off.
        test: Its score on test data, shape [M].
    """

    validation: Floats
    test: Floats

    def __len__(self) -> int:
        return len(self.test)

    def ranks(self, scores: Sequence[float] | Floats) -> Floats:
        """The fraction of trials with a better test score, ties counted half."""
        ordered = np.sort(self.test)
        better = np.searchsorted(ordered, scores, side="left")
        not_worse = np.searchsorted(ordered, scores, side="right")
        return (better + not_worse) / (2 * len(ordered))

    def expected(self, values: Floats, count: Floats | float) -> Floats:
        """What a search of `count` trials is expected to find, of one value per trial [M].

        Trials with equal validation scores share the mean of their values.
        """
        _, inverse, sizes = np.unique(self.validation, return_inverse=True, return_counts=True)
        means = np.bincount(inverse, weights=values) / sizes
        after = 1.0 - np.cumsum(sizes) / len(values)
        before = after + sizes / len(values)
        exponents = np.atleast_1d(np.asarray(count, dtype=np.float64))[:, None]
        return (before**exponents - np.maximum(after, 0.0) ** exponents) @ means

    def best(self) -> float:
        """The test score of the trial that is best on validation data."""
        return float(self.test[np.argmin(self.validation)])

    @cached_property
    def counts(self) -> Floats:
        """Numbers of trials at which the curve is computed."""
        return np.geomspace(SMALLEST, len(self), 97)

    @cached_property
    def curve(self) -> Floats:
        """The expected rank after each number of trials, made to decrease."""
        expected = self.expected(self.ranks(self.test), self.counts)
        return np.minimum.accumulate(expected)

    @cached_property
    def replicates(self) -> list[Search]:
        """Searches of as many trials, drawn with replacement."""
        generator = np.random.default_rng(0)
        drawn = generator.integers(0, len(self), (REPLICATES, len(self)))
        return [Search(self.validation[chosen], self.test[chosen]) for chosen in drawn]

    def trials_for(self, rank: float) -> float:
        """The number of trials with which the search is expected to reach a rank."""
        # np.interp needs increasing positions.
        return float(np.exp(np.interp(-rank, -self.curve, np.log(self.counts))))


@dataclass(frozen=True)
class Worth:
    """A number of trials with its 95 % interval; the ends of the scale mean "or beyond"."""

    value: float
    low: float
    high: float

    def divided_by(self, cost: float) -> Worth:
        """The same at equal time, for a step that costs so many plain ones."""
        return Worth(self.value / cost, self.low / cost, self.high / cost)


def worth(search: Search, scores: Sequence[float], seed: int = 0) -> Worth:
    """The worth of a method from its test scores, one per seed.

    The interval covers both the seeds of the method (a t distribution around the mean rank) and the
    choice of trials (resampled).
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    generator = np.random.default_rng(seed)
    quantiles = stats.t.rvs(max(count - 1, 1), size=REPLICATES, random_state=generator)
    drawn = []
    for replicate, quantile in zip(search.replicates, quantiles, strict=True):
        ranks = replicate.ranks(values)
        spread = ranks.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
        rank = float(ranks.mean() + spread * quantile)
        drawn.append(replicate.trials_for(min(max(rank, 0.0), 1.0)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    middle = search.trials_for(float(search.ranks(values).mean()))
    return Worth(middle, float(low), float(high))
