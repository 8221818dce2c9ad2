"""MoDo: its update, its limit, and agreement with an independent implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import MGDA, MoDo
from moo_balance.functional import project_simplex
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

TWO = vector([18, -22, -22, 38]).view(2, 2)


def run(weighting: MoDo, gramians: list[Tensor]) -> list[State]:
    """The states that follow each step, with losses that are all 1."""
    return [output.state for output in run_steps(weighting, gramians=gramians)]


def test_a_step_by_hand() -> None:
    # M λ = (-2, 8), so λ moves to (.52, .42), which the projection lifts to a sum of 1.
    (state,) = run(MoDo(lr=0.01), [TWO])
    assert_near(state["weights"], (0.55, 0.45), 1e-15)
    (state,) = run(MoDo(), [TWO])
    assert_near(state["weights"], (1.0, 0.0), 1e-15)


def test_the_direction_has_the_weights_from_before_the_step() -> None:
    weighting = MoDo()
    statistics = statistics_of([1.0, 1.0], TWO)
    first = weighting.weights(statistics, initial_state(weighting, 2))
    assert_near(first.coefficients, (0.5, 0.5), 0.0)
    second = weighting.weights(statistics, first.state)
    assert_near(second.coefficients, first.state["weights"], 0.0)
    assert_near(second.weights, second.coefficients, 0.0)


@given(seed=st.integers(0, 10_000), rho=st.floats(0.0, 2.0))
def test_without_a_preference_the_pull_is_the_published_one(seed: int, rho: float) -> None:
    matrix = normal(3, 3, seed=seed)
    (state,) = run(MoDo(lr=0.2, rho=rho), [matrix + matrix.T])
    before = vector([1 / 3] * 3)
    expected = project_simplex(before - 0.2 * ((matrix + matrix.T) @ before + rho * before))
    assert_near(state["weights"], expected, 1e-12)


@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_small_steps_without_noise_end_at_the_weights_of_mgda(seed: int, count: int) -> None:
    rows = normal(count, 4 * count, seed=seed)
    gramian = gramian_of(rows)
    gamma = 1.0 / float(torch.linalg.matrix_norm(gramian, 2))
    state = run(MoDo(lr=gamma, rho=0.0), [gramian] * 400)[-1]
    expected = coefficients_of(MGDA(), gramian)
    assert_near(state["weights"], expected, 1e-6)


@given(seed=st.integers(0, 10_000))
def test_the_limit_is_regularised_towards_the_preference(seed: int) -> None:
    gramian, names = gramian_of(normal(3, 9, seed=seed)), ("a", "b", "c")
    preference = dict(zip(names, (1.0, 2.0, 5.0), strict=True))
    gamma = 0.5 / float(torch.linalg.matrix_norm(gramian, 2))
    weighting = MoDo(lr=gamma, rho=2.0, preference=preference)
    assert_near(initial_state(weighting, 3)["weights"], (1 / 8, 2 / 8, 5 / 8), 1e-15)
    weights = run(weighting, [gramian] * 600)[-1]["weights"]
    slope = gramian @ weights + 2.0 * (weights - vector([1 / 8, 2 / 8, 5 / 8]))
    along = weights @ slope
    assert float((along - slope).max()) < 1e-5  # no weight would rather grow
    assert float((weights * (slope - along)).abs().max()) < 1e-5


def test_it_agrees_with_torchjd() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    worst = 0.0
    for rows in random_jacobians():
        oracle, weighting = aggregation.MoDoWeighting(gamma=0.01), MoDo(lr=0.01)
        gramians = [gramian_of(rows), gramian_of(rows.flip(1) + rows), gramian_of(rows.roll(1, 1))]
        for gramian, state in zip(gramians, run(weighting, gramians), strict=True):
            worst = max(worst, float((oracle(gramian) - state["weights"]).abs().max()))
    assert worst < 1e-14


def test_noise_does_not_draw_weight_to_or_from_a_loss() -> None:
    """Two equal expected gradients, the second with noise, in products of two batches or one."""
    mean = vector([1.0, 0.0, 0.0])
    drawn = []
    for independent in (True, False):
        generator, weighting = torch.Generator().manual_seed(0), MoDo(lr=0.005, rho=0.5)
        state, total = initial_state(weighting, 2), vector([0.0, 0.0])
        for step in range(1500):
            noise = torch.randn(2, 3, generator=generator, dtype=torch.float64)
            one, other = (torch.stack([mean, mean + draw]) for draw in noise)
            product = one @ (other if independent else one).T
            statistics = statistics_of([1.0, 1.0], (product + product.T) / 2, step)
            weights, _, state = weighting.weights(statistics, state)
            total += weights / 1500
        drawn.append(float(total[1]))
    assert drawn[0] == pytest.approx(0.5, abs=0.1)
    assert drawn[1] < 0.2


def test_an_absent_loss_keeps_its_share() -> None:
    weighting = MoDo(lr=0.01, preference={"a": 1.0, "b": 1.0, "c": 2.0})
    state = initial_state(weighting, 3)
    part = {"weights": state["weights"][:2]}
    answer = weighting.weights(statistics_of([1.0, 1.0], TWO), part)
    assert_near(answer.coefficients, (0.5, 0.5), 1e-15)
    assert_near(answer.state["weights"], (0.55 / 2, 0.45 / 2), 1e-15)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_products_of_any_size(scale: float) -> None:
    states = run(MoDo(), [TWO * scale] * 3)
    expected = (0.5, 0.5) if scale < 1 else (1.0, 0.0)
    assert_near(states[0]["weights"], expected, 1e-15)
    assert all(bool(state["weights"].isfinite().all()) for state in states)
    (alone,) = run(MoDo(), [vector([-scale]).view(1, 1)])
    assert alone["weights"].tolist() == [1.0]
