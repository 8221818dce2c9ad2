"""Random weights: the right distribution, the same draw every time."""

from __future__ import annotations

import torch

from moo_balance import RandomWeights
from moo_balance.weighting._random import step_generator
from tests.support.statistics import statistics_of


def weights(seed: int, step: int, count: int = 3) -> torch.Tensor:
    return RandomWeights(seed).weights(statistics_of([1.0] * count, step=step), {}).weights


def test_draws_depend_on_seed_and_step_only() -> None:
    before = torch.get_rng_state()
    first = weights(0, 7)
    torch.manual_seed(123)
    again = weights(0, 7)
    assert torch.equal(first, again)
    assert not torch.equal(first, weights(0, 8))
    assert not torch.equal(first, weights(1, 7))
    torch.set_rng_state(before)
    weights(0, 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_lie_on_the_simplex_and_are_the_coefficients() -> None:
    answer = RandomWeights().weights(statistics_of([1.0, 5.0, -3.0]), {})
    assert torch.equal(answer.weights, answer.coefficients)
    assert (answer.weights > 0).all()
    assert abs(float(answer.weights.sum()) - 1.0) < 1e-15


def test_logits_are_standard_normal_and_uncorrelated_from_step_to_step() -> None:
    drawn = torch.stack([weights(5, step).log() for step in range(4000)])
    # Logits up to a common shift: differences of two standard normal numbers.
    difference = (drawn[:, 0] - drawn[:, 1]) / 2**0.5
    assert abs(float(difference.mean())) < 5 / 4000**0.5
    assert abs(float(difference.var()) - 1.0) < 5 * (2 / 4000) ** 0.5
    assert abs(float((difference[1:] * difference[:-1]).mean())) < 5 / 4000**0.5


def test_the_stream_of_a_step_is_fixed() -> None:
    """Resumed runs, and other methods that draw from it, rely on these numbers."""
    golden = torch.rand(2, generator=step_generator(3, 5), dtype=torch.float64)
    mixed = (3 + 5 * 0x9E3779B97F4A7C15) % 2**63
    again = torch.rand(2, generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)
    assert torch.equal(golden, again)
