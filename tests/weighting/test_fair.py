"""NashMTL and FairGrad: published figures, relations, and other implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moo_balance import ConFIG, FairGrad, NashMTL
from tests.support.gradients import gramian_of
from tests.support.oracle import coefficients_of, largest_deviation, random_jacobians
from tests.support.statistics import assert_near, initial_state, normal, statistics_of, vector

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)


def residual(gramian: Tensor, weights: Tensor, alpha: float) -> float:
    """Largest relative error in the defining equation."""
    wanted = weights ** (-1 / alpha)
    return float(((gramian @ weights - wanted) / wanted).abs().max())


def test_golden_values() -> None:
    nash = coefficients_of(NashMTL(), gramian_of(THREE))
    assert_near(nash, (0.913030, 1.282571, 0.588249), 1e-6)
    assert float((nash @ THREE).norm()) == pytest.approx(3**0.5)
    along = coefficients_of(FairGrad(alpha=1.0), gramian_of(TWO)) @ TWO
    assert_near(along, (0.076584, 0.998533, 0.998533), 1e-6)
    fair = coefficients_of(FairGrad(), gramian_of(THREE))
    assert_near(fair, (0.897964, 1.315658, 0.521676), 1e-6)
    assert_near(fair @ THREE, (-0.145389, 0.741108, 1.472161, 0.281541), 1e-6)


def test_nash_is_fairgrad_with_alpha_1() -> None:
    preference = {"a": 1.0, "b": 2.0, "c": 4.0}
    for shares in (None, preference):
        nash = coefficients_of(NashMTL(preference=shares), gramian_of(THREE))
        assert torch.equal(
            nash, coefficients_of(FairGrad(1.0, preference=shares), gramian_of(THREE))
        )


def test_nash_has_the_direction_of_config_for_two_losses() -> None:
    for seed in range(20):
        rows = normal(2, 4, seed=seed)
        nash = coefficients_of(NashMTL(), gramian_of(rows))
        config = coefficients_of(ConFIG(), gramian_of(rows))
        assert_near(nash / nash.sum(), config / config.sum(), 1e-12)


def test_fairgrad_agrees_with_torchjd_as_far_as_that_solves_the_equation() -> None:
    peer = pytest.importorskip("torchjd.aggregation").FairGradWeighting
    for alpha in (1.0, 2.0):
        assert largest_deviation(FairGrad(alpha), peer(alpha)) < 1e-8
        for rows in random_jacobians():
            gramian = gramian_of(rows)
            ours = residual(gramian, coefficients_of(FairGrad(alpha), gramian), alpha)
            assert ours < 1e-10


def test_a_peer_stops_early_where_norms_are_far_apart() -> None:
    peer = pytest.importorskip("torchjd.aggregation").FairGradWeighting(2.0, max_iters=200)
    worst = 0.0
    for rows in random_jacobians(10, decades=3.0):
        gramian = gramian_of(rows)
        assert residual(gramian, coefficients_of(FairGrad(), gramian), 2.0) < 1e-9
        worst = max(worst, residual(gramian, peer(gramian), 2.0))
    assert worst > 0.01


def test_nash_solves_its_equation_at_any_scale() -> None:
    for decades in (0.0, 3.0, 30.0):
        for rows in random_jacobians(100, decades=decades):
            gramian = gramian_of(rows)
            assert residual(gramian, coefficients_of(NashMTL(), gramian), 1.0) < 1e-10


@pytest.mark.parametrize("count", [2, 3])
def test_a_preference_multiplies_the_contributions_to_the_length(count: int) -> None:
    rows = normal(count, 5, seed=1)
    preference = dict(zip("abc"[:count], (1.0, 2.0, 6.0), strict=False))
    weights = coefficients_of(NashMTL(preference=preference), gramian_of(rows))
    shares = vector(preference.values())
    assert_near(weights * (gramian_of(rows) @ weights), shares / shares.mean(), 1e-12)
    assert float((weights @ rows).square().sum()) == pytest.approx(count)


def test_a_larger_alpha_favours_the_loss_that_improves_least() -> None:
    least = []
    for alpha in (0.5, 1.0, 2.0, 4.0):
        along = coefficients_of(FairGrad(alpha), gramian_of(THREE)) @ THREE
        least.append(float((THREE @ along / along.norm()).min()))
    assert least == sorted(least)


def test_a_single_loss_has_a_step_of_length_1() -> None:
    rows = vector((3.0, 4.0)).reshape(1, 2)
    assert_near(coefficients_of(NashMTL(), gramian_of(rows)), (0.2,), 1e-15)
    assert_near(coefficients_of(FairGrad(), gramian_of(rows)), (25 ** (-2 / 3),), 1e-15)


def test_equal_losses_get_equal_coefficients() -> None:
    for seed in range(20):
        rows = normal(4, 5, seed=seed)
        rows[2] = rows[0]
        for weighting in (NashMTL(), FairGrad()):
            coefficients = coefficients_of(weighting, gramian_of(rows))
            assert_near(coefficients[0], coefficients[2], 1e-12)
            assert residual(
                gramian_of(rows), coefficients, 1.0 if weighting == NashMTL() else 2.0
            ) < (1e-10)


def test_every_keeps_the_coefficients_and_preferences_of_the_present() -> None:
    weighting = NashMTL(preference={"a": 1.0, "b": 1.0, "c": 8.0}, every=2)
    first = weighting.weights(
        statistics_of((1.0, 2.0, 3.0), gramian_of(THREE)), initial_state(weighting, 3)
    )
    later = weighting.weights(statistics_of((3.0, 2.0, 1.0), step=1), first.state)
    assert torch.equal(later.coefficients, first.coefficients)
    present = statistics_of((1.0, 1.0), gramian_of(THREE[:2]))
    state = {"weights": torch.zeros(2).double()}
    expected = coefficients_of(NashMTL(), gramian_of(THREE[:2]))
    assert_near(weighting.weights(present, state).coefficients, expected, 1e-15)
