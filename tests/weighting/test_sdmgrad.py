"""SDMGrad: its inner iterations, its limits, and agreement with an independent implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import MGDA, SDMGrad
from moo_balance.functional import min_norm_weights
from moo_balance.weighting import State
from tests.support.gradients import gramian_of
from tests.support.oracle import coefficients_of, random_jacobians
from tests.support.statistics import (
    assert_near,
    initial_state,
    normal,
    run_steps,
    statistics_of,
    vector,
)

TWO = vector([1.0, 0.0, 0.0, 3.0]).view(2, 2)


def run(weighting: SDMGrad, gramians: list[Tensor]) -> list[State]:
    return [output.state for output in run_steps(weighting, gramians=gramians)]


def test_one_inner_iteration_by_hand() -> None:
    # s = (1 + √3)/2; M (w + c p)/s² = .65 (1, 3)/s², and s² = 1.866.
    (state,) = run(SDMGrad(lr=0.1, iterations=1), [TWO])
    step = 0.1 * 0.65 / ((1 + 3**0.5) / 2) ** 2
    assert_near(state["weights"], (0.5 + step, 0.5 - step), 1e-15)


def test_momentum_adds_up_within_a_step_and_not_beyond() -> None:
    two = run(SDMGrad(lr=0.01, momentum=0.5, iterations=2, pull=0.0), [TWO] * 2)
    weights, scale = vector([0.5, 0.5]), ((1 + 3**0.5) / 2) ** 2
    for state in two:
        velocity = torch.zeros(2, dtype=torch.float64)
        for _ in range(2):
            velocity = 0.5 * velocity + TWO @ weights / scale
            weights = weights - 0.01 * velocity
            weights = weights - (weights.sum() - 1) / 2
        assert_near(state["weights"], weights, 1e-15)


def test_the_direction_has_the_weights_from_before_the_step_and_the_pull() -> None:
    weighting = SDMGrad(lr=0.1, preference={"a": 3.0, "b": 1.0})
    statistics = statistics_of([1.0, 1.0], TWO)
    first = weighting.weights(statistics, initial_state(weighting, 2))
    assert_near(first.coefficients, (0.75, 0.25), 1e-15)
    second = weighting.weights(statistics, first.state)
    expected = (first.state["weights"] + 0.3 * vector([0.75, 0.25])) / 1.3
    assert_near(second.coefficients, expected, 1e-15)


@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_without_a_pull_small_steps_end_at_the_weights_of_mgda(seed: int, count: int) -> None:
    gramian = gramian_of(normal(count, 4 * count, seed=seed))
    state = run(SDMGrad(pull=0.0, lr=0.2), [gramian] * 40)[-1]
    assert_near(state["weights"], coefficients_of(MGDA(), gramian), 1e-6)


@given(seed=st.integers(0, 10_000), pull=st.floats(0.0, 3.0))
def test_the_limit_minimises_the_pulled_norm(seed: int, pull: float) -> None:
    gramian, preference = gramian_of(normal(3, 9, seed=seed)), {"a": 1.0, "b": 2.0, "c": 5.0}
    weights = run(SDMGrad(pull, lr=0.2, preference=preference), [gramian] * 60)[-1]["weights"]
    slope = gramian @ (weights + pull * vector([1 / 8, 2 / 8, 5 / 8]))
    along = weights @ slope
    assert float((along - slope).max()) < 1e-6 * float(gramian.trace())
    assert float((weights * (slope - along)).abs().max()) < 1e-6 * float(gramian.trace())


def test_a_large_pull_leaves_the_preference() -> None:
    weighting = SDMGrad(pull=1e9, preference={"a": 1.0, "b": 3.0})
    state = run(weighting, [TWO])[-1]
    answer = weighting.weights(statistics_of([1.0, 1.0], TWO), state)
    assert_near(answer.coefficients, (0.25, 0.75), 1e-8)


def test_it_agrees_with_torchjd() -> None:
    """Up to its constant of 1e-8 next to the squared length."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    worst = 0.0
    for rows in random_jacobians():
        oracle, weighting = aggregation.SDMGradWeighting(lr=0.1), SDMGrad(lr=0.1)
        gramians = [gramian_of(rows), gramian_of(rows.flip(1) + rows), gramian_of(rows.roll(1, 1))]
        uniform = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        for gramian, state in zip(gramians, run(weighting, gramians), strict=True):
            coefficients = (state["weights"] + 0.3 * uniform) / 1.3
            worst = max(worst, float((oracle(gramian) - coefficients).abs().max()))
    assert worst < 1e-8


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1e30, 1e60])
def test_a_common_factor_does_not_matter(scale: float) -> None:
    (plain,), (scaled,) = run(SDMGrad(lr=0.1), [TWO]), run(SDMGrad(lr=0.1), [TWO * scale])
    assert_near(scaled["weights"], plain["weights"], 1e-12)


def test_estimates_without_a_positive_length_move_nothing() -> None:
    for matrix in (torch.zeros(2, 2).double(), vector([-1.0, 0.5, 0.5, -2.0]).view(2, 2)):
        (state,) = run(SDMGrad(), [matrix])
        assert state["weights"].tolist() == [0.5, 0.5]


def test_the_weights_are_those_of_the_min_norm_solver_for_two() -> None:
    state = run(SDMGrad(pull=0.0, lr=0.5), [TWO] * 3)[-1]
    assert_near(state["weights"], min_norm_weights(TWO), 1e-8)
