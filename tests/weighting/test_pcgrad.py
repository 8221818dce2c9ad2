"""PCGrad against explicit vectors, and against an independent implementation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from moo_balance import BalancedOptimizer, PCGrad
from moo_balance.functional._directions import directions
from moo_balance.functional._surgery import add_corrections, draw_order, project_conflicts
from moo_balance.weighting import step_generator
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.oracle import coefficients_of, deviation, random_jacobians
from tests.support.statistics import assert_near, normal, statistics_of, vector

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)


def ascending(count: int) -> np.ndarray:
    return np.array([[j for j in range(count) if j != i] for i in range(count)])


def by_vectors(rows: Tensor, order: np.ndarray) -> Tensor:
    """The algorithm as printed, on whole gradients: one corrected gradient per row."""
    corrected = rows.clone()
    for i, others in enumerate(order):
        for j in others:
            product = corrected[i] @ rows[j]
            if product < 0:
                corrected[i] -= product / rows[j].square().sum() * rows[j]
    return corrected


def by_cosines(rows: Tensor, order: np.ndarray) -> Tensor:
    """The coefficients of the package, for an order of one's choice."""
    gradients = directions(gramian_of(rows))
    parts = project_conflicts(gradients.cosines, order)
    return torch.from_numpy(add_corrections(parts, gradients.norms, [1.0] * len(rows)))


def test_golden_values() -> None:
    coefficients = coefficients_of(PCGrad(), gramian_of(TWO))
    assert_near(coefficients @ TWO, (0.584795, 3.801170, 3.801170), 1e-6)
    expected = (-1.073970, 1.857844, 2.771744, 0.836059)
    assert_near(by_cosines(THREE, ascending(3)) @ THREE, expected, 1e-6)


@property_test
@given(jacobians(decades=3.0, degenerate=True), st.integers(0, 1000))
def test_coefficients_are_those_of_the_algorithm_on_vectors(rows: Tensor, seed: int) -> None:
    rows = rows[rows.norm(dim=1) > 0]
    count = len(rows)
    order = draw_order(count, step_generator(seed, 0)) if count > 1 else np.zeros((1, 0), int)
    corrected = by_vectors(rows, order)
    found = coefficients_of(PCGrad(seed=seed), gramian_of(rows)) @ rows
    scale = rows.norm(dim=1).max()
    assert_near(found / scale, corrected.sum(0) / scale, 1e-7)


def test_it_agrees_with_torchjd_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("torchjd.aggregation").PCGradWeighting()
    worst = 0.0
    for rows in random_jacobians(decades=2.0):
        count, gramian = len(rows), gramian_of(rows)
        order = draw_order(count, step_generator(0, 0))
        # The peer draws one permutation of all gradients for each of them, and skips its own.
        drawn = iter([torch.tensor([i, *others]) for i, others in enumerate(order)])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda _, drawn=drawn: next(drawn))
            expected = peer(gramian)
        worst = max(worst, deviation(rows, coefficients_of(PCGrad(), gramian), expected))
    assert worst < 1e-12


def test_orders_are_random_permutations_of_the_others() -> None:
    seen = set()
    for step in range(200):
        order = draw_order(3, step_generator(0, step))
        assert [sorted(row) for row in order.tolist()] == [[1, 2], [0, 2], [0, 1]]
        seen.add(tuple(order.ravel()))
    assert seen == {
        tuple(itertools.chain(*rows))
        for rows in itertools.product(
            *(itertools.permutations([j for j in range(3) if j != i]) for i in range(3))
        )
    }


def test_the_order_depends_on_seed_and_step_only() -> None:
    gramian = gramian_of(normal(6, 4))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = coefficients_of(PCGrad(), gramian)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(coefficients_of(PCGrad(), gramian), first)
    assert not torch.equal(coefficients_of(PCGrad(seed=1), gramian), first)
    later = PCGrad().weights(statistics_of([1.0] * 6, gramian, step=1), {}).coefficients
    assert not torch.equal(later, first)


@property_test
@given(jacobians(degenerate=True))
def test_a_mean_is_the_sum_divided_by_the_number(rows: Tensor) -> None:
    gramian = gramian_of(rows)
    total = coefficients_of(PCGrad(reduction="sum"), gramian)
    assert_near(coefficients_of(PCGrad(reduction="mean"), gramian) * len(rows), total, 1e-12)


@property_test
@given(jacobians(counts=(2, 2), degenerate=True))
def test_two_losses_never_rise(rows: Tensor) -> None:
    slopes = rows @ (coefficients_of(PCGrad(), gramian_of(rows)) @ rows)
    assert bool((slopes >= -1e-12 * rows.square().sum()).all())


def test_one_of_three_losses_may_rise() -> None:
    rows = vector([1, 0, -0.9, 0.1, -0.9, -0.1]).reshape(3, 2)
    slopes = rows @ (coefficients_of(PCGrad(), gramian_of(rows)) @ rows)
    assert slopes.min() < -0.01


@property_test
@given(jacobians())
def test_gradients_that_do_not_conflict_are_only_added(rows: Tensor) -> None:
    assert torch.equal(
        coefficients_of(PCGrad(), gramian_of(rows.abs())), torch.ones(len(rows)).double()
    )


@pytest.mark.parametrize("count", [2, 3])
def test_a_preference_is_the_share_of_a_corrected_gradient(count: int) -> None:
    rows = THREE[:count]
    weights = dict(zip("abc"[:count], (1.0, 2.0, 5.0), strict=False))
    order = draw_order(count, step_generator(0, 0))
    expected = vector(weights.values()) / sum(weights.values()) @ by_vectors(rows, order)
    for reduction, whole in (("mean", 1.0), ("sum", float(count))):
        weighting = PCGrad(reduction=reduction, preference=weights)
        assert_near(coefficients_of(weighting, gramian_of(rows)) @ rows, whole * expected, 1e-14)
    equal = PCGrad(preference=dict.fromkeys("abc"[:count], 3.0))
    assert_near(
        coefficients_of(equal, gramian_of(rows)), coefficients_of(PCGrad(), gramian_of(rows)), 1e-15
    )


@pytest.mark.parametrize("count", [2, 5])
def test_norms_may_lie_sixty_decades_apart(count: int) -> None:
    """The direction is a sum of projections, none of which depends on the norms of others."""
    rows = normal(count, 4, seed=3)
    order = draw_order(count, step_generator(0, 0))
    factors = 10.0 ** torch.linspace(-30, 30, count, dtype=torch.float64)
    corrected = by_vectors(rows, order)
    found = coefficients_of(PCGrad(), gramian_of(rows * factors[:, None]))
    assert bool(found.isfinite().all())
    expected = factors @ corrected
    assert_near(found * factors @ rows / expected.norm(), expected / expected.norm(), 1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_a_zero_gradient_changes_nothing_for_the_others(count: int) -> None:
    rows = torch.cat([TWO[: count - 1], torch.zeros(1, 3).double()])
    found = coefficients_of(PCGrad(), gramian_of(rows))
    assert bool(found.isfinite().all())
    alone = coefficients_of(PCGrad(), gramian_of(rows[:-1]))
    assert_near(found[:-1], alone, 1e-15)


def test_parameters_that_no_loss_reaches_get_no_gradient() -> None:
    """Zeros would let weight decay and Adam's moments move them."""
    reached, apart = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([reached, apart], lr=0.1)
    balanced = BalancedOptimizer(optimizer, PCGrad())
    balanced.backward({"a": reached.sum(), "b": -(2 * reached).square().sum()})
    assert apart.grad is None
    balanced.step()
    assert apart.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 1 / 3)])
def test_a_loss_that_appears_between_two_refreshes_has_its_share(
    reduction: str, share: float
) -> None:
    weight = nn.Parameter(torch.ones(2))
    weighting = PCGrad(reduction=reduction, every=2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    balanced = BalancedOptimizer(optimizer, weighting, loss_names=["a", "b", "c"])
    balanced.step(lambda: {name: weight.square().sum() for name in "ab"})
    balanced.backward({name: weight.square().sum() for name in "abc"})
    assert balanced.metrics.coefficients["c"].item() == pytest.approx(share)
