"""The length of a step, from an exact Gramian and from an older one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import FAMO, MGDA, BalancedOptimizer, FixedWeights, MoCo, Rescaled, Sum, SumLog
from moo_balance.functional import rescale
from tests.support.problems import SmallModel, flat_gradient, jacobian, sgd
from tests.support.registry import NAMES
from tests.support.statistics import initial_state, normal, statistics_of, vector

SCALES = [(1.0, 1.0, 1.0), (1.0, 30.0, 1000.0), (1e-9, 1.0, 1e9)]


def lengths(rows: Tensor) -> dict[str, float]:
    return {"sum": float(rows.sum(0).norm()), "mean": float(rows.norm(dim=1).mean())}


@pytest.mark.parametrize("length", ["sum", "mean"])
@pytest.mark.parametrize("scales", SCALES, ids=str)
@given(seed=st.integers(0, 1000))
def test_the_direction_has_the_length_of_a_dense_computation(length, scales, seed) -> None:
    rows = normal(3, 6, seed=seed) * vector(scales)[:, None]
    coefficients = normal(3, seed=seed + 1).abs() / vector(scales)
    result = rescale(coefficients, length, rows @ rows.T)
    assert float((result @ rows).norm()) == pytest.approx(lengths(rows)[length], rel=1e-6)
    assert torch.allclose(result / result.norm(), coefficients / coefficients.norm())


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e30, 1e150])
def test_neither_small_nor_large_gradients_lose_the_length(factor) -> None:
    rows, coefficients = normal(3, 6), normal(3).abs()
    expected = rescale(coefficients, "mean", rows @ rows.T)
    gramian = (rows @ rows.T) * factor * factor
    assert torch.allclose(rescale(coefficients, "mean", gramian), expected)
    result = rescale(coefficients * factor, "mean", rows @ rows.T)
    assert torch.allclose(result, expected)


def test_gradients_that_cancel_are_not_magnified_without_limit() -> None:
    gramian = vector([1.0, -1.0, -1.0, 1.0]).view(2, 2)
    result = rescale(vector([0.5, 0.5]), "mean", gramian)
    assert 1e2 < float(result[0]) < 1e4
    assert torch.allclose(rescale(vector([1.0, 1.0]), "sum", gramian), vector([1.0, 1.0]))


def test_what_has_no_length_stays_as_it_is() -> None:
    for gramian in (torch.zeros(2, 2), torch.full((2, 2), torch.nan)):
        assert rescale(torch.ones(2), "sum", gramian).tolist() == [1.0, 1.0]
    for length in ("one", "count", "sum"):
        assert rescale(torch.zeros(2), length, torch.eye(2)).tolist() == [0.0, 0.0]


def test_a_missing_gramian_is_refused() -> None:
    with pytest.raises(ValueError, match="`gramian` should be given"):
        rescale(torch.ones(2), "sum")


def test_sums_of_absolute_values() -> None:
    values = FixedWeights({"a": 1.0, "b": -3.0})
    for length, total in (("one", 1.0), ("count", 2.0)):
        weighting = Rescaled(values, length)
        answer = weighting.weights(statistics_of([1.0, 1.0]), initial_state(weighting, 2))
        assert torch.allclose(answer.coefficients, vector([total / 4, -3 * total / 4]))
        assert not weighting.needs(0).compares


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("inner", [SumLog(), FAMO(lagged=True), MGDA("l2"), MoCo()], ids=repr)
def test_a_first_step_is_as_long_as_that_of_the_plain_sum(inner, scales) -> None:
    torch.manual_seed(0)
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Rescaled(inner))
    losses = dict(zip(NAMES, map(torch.mul, model.losses().values(), scales), strict=True))
    plain = jacobian(losses, list(model.parameters())).sum(0)
    optimizer.backward(losses)
    assert float(flat_gradient(model).norm()) == pytest.approx(float(plain.norm()), rel=1e-4)


def test_between_two_gramians_the_coefficients_are_of_the_step() -> None:
    weighting = Rescaled(SumLog(floor=0), every=2)
    rows = normal(2, 5)
    gramian = rows @ rows.T
    first = statistics_of([1.0, 2.0], gramian)
    answer = weighting.weights(first, initial_state(weighting, 2))
    second = statistics_of([3.0, 1.0], step=1)
    later = weighting.weights(second, answer.state).coefficients
    expected = SumLog(floor=0).weights(second, {}).coefficients
    assert torch.allclose(later / later.sum(), expected)
    assert float((later @ rows).norm()) == pytest.approx(float(rows.sum(0).norm()), rel=1e-6)


def test_the_plain_sum_keeps_its_length() -> None:
    torch.manual_seed(0)
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Rescaled(Sum(), every=1))
    optimizer.backward(model.losses())
    values = list(optimizer.metrics.coefficients.values())
    assert torch.allclose(torch.stack(values), torch.ones(3, dtype=torch.float64))


def test_a_loss_that_no_measurement_has_met_counts_in_neither_length() -> None:
    """Alternating losses, of which the second is absent in each step that measures."""
    rows = normal(3, 6)
    weighting = Rescaled(SumLog(floor=0), every=2)
    state = initial_state(weighting, 3)
    first = statistics_of([1.0, 2.0], rows[:2] @ rows[:2].T)
    part = {key: value[:2, :2] for key, value in state.items()}
    kept = weighting.weights(first, part).state["gramian"]
    state = {"gramian": torch.full((3, 3), torch.nan, dtype=torch.float64)}
    state["gramian"][:2, :2] = kept
    losses = [1.0, 2.0, 1e-9]
    answer = weighting.weights(statistics_of(losses, step=1), state).coefficients
    length = float((answer[:2] @ rows[:2]).norm())
    assert length == pytest.approx(float(rows[:2].sum(0).norm()), rel=1e-3)
    alone = Rescaled(FixedWeights({"a": 5.0}))
    one = alone.weights(statistics_of([2.0], step=1), initial_state(alone, 1))
    assert one.coefficients.tolist() == [1.0]


@pytest.mark.parametrize("length", ["sum", "mean", "one", "count"])
def test_losses_that_are_marked_as_satisfied_count_as_absent_ones(length) -> None:
    rows = normal(3, 6)
    rows[1] = 0.0
    gramian = rows @ rows.T
    weighting = Rescaled(SumLog(floor=0), length)
    state = initial_state(weighting, 3)
    mask = torch.tensor([False, True, False])
    marked = statistics_of([1.0, 1.0, 4.0], gramian)._replace(satisfied=mask)
    masked = weighting.weights(marked, state).coefficients
    others = [0, 2]
    part = {key: value[others][:, others] for key, value in state.items()}
    absent = statistics_of([1.0, 4.0], gramian[others][:, others])
    expected = weighting.weights(absent, part).coefficients
    assert masked[1] == 0.0
    assert torch.allclose(masked[others], expected, rtol=1e-6)
