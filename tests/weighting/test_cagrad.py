"""CAGrad by its optimality conditions, its limits, and an independent implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import MGDA, CAGrad
from moo_balance.functional._conflict_averse import add_conflict_averse
from moo_balance.functional._directions import directions
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.oracle import coefficients_of, deviation, largest_deviation
from tests.support.statistics import assert_near, names, normal, vector

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)

radii = st.sampled_from([0.1, 0.4, 0.5, 0.9, 1.0, 1.1, 3.0, 100.0])


def gap(rows: Tensor, coefficients: Tensor, c: float, shares: Tensor | None = None) -> float:
    """What improvements lack of the bound that the weights prove, and how far it is outside.

    Relative to the norms involved; 0 at the solution only.
    """
    shares = torch.full_like(coefficients, 1 / len(rows)) if shares is None else shares
    centre, direction, added = shares @ rows, coefficients @ rows, coefficients - shares
    assert bool((added >= -1e-15).all())
    radius = c * centre.norm()
    weights = added / added.sum() if added.any() else shares
    combined = weights @ rows
    dual = combined @ centre + radius * combined.norm()  # no worst improvement is better
    norms = rows.norm(dim=1)
    missing = ((dual - rows @ direction) / norms).max()
    outside = (direction - centre).norm() - radius
    return float(max(missing, outside) / ((shares + added) @ norms))


def test_golden_values() -> None:
    coefficients = coefficients_of(CAGrad(), gramian_of(THREE))
    assert_near(coefficients @ THREE, (-0.237411, 0.418440, 0.706739, 0.207447), 1e-6)
    added = coefficients - 1 / 3
    assert_near(added / added.sum(), (0.259722, 0.740278, 0.0), 1e-6)
    added = coefficients_of(CAGrad(c=0.5), gramian_of(THREE)) - 1 / 3
    assert_near(added / added.sum(), (0.282635, 0.717365, 0.0), 1e-6)


@property_test
@given(jacobians(decades=1.0), radii)
def test_the_worst_improvement_is_the_best_one_within_the_ball(rows: Tensor, c: float) -> None:
    assert gap(rows, coefficients_of(CAGrad(c), gramian_of(rows)), c) < 1e-12


@property_test
@given(jacobians(degenerate=True), radii)
def test_dependent_gradients_have_an_optimal_direction_too(rows: Tensor, c: float) -> None:
    rows = rows[rows.norm(dim=1) > 0]
    coefficients = coefficients_of(CAGrad(c), gramian_of(rows))
    direction, centre = coefficients @ rows, rows.mean(0)
    scale = rows.norm(dim=1).max()
    assert float((direction - centre).norm()) <= c * float(centre.norm()) + 1e-7 * float(scale)
    worst = (rows @ direction).min()
    # The least improvement that any weights prove to be the best one: those of the direction, and
    # those of the shortest combination.
    bounds = []
    for weights in (
        (coefficients - 1 / len(rows)).clamp(min=0.0),
        coefficients_of(MGDA(), gramian_of(rows)),
    ):
        if weights.sum() > 0:
            combined = weights @ rows / weights.sum()
            bounds.append(combined @ centre + c * centre.norm() * combined.norm())
    assert min(bounds) - worst < 1e-6 * scale**2


def test_it_agrees_with_torchjd() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    try:
        peers = {c: aggregation.CAGradWeighting(c, norm_eps=1e-12) for c in (0.4, 1.5)}
    except ImportError as error:
        pytest.skip(str(error))
    # The peer solves to 1e-8 of a problem that is divided by the trace.
    for c, peer in peers.items():
        assert largest_deviation(CAGrad(c), peer) < 1e-4


@property_test
@given(jacobians(decades=3.0, degenerate=True))
def test_a_radius_of_zero_gives_the_mean(rows: Tensor) -> None:
    count = len(rows)
    assert coefficients_of(CAGrad(c=0.0), gramian_of(rows)).tolist() == [1 / count] * count


@property_test
@given(jacobians(counts=(2, 6)))
def test_a_large_radius_gives_the_direction_of_mgda(rows: Tensor) -> None:
    gramian = gramian_of(rows)
    found = coefficients_of(CAGrad(c=1e7), gramian)
    assert_near(found / found.sum(), coefficients_of(MGDA(), gramian), 1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_reduction_and_a_rescaling_multiply_the_direction(count: int) -> None:
    gramian, c = gramian_of(normal(count, 3)), 0.4
    plain = coefficients_of(CAGrad(c), gramian)
    for rescale, divisor in ((None, 1), ("1+c", 1.4), ("1+c^2", 1.16)):
        assert_near(coefficients_of(CAGrad(c, rescale), gramian), plain / divisor, 1e-14)
        found = coefficients_of(CAGrad(c, rescale, "sum"), gramian)
        assert_near(found, count * plain / divisor, 1e-14)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("c", [0.4, 1.5])
def test_a_preference_moves_the_centre_of_the_ball(count: int, c: float) -> None:
    for seed in range(20):
        rows, shares = normal(count, 6, seed=seed), normal(count, seed=100 + seed).exp()
        preference = dict(zip(names(count), shares.tolist(), strict=True))
        found = coefficients_of(CAGrad(c, preference=preference), gramian_of(rows))
        assert gap(rows, found, c, shares / shares.sum()) < 1e-12
        equal = CAGrad(c, preference=dict.fromkeys(names(count), 2.0))
        expected = coefficients_of(CAGrad(c), gramian_of(rows))
        assert_near(coefficients_of(equal, gramian_of(rows)), expected, 1e-12)


@property_test
@given(jacobians(counts=(2, 5), degenerate=True), st.randoms(use_true_random=False), radii)
def test_the_order_of_losses_does_not_matter(rows: Tensor, random: Any, c: float) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    straight = coefficients_of(CAGrad(c), gramian_of(rows))
    crossed = coefficients_of(CAGrad(c), gramian_of(rows[order]))
    assert_near(crossed, straight[order], 1e-7)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("c", [0.4, 1.0, 2.0])
def test_a_common_factor_does_not_matter(count: int, c: float) -> None:
    """Nor is there a size of the gradients at which it stops, as at a tolerance of 1e-4."""
    gramian = gramian_of(normal(count, 4, seed=7))
    plain = coefficients_of(CAGrad(c), gramian)
    for exponent in (-30, -4, 30):
        found = coefficients_of(CAGrad(c), gramian * 10.0 ** (2 * exponent))
        assert_near(found, plain, 1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("c", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_norms_may_lie_sixty_decades_apart(count: int, c: float, seed: int) -> None:
    rows = normal(count, 6, seed=seed)
    factors = 10.0 ** torch.linspace(-30, 30, count, dtype=torch.float64)
    coefficients = coefficients_of(CAGrad(c), gramian_of(rows * factors[:, None]))
    assert bool(coefficients.isfinite().all())
    assert gap(rows * factors[:, None], coefficients, c) < 1e-12


@pytest.mark.parametrize("c", [0.2, 0.4, 1.0, 3.0])
def test_a_float32_gramian_is_solved_to_its_precision(c: float) -> None:
    for seed in range(50):
        rows = normal(4, 3, seed=seed)  # dependent
        exact = coefficients_of(CAGrad(c), gramian_of(rows)) @ rows
        single = coefficients_of(CAGrad(c), gramian_of(rows.float())).double() @ rows
        assert_near(single, exact, 0.02 * float(rows.norm(dim=1).max()))


@pytest.mark.parametrize("cosine", [1 - 1e-3, 1 - 2e-4, 1 - 5e-5, 1.0, -0.999, -0.9998, -0.99995])
@pytest.mark.parametrize("length", [1.0, 1 + 1e-9, 0.9, 1e-3])
@pytest.mark.parametrize("c", [0.4, 1.5])
def test_almost_parallel_gradients_are_solved_on_both_ways(
    cosine: float, length: float, c: float
) -> None:
    """A closed form, and the general solver next to it."""
    rows = vector([1, 0, length * cosine, length * math.sqrt(1 - cosine**2)]).reshape(2, 2)
    assert gap(rows, coefficients_of(CAGrad(c), gramian_of(rows)), c) < 1e-9


@property_test
@given(jacobians(counts=(2, 2), decades=3.0), radii)
def test_the_closed_form_for_two_is_the_general_solution(rows: Tensor, c: float) -> None:
    gradients = directions(gramian_of(rows))
    added = torch.from_numpy(add_conflict_averse(gradients, [0.5, 0.5], c, 1e-16))
    found = coefficients_of(CAGrad(c), gramian_of(rows))
    assert deviation(rows, found, added + 0.5) < 1e-9


@pytest.mark.parametrize("c", [1.0, 1.5])
def test_a_stationary_point_has_the_direction_zero(c: float) -> None:
    for rows in (
        vector([1, 0, -2, 0]).reshape(2, 2),
        torch.cat([THREE, -THREE.sum(0, keepdim=True)]) * vector([1, 2, 3, 1])[:, None],
    ):
        found = coefficients_of(CAGrad(c), gramian_of(rows))
        assert_near(found @ rows, torch.zeros(rows.shape[1]).double(), 1e-10)
        assert found.max() < 100


def test_opposite_gradients_leave_what_no_gradient_opposes() -> None:
    """The formula divides zero by zero; the mean conflicts with none, and stays as it is."""
    rows = vector([1, 0, -1, 0, 0, 1]).reshape(3, 2)
    assert_near(coefficients_of(CAGrad(), gramian_of(rows)) @ rows, (0.0, 1 / 3), 1e-12)


@property_test
@given(jacobians(counts=(2, 6)), st.floats(1.0, 10.0))
def test_no_loss_rises_if_the_ball_contains_zero(rows: Tensor, c: float) -> None:
    slopes = rows @ (coefficients_of(CAGrad(c), gramian_of(rows)) @ rows)
    assert slopes.min() > -1e-12 * slopes.abs().max()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_zero_gradients_leave_all_finite(count: int) -> None:
    rows = normal(count, 4)
    for zeros in (slice(0, 1), slice(0, count - 1), slice(0, count)):
        rows[zeros] = 0.0
        found = coefficients_of(CAGrad(), gramian_of(rows))
        assert bool(found.isfinite().all())
        assert found.max() < 100


def test_equal_losses_share_what_is_added() -> None:
    for count in (2, 3, 4):
        rows = torch.cat([normal(1, 5, seed=1).expand(count - 1, 5), normal(1, 5, seed=2)])
        found = coefficients_of(CAGrad(), gramian_of(rows))
        assert_near(found[:-1], found[:1].expand(count - 1), 1e-10)
        rows = normal(1, 5).expand(count, 5)
        assert_near(coefficients_of(CAGrad(), gramian_of(rows)), [1.4 / count] * count, 1e-7)


def test_deviation_is_measured_on_directions() -> None:
    coefficients = coefficients_of(CAGrad(), gramian_of(TWO))
    assert deviation(TWO, coefficients, 2 * coefficients) == pytest.approx(0.5)


@pytest.mark.parametrize("c", [0.4, 1.0, 1.5])
def test_scalar_gradients_of_all_lengths_are_solved_in_float32(c: float) -> None:
    """With a radius of 1 the ball just holds zero, the only direction without a conflict."""
    factors = 10.0 ** torch.linspace(-6, 6, 8).double()[:, None]
    for seed in range(20):
        rows = (normal(8, 1, seed=seed) * factors).float()
        found = coefficients_of(CAGrad(c), gramian_of(rows))
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1.5e-8, 1e-7, 1e-5])
@pytest.mark.parametrize("c", [0.1, 0.4, 1.0])
def test_almost_opposite_gradients_are_solved(angle: float, c: float) -> None:
    """Their cosine is -1 up to rounding, from which no large multiples should follow."""
    for seed in range(20):
        first, second, third = normal(3, 6, seed=seed)
        rows = torch.stack([first, -1.3 * first + angle * second, third])
        assert coefficients_of(CAGrad(c), gramian_of(rows)).max() < 1e6
