"""Comparison of a method with an independent implementation, on random Gramians."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moo_balance.weighting import Weighting
from tests.support.gradients import gramian_of
from tests.support.statistics import initial_state, normal, statistics_of

SEEDS = 200
COUNTS = (2, 3, 4, 5, 6, 7, 8)


def random_jacobians(seeds: int = SEEDS, decades: float = 0.0) -> Iterator[Tensor]:
    """Gradients as rows, in float64: from 2 to 8 of them, twice as many parameters.

    With `decades`, the norms are spread over ``10 ** [-decades, decades]``.
    """
    for seed in range(seeds):
        count = COUNTS[seed % len(COUNTS)]
        rows = normal(count, 2 * count, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        exponents = 2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1
        yield rows * 10 ** (decades * exponents)


def coefficients_of(weighting: Weighting, gramian: Tensor) -> Tensor:
    """Coefficients of a first step, with losses that are all 1."""
    count = len(gramian)
    statistics = statistics_of([1.0] * count, gramian)
    return weighting.weights(statistics, initial_state(weighting, count)).coefficients


def deviation(rows: Tensor, coefficients: Tensor, expected: Tensor) -> float:
    """Distance of two combinations of the rows, relative to the length of the second."""
    length = (expected @ rows).norm()
    return float(((coefficients - expected) @ rows).norm() / length)


def largest_deviation(
    weighting: Weighting,
    oracle: Callable[[Tensor], Tensor],
    seeds: int = SEEDS,
    decades: float = 0.0,
) -> float:
    """Largest :func:`deviation` of a method's first step from the oracle's answer."""
    return max(
        deviation(rows, coefficients_of(weighting, gramian_of(rows)), oracle(gramian_of(rows)))
        for rows in random_jacobians(seeds, decades)
    )
