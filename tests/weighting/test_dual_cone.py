"""UPGrad and DualProj: published figures, another implementation, and no conflict at any scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import BalancedOptimizer, DualProj, UPGrad
from tests.support.gradients import gramian_of, jacobians, property_test, relative_products
from tests.support.oracle import coefficients_of, deviation, largest_deviation, random_jacobians
from tests.support.statistics import (
    assert_near,
    initial_state,
    names,
    normal,
    statistics_of,
    vector,
)

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)
over_both = pytest.mark.parametrize("method", [UPGrad, DualProj])


def direction(weighting: UPGrad | DualProj, rows: Tensor) -> Tensor:
    return coefficients_of(weighting, gramian_of(rows)) @ rows


def project(rows: Tensor, target: Tensor) -> Tensor:
    """The projection of a direction onto the dual cone, on the gradients themselves."""
    nnls = pytest.importorskip("scipy.optimize").nnls
    added, _ = nnls(rows.T.numpy(), -target.numpy())
    return target + torch.from_numpy(added) @ rows


def test_golden_values() -> None:
    assert_near(direction(UPGrad(), TWO), (0.292902, 1.900352, 1.900352), 2e-3)
    assert_near(direction(UPGrad(), THREE), (-0.295179, 0.715947, 0.979241, 0.237221), 2e-3)
    # The figures above are those of a peer that adds to the diagonal; these are exact.
    expected = sum(project(TWO, row) for row in TWO) / 2
    assert_near(direction(UPGrad(), TWO), expected, 1e-12)
    expected = sum(project(THREE, row) for row in THREE) / 3
    assert_near(direction(UPGrad(), THREE), expected, 1e-12)


def test_the_definitions_on_random_gradients() -> None:
    for rows in random_jacobians(100, decades=1.0):
        scale = float(rows.norm())
        expected = sum(project(rows, row) for row in rows) / len(rows)
        assert_near(direction(UPGrad(), rows), expected, 1e-10 * scale)
        assert_near(direction(DualProj(), rows), project(rows, rows.mean(0)), 1e-10 * scale)


@pytest.mark.parametrize(
    ("method", "peer"), [(UPGrad, "UPGradWeighting"), (DualProj, "DualProjWeighting")]
)
def test_they_agree_with_torchjd_as_its_constants_vanish(
    method: Callable[[], UPGrad | DualProj], peer: str
) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector
    # The addition to the diagonal is relative to the trace.
    assert largest_deviation(method(), getattr(aggregation, peer)()) < 1e-2
    precise = getattr(aggregation, peer)(projector=projector(reg_eps=1e-10))
    assert largest_deviation(method(), precise) < 1e-8
    for rows in random_jacobians(50):
        coefficients = coefficients_of(method(), gramian_of(rows))
        assert float(relative_products(rows, coefficients).min()) > -1e-13


@pytest.mark.parametrize(
    ("method", "peer"), [(UPGrad, "UPGradWeighting"), (DualProj, "DualProjWeighting")]
)
def test_a_preference_is_that_of_torchjd(
    method: Callable[..., UPGrad | DualProj], peer: str
) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector(reg_eps=1e-12)
    shares = vector((0.1, 0.3, 0.6))
    other = getattr(aggregation, peer)(shares, projector=projector)
    ours = method(preference={"a": 1.0, "b": 3.0, "c": 6.0})
    coefficients = coefficients_of(ours, gramian_of(THREE))
    assert deviation(THREE, coefficients, other(gramian_of(THREE))) < 1e-9


@over_both
@property_test
@given(rows=jacobians(decades=12.0, degenerate=True))
def test_no_gradient_conflicts(rows: Tensor, method: Callable[[], UPGrad | DualProj]) -> None:
    coefficients = coefficients_of(method(), gramian_of(rows))
    assert float(relative_products(rows, coefficients).min()) >= -1e-10
    assert float(coefficients.min()) >= 1 / len(rows) - 1e-12


@over_both
def test_a_small_gradient_counts_as_much_as_any(method: Callable[[], UPGrad | DualProj]) -> None:
    """Norms of 1e-12, 1 and 1e12."""
    for seed in range(20):
        rows = normal(3, 5, seed=seed) * vector((1e-12, 1.0, 1e12))[:, None]
        coefficients = coefficients_of(method(), gramian_of(rows))
        along = coefficients @ rows
        cosines = rows @ along / rows.norm(dim=1) / along.norm()
        assert float(cosines.min()) > -1e-12


@over_both
def test_the_part_of_a_small_gradient_in_upgrad_is_its_own_projection(
    method: Callable[[], UPGrad | DualProj],
) -> None:
    """Its part is as small as it is, but its condition is met all the same."""
    rows = vector([1.0, 0.0, -1e12, 1e12]).reshape(2, 2)
    expected = {UPGrad: (0.25, 0.25 + 5e11), DualProj: (0.0, 5e11)}[method]
    along = direction(method(), rows)
    assert_near(along / vector((1.0, 1e12)), vector(expected) / vector((1.0, 1e12)), 1e-3)


@over_both
def test_without_conflict_it_is_the_mean_or_the_sum(
    method: Callable[..., UPGrad | DualProj],
) -> None:
    for count in (1, 2, 5):
        rows = normal(count, 4, seed=count).abs()
        assert_near(coefficients_of(method(), gramian_of(rows)), [1 / count] * count, 1e-15)
        total = coefficients_of(method(reduction="sum"), gramian_of(rows))
        assert_near(total, [1.0] * count, 1e-15)


@over_both
def test_the_sum_is_k_times_the_mean(method: Callable[..., UPGrad | DualProj]) -> None:
    for reductions in ({}, {"preference": {"a": 1.0, "b": 2.0, "c": 4.0}}):
        mean = coefficients_of(method(**reductions), gramian_of(THREE))
        total = coefficients_of(method(reduction="sum", **reductions), gramian_of(THREE))
        assert_near(total, 3 * mean, 1e-12)


@property_test
@given(st.integers(0, 1000), st.floats(0.01, 100.0))
def test_upgrad_of_two_has_the_direction_of_pcgrad(seed: int, scale: float) -> None:
    rows = normal(2, 4, seed=seed) * vector((1.0, scale))[:, None]
    first, second = rows
    product = torch.clamp(first @ second, max=0.0)
    expected = (
        first - product / (second @ second) * second + second - product / (first @ first) * first
    )
    along = direction(UPGrad(), rows)
    assert float(torch.cosine_similarity(along, expected, dim=0)) == pytest.approx(1.0)


@over_both
def test_a_preference_of_absent_losses_is_divided_among_the_others(
    method: Callable[..., UPGrad | DualProj],
) -> None:
    weighting = method(preference={"a": 1.0, "b": 1.0, "c": 8.0})
    statistics = statistics_of((1.0, 1.0), torch.eye(2).double())
    assert_near(weighting.weights(statistics, {}).coefficients, (0.5, 0.5), 1e-15)


@over_both
def test_equal_losses_get_equal_coefficients(method: Callable[[], UPGrad | DualProj]) -> None:
    for seed in range(20):
        rows = normal(4, 3, seed=seed)
        rows[2] = rows[0]
        coefficients = coefficients_of(method(), gramian_of(rows))
        assert_near(coefficients[0], coefficients[2], 1e-7)


@over_both
def test_every_keeps_the_coefficients(method: Callable[..., UPGrad | DualProj]) -> None:
    weighting = method(every=2)
    first = weighting.weights(
        statistics_of((1.0, 2.0, 3.0), gramian_of(THREE)), initial_state(weighting, 3)
    )
    later = weighting.weights(statistics_of((3.0, 2.0, 1.0), step=1), first.state)
    assert torch.equal(later.coefficients, first.coefficients)


@over_both
def test_no_loss_rises_in_training(method: Callable[[], UPGrad | DualProj]) -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.5, -0.2, 1.0]).double())
    targets = normal(3, 3, seed=4)
    optimizer = BalancedOptimizer(torch.optim.SGD([parameter], lr=1e-3), method())

    def losses() -> dict[str, Tensor]:
        squares = (parameter - targets).square().sum(1)
        return dict(zip(names(3), squares, strict=True))

    before = {name: loss.item() for name, loss in losses().items()}
    for _ in range(50):
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        now = {name: loss.item() for name, loss in losses().items()}
        assert all(now[name] <= before[name] + 1e-5 for name in now)
        before = now
