"""GeometricMean, PBI and COSMOS: gradients of what they minimise, limits and peers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import COSMOS, PBI, GeometricMean, SumLog, Tchebycheff
from moo_balance.weighting import Weighting
from tests.support.gradients import property_test
from tests.support.statistics import assert_near, initial_state, normal, statistics_of, vector

PREFERENCE = {"a": 1.0, "b": 2.0, "c": 5.0}
VALUES = vector(PREFERENCE.values())


def coefficients(weighting: Weighting, losses: Tensor) -> Tensor:
    return weighting.weights(
        statistics_of(losses), initial_state(weighting, len(losses))
    ).coefficients


def gradient(value: Tensor, losses: Tensor) -> Tensor:
    return torch.autograd.grad(value, losses)[0]


positive_losses = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


# ---------------------------------------------------------------------- GeometricMean


def test_a_golden_value_of_the_geometric_mean() -> None:
    found = coefficients(GeometricMean(), vector((0.5, 2.0, 0.1)))
    assert_near(found, (0.309439, 0.077360, 1.547196), 1e-6)


def test_coefficients_are_the_gradient_of_the_geometric_mean() -> None:
    for seed in range(20):
        losses = normal(3, seed=seed).exp().requires_grad_()
        expected = gradient(losses.prod() ** (1 / 3), losses)
        assert_near(coefficients(GeometricMean(), losses.detach()), expected, 1e-13)
        shares = VALUES / 8
        expected = gradient((losses**shares).prod(), losses)
        assert_near(coefficients(GeometricMean(PREFERENCE), losses.detach()), expected, 1e-13)


def test_the_geometric_mean_is_that_of_torchjd() -> None:
    peer = pytest.importorskip("torchjd.scalarization").GeometricMean()
    for seed in range(200):
        losses = (3 * normal(4, seed=seed)).exp().requires_grad_()
        expected = gradient(peer(losses), losses)
        found = coefficients(GeometricMean(), losses.detach())
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)


@property_test
@given(positive_losses)
def test_the_geometric_mean_has_the_direction_of_the_sum_of_logs(values: list[float]) -> None:
    losses = vector(values)
    found, logs = coefficients(GeometricMean(), losses), coefficients(SumLog(), losses)
    torch.testing.assert_close(found / found.sum(), logs, rtol=1e-12, atol=0.0)


def test_no_product_of_losses_overflows() -> None:
    losses = torch.full((8,), 1e300, dtype=torch.float64)
    assert_near(coefficients(GeometricMean(), losses), torch.full((8,), 1 / 8), 1e-12)
    found = coefficients(GeometricMean(), vector((1e-300, 1e300)))
    torch.testing.assert_close(found, vector((5e299, 5e-301)), rtol=1e-10, atol=0.0)
    narrow = statistics_of(torch.tensor([1e-30, 1e30]))
    assert GeometricMean().weights(narrow, {}).coefficients.tolist() == pytest.approx([5e29, 5e-31])


# ---------------------------------------------------------------------- PBI


def pbi_value(losses: Tensor, direction: Tensor, ideal: Tensor, penalty: float) -> Tensor:
    unit, away = direction / direction.norm(), losses - ideal
    along = away @ unit
    return along + penalty * (away - along * unit).norm()


@pytest.mark.parametrize("penalty", [0.0, 0.5, 5.0])
def test_pbi_is_the_gradient_of_its_value(penalty: float) -> None:
    ideal = vector((-1.0, 0.0, 0.05))
    weighting = PBI(penalty, preference=PREFERENCE, ideal={"a": -1.0, "c": 0.05})
    for seed in range(20):
        losses = normal(3, seed=seed).requires_grad_()
        expected = gradient(pbi_value(losses, 1 / VALUES, ideal, penalty), losses)
        assert_near(coefficients(weighting, losses.detach()), expected, 1e-13)


def test_pbi_is_that_of_torchjd() -> None:
    """Whose square root has 1e-12 added to its argument."""
    peer_of = pytest.importorskip("torchjd.scalarization").PBI
    for seed in range(200):
        preference = dict(zip("abcd", normal(4, seed=seed + 500).exp().tolist(), strict=True))
        losses = normal(4, seed=seed).exp().requires_grad_()
        direction = 1 / vector(preference.values())
        expected = gradient(peer_of(5.0, direction)(losses), losses)
        assert_near(coefficients(PBI(preference=preference), losses.detach()), expected, 1e-9)


@property_test
@given(positive_losses, st.floats(-300.0, 300.0))
def test_on_the_ray_pbi_is_the_weighted_sum(values: list[float], exponent: float) -> None:
    """Where the penalty has no gradient, rounding is not taken for one, at any scale."""
    preference = dict(zip("abcde", values, strict=False))
    direction = 1 / vector(values)
    losses = direction * 10**exponent
    expected = direction / direction.norm()
    assert_near(coefficients(PBI(5.0, preference=preference), losses), expected, 1e-12)
    worst = coefficients(Tchebycheff(preference), losses)
    assert float(worst.max()) > 0


@property_test
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5), st.floats(-290.0, 290.0))
def test_a_common_unit_does_not_matter_to_pbi(values: list[float], exponent: float) -> None:
    losses = vector(values)
    losses[0] = 2 * losses[1]  # off the ray
    found = coefficients(PBI(), losses * 10**exponent)
    assert_near(found, coefficients(PBI(), losses), 1e-9)


def test_pbi_raises_a_loss_that_is_too_small() -> None:
    found = coefficients(PBI(), vector((0.1, 1.0)))
    assert float(found[0]) < 0 < float(found[1])
    assert bool((coefficients(PBI(0.0), vector((0.1, 1.0))) > 0).all())


def test_descent_on_pbi_ends_on_the_ray_of_tchebycheff() -> None:
    """Two quadratics whose front is convex: the preference decides where on it."""
    weighting = PBI(preference={"a": 3.0, "b": 1.0})
    point = vector((0.9, 0.7))
    for step in range(2000):
        losses = torch.stack([(point - 1).square().sum(), (point + 1).square().sum()])
        weights = weighting.weights(statistics_of(losses), {}).coefficients
        rows = torch.stack([2 * (point - 1), 2 * (point + 1)])
        point = point - 0.05 / (step + 10) ** 0.8 * (weights @ rows)
    assert float(losses[1] / losses[0]) == pytest.approx(3.0, rel=2e-2)


# ---------------------------------------------------------------------- COSMOS


def cosmos_value(losses: Tensor, preference: Tensor, penalty: float) -> Tensor:
    total = preference @ losses
    return total - penalty * total / (preference.norm() * losses.norm())


@pytest.mark.parametrize("penalty", [0.0, 1.0, 8.0])
def test_cosmos_is_the_gradient_of_its_value(penalty: float) -> None:
    for seed in range(20):
        losses = normal(3, seed=seed).requires_grad_()
        expected = gradient(cosmos_value(losses, VALUES / 8, penalty), losses)
        found = coefficients(COSMOS(penalty, preference=PREFERENCE), losses.detach())
        assert_near(found, expected, 1e-13)


def test_cosmos_is_that_of_torchjd() -> None:
    peer_of = pytest.importorskip("torchjd.scalarization").COSMOS
    for seed in range(200):
        values = normal(4, seed=seed + 500).exp()
        preference = dict(zip("abcd", values.tolist(), strict=True))
        losses = normal(4, seed=seed).exp().requires_grad_()
        expected = gradient(peer_of(2.0, values / values.sum())(losses), losses)
        assert_near(
            coefficients(COSMOS(2.0, preference=preference), losses.detach()), expected, 1e-13
        )


@property_test
@given(positive_losses, st.floats(-300.0, 300.0))
def test_along_the_preference_cosmos_is_the_weighted_sum(
    values: list[float], exponent: float
) -> None:
    preference = dict(zip("abcde", values, strict=False))
    losses = vector(values) * 10**exponent
    expected = vector(values) / sum(values)
    assert_near(coefficients(COSMOS(8.0, preference=preference), losses), expected, 1e-12)


def test_cosmos_raises_a_loss_that_is_too_small() -> None:
    found = coefficients(COSMOS(8.0), vector((0.1, 1.0)))
    assert float(found[0]) < 0 < float(found[1])


@pytest.mark.parametrize("weighting", [PBI(), COSMOS()], ids=repr)
def test_losses_of_zero_have_no_direction(weighting: Weighting) -> None:
    found = coefficients(weighting, vector((0.0, 0.0)))
    assert float(found[0]) == float(found[1]) > 0
