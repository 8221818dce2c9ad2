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
method that draws static weights at random has :math:`\bar q = 1/2` on average, and worth 1. Below
1 the formula is continued, though there is no such search: the method is worse than one random
trial. The scale ends at 1/16 and at M, or at the first N from which more trials do not help; a
worth beyond it counts as its end. A run that breaks off has rank 1.

At equal time, a method whose step costs c plain ones competes with a search that has c trials in
the same time: :math:`N / c`.
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
"""The smallest worth that is measured."""

REPLICATES = 400
"""Bootstrap samples of the trials."""


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

    def probabilities(self, counts: Floats) -> Floats:
        """How likely a search of each of N sizes is to keep each trial, shape [N, M].

        Trials with equal validation scores are kept equally often.
        """
        _, level, sizes = np.unique(self.validation, return_inverse=True, return_counts=True)
        before = np.cumsum(sizes[::-1])[::-1] / len(self)  # this level or a worse one
        after = np.append(before[1:], 0.0)
        exponents = np.asarray(counts, dtype=np.float64)[:, None]
        return ((before**exponents - after**exponents) / sizes)[:, level]

    def median_scores(self, counts: Floats) -> Floats:
        """The median of the test scores that a search of each size keeps, shape [N]."""
        order = np.argsort(self.test)
        reached = np.cumsum(self.probabilities(counts)[:, order], axis=1)
        # Rounding may leave the last sum below 1, and a sum of halves below a half.
        return self.test[order[(reached < 0.5 - 1e-9).sum(1)]]

    @property
    def kept(self) -> float:
        """The test score of the trial that is best on validation data; of several, their mean."""
        return float(self.test[self.validation == self.validation.min()].mean())

    @cached_property
    def counts(self) -> Floats:
        """Numbers of trials at which the curve is computed."""
        return np.geomspace(SMALLEST, len(self), 97)

    @cached_property
    def curve(self) -> Floats:
        """The expected rank after each number of trials, made to decrease."""
        return np.minimum.accumulate(self.probabilities(self.counts) @ self.ranks(self.test))

    @cached_property
    def end(self) -> float:
        """The largest worth that can be told: the first N at which the curve is at its lowest."""
        return self.trials_for(0.0)

    @cached_property
    def replicates(self) -> list[Search]:
        """Searches of as many trials, drawn with replacement."""
        generator = np.random.default_rng(0)
        drawn = generator.integers(0, len(self), (REPLICATES, len(self)))
        return [Search(self.validation[chosen], self.test[chosen]) for chosen in drawn]

    def trials_for(self, rank: float) -> float:
        """The least number of trials with which the search is expected to reach a rank."""
        # np.interp needs increasing positions; of a plateau the fewest trials count.
        positions, first = np.unique(-self.curve, return_index=True)
        return float(np.exp(np.interp(-rank, positions, np.log(self.counts)[first])))


@dataclass(frozen=True)
class Worth:
    """A number of trials with its 95 % interval; the ends of the scale mean "or beyond"."""

    value: float
    low: float
    high: float


def worth(search: Search, scores: Sequence[float]) -> Worth:
    """The worth of a method from its test scores, one per seed.

    The interval covers both the seeds of the method (a t distribution around the mean rank) and the
    choice of trials (resampled). Where all runs are better than any trial, or worse, it is a point
    at the end of the scale. The choice of the learning rate is not in it.
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    generator = np.random.default_rng(0)
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
