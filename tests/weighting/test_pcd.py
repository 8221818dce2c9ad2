"""PCD by its conditions, its limits, and an independent implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import PCD, BalancedOptimizer
from moo_balance.functional import project_dual_cone
from moo_balance.weighting import State
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.oracle import coefficients_of, deviation, random_jacobians
from tests.support.statistics import (
    assert_near,
    initial_state,
    normal,
    run_steps,
    statistics_of,
    vector,
)

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)

shares = st.sampled_from([0.0, 0.02, 0.3, 1.0])


def run(weighting: PCD, batches: Sequence[Tensor]) -> list[tuple[Tensor, State]]:
    """Coefficients and state after each batch."""
    outputs = run_steps(weighting, gramians=list(map(gramian_of, batches)))
    return [(output.coefficients, output.state) for output in outputs]


def test_golden_values() -> None:
    found = coefficients_of(PCD("a"), gramian_of(TWO)) @ TWO
    assert_near(found, (-0.820033, 2.943429, 2.943429), 1e-6)
    found = coefficients_of(PCD("a"), gramian_of(THREE)) @ THREE
    assert_near(found, (0.494754, 1.590959, 1.787173, -0.173442), 1e-6)


@property_test
@given(jacobians(decades=3.0), shares)
def test_it_satisfies_the_conditions_of_the_programme(rows: Tensor, tau: float) -> None:
    """In the first step all normalised gradients have the length 1."""
    coefficients = coefficients_of(PCD("a", tau), gramian_of(rows))
    units = rows / rows.norm(dim=1, keepdim=True)
    direction = coefficients @ rows
    assert float(direction.norm() / rows[0].norm()) == pytest.approx(1.0, rel=1e-9)
    scale = coefficients[0]  # the multiple of the primary gradient before the last step is 1
    multiples = coefficients[1:] * rows[1:].norm(dim=1) / (scale * rows[0].norm())
    progress = units[1:] @ (direction / (scale * rows[0].norm()))
    size = 1 + multiples.sum()
    assert bool((multiples >= 0).all())
    assert bool((progress >= tau - 1e-9 * size).all())
    assert bool((multiples * (progress - tau) <= 1e-9 * size**2).all())


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_it_agrees_with_torchjd_over_several_steps(tau: float, beta: float) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    if not hasattr(aggregation, "PCDWeighting"):
        pytest.skip("this version of torchjd has no PCD")
    worst = 0.0
    for rows in random_jacobians(decades=1.0):
        peer = aggregation.PCDWeighting(tau, beta, eps=0.0)
        batches = [rows, 3 * rows.flip(1), rows.flip(0)]
        for batch, (found, _) in zip(batches, run(PCD("a", tau, beta), batches), strict=True):
            worst = max(worst, deviation(batch, found, peer(gramian_of(batch))))
    assert worst < 1e-11


@property_test
@given(jacobians(decades=2.0), st.integers(0, 7), shares)
def test_the_primary_loss_is_the_one_that_is_named(rows: Tensor, which: int, tau: float) -> None:
    which = which % len(rows)
    order = [which, *(k for k in range(len(rows)) if k != which)]
    found = coefficients_of(PCD("abcdefgh"[which], tau), gramian_of(rows))
    expected = coefficients_of(PCD("a", tau), gramian_of(rows[order]))
    assert_near(found[order] / found.abs().max(), expected / found.abs().max(), 1e-7)


@property_test
@given(jacobians(counts=(2, 6), degenerate=True), st.randoms(use_true_random=False), shares)
def test_the_order_of_losses_does_not_matter(rows: Tensor, random: Any, tau: float) -> None:
    order = list(range(1, len(rows)))
    random.shuffle(order)
    order = [0, *order]
    straight = coefficients_of(PCD("a", tau), gramian_of(rows))
    crossed = coefficients_of(PCD("a", tau), gramian_of(rows[order]))
    assert_near(crossed, straight[order], 1e-7 * max(1.0, float(straight.abs().max())))


@property_test
@given(jacobians(decades=2.0))
def test_without_a_conflict_the_direction_is_the_primary_gradient(rows: Tensor) -> None:
    rows = rows.abs()
    found = coefficients_of(PCD("a", tau=0.0), gramian_of(rows))
    assert_near(found, [1.0] + [0.0] * (len(rows) - 1), 1e-15)


@property_test
@given(jacobians(decades=2.0))
def test_a_share_of_zero_projects_onto_the_dual_cone(rows: Tensor) -> None:
    """Of the others; the primary gradient is not opposed by its own projection."""
    gramian = gramian_of(rows)
    found = coefficients_of(PCD("a", tau=0.0), gramian)
    projected = project_dual_cone(gramian, torch.eye(len(rows)).double()[0])
    assert_near(found / found[0], projected / projected[0], 1e-7 * float(projected.max()))
    assert float((rows @ (found @ rows)).min()) >= -1e-9 * float(rows.square().sum())


def test_the_primary_loss_may_rise_and_the_others_do_not() -> None:
    rows = vector([1, 0, -1, 0.001]).reshape(2, 2)
    slopes = rows @ (coefficients_of(PCD("a", tau=0.1), gramian_of(rows)) @ rows)
    assert slopes[0] < 0 < slopes[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_conditions_that_exclude_one_another_are_dropped(dtype: torch.dtype, tau: float) -> None:
    apart = vector([1, 2, 3, 4, -2, 0, 1, 0, 4, 0, -2, 0]).reshape(3, 4).to(dtype)
    assert coefficients_of(PCD("a", tau), gramian_of(apart)).tolist() == [1.0, 0.0, 0.0]
    hull = torch.cat([normal(1, 5), normal(3, 5, seed=2)]).to(dtype)
    hull = torch.cat([hull, -(vector([1, 2, 3]).to(dtype) @ hull[1:])[None]])
    found = coefficients_of(PCD("a", tau), gramian_of(hull))
    assert_near(found, (1.0, 0.0, 0.0, 0.0, 0.0), 1e-6)


def test_without_a_share_opposite_losses_exclude_only_what_moves_them() -> None:
    rows = vector([1, 2, 3, 4, -2, 0, 1, 0, 4, 0, -2, 0]).reshape(3, 4)
    direction = coefficients_of(PCD("a", tau=0.0), gramian_of(rows)) @ rows
    assert_near(rows[1:] @ direction, (0.0, 0.0), 1e-9)
    assert float(direction.norm()) == pytest.approx(float(rows[0].norm()))


@pytest.mark.parametrize("count", [2, 3])
def test_a_primary_gradient_that_is_opposed_entirely_gives_zero(count: int) -> None:
    rows = torch.cat([TWO[:1], -3 * TWO[:1], -TWO[:1]])[:count]
    assert coefficients_of(PCD("a", tau=0.0), gramian_of(rows)).tolist() == [0.0] * count


@pytest.mark.parametrize("count", [2, 4])
def test_scaling_another_loss_throughout_changes_no_direction(count: int) -> None:
    batches = [normal(count, 6, seed=seed) for seed in range(6)]
    factors = vector([1.0, 1e-6, 1e4, 30.0][:count])
    plain = run(PCD("a", beta=0.9), batches)
    scaled = run(PCD("a", beta=0.9), [rows * factors[:, None] for rows in batches])
    for rows, (one, _), (other, _) in zip(batches, plain, scaled, strict=True):
        assert deviation(rows, other * factors, one) < 1e-12


def test_a_gradient_that_is_longer_than_usual_is_granted_more() -> None:
    rows = torch.eye(2).double()
    (_, _), (found, state) = run(PCD("a", tau=0.1, beta=0.5), [rows, rows * vector([[1], [3]])])
    average = (0.25 * 1 + 0.5 * 9) / 0.75
    assert state["squares"][1] / state["mass"][1] == pytest.approx(average)
    size = (9 / average) ** 0.5
    ratio = 0.1 * size  # of the two components, which are orthogonal
    assert float(found[1] * 3 / found[0]) == pytest.approx(ratio)


@pytest.mark.parametrize("count", [3, 4])
def test_a_share_may_be_named_for_each_other_loss(count: int) -> None:
    rows = torch.eye(count).double()
    tau = {"b": 0.1, "c": 0.2, "d": 0.0}
    named = PCD("a", {name: tau[name] for name in "bcd"[: count - 1]})
    found = coefficients_of(named, gramian_of(rows))
    assert_near(found / found[0], [1.0, *tau.values()][:count], 1e-12)


def test_averages_move_only_where_there_is_a_gradient() -> None:
    parameters = torch.nn.Parameter(normal(4, seed=5))
    rows, names = normal(3, 4), "abc"
    optimizer = BalancedOptimizer(torch.optim.SGD([parameters], lr=0.0), PCD("a", beta=0.5))

    def take(present: str, dead: str = "") -> tuple[Tensor, Tensor]:
        gradients = {n: 0 * rows[0] if n in dead else rows["abc".index(n)] for n in present}
        optimizer.step(lambda: {name: row @ parameters for name, row in gradients.items()})
        state = optimizer.state_dict()["balance"]["state"]
        return state["squares"].clone(), state["mass"].clone()

    take(names)
    squares, mass = take("ac")
    assert mass.tolist() == [0.75, 0.5, 0.75]
    assert_near(squares / mass, rows.square().sum(1), 1e-12)
    squares, mass = take("abc", dead="c")
    assert mass.tolist() == [0.875, 0.75, 0.75]
    assert_near(squares / mass, rows.square().sum(1), 1e-12)


@pytest.mark.parametrize("gone", ["absent", "zero"])
@pytest.mark.parametrize("tau", [0.0, 0.02, 1.0])
def test_without_the_primary_loss_the_others_are_balanced(gone: str, tau: float) -> None:
    rows = vector([0, 0, 3, 0, 0, 0.1]).reshape(3, 2)
    parameters = torch.nn.Parameter(vector([1.0, 1.0]))
    names = ["a", "b", "c"]
    optimizer = BalancedOptimizer(
        torch.optim.SGD([parameters], lr=0.0), PCD("a", tau), loss_names=names
    )
    losses = {name: row @ parameters for name, row in zip(names, rows, strict=True)}
    if gone == "absent":
        del losses["a"]
    optimizer.backward(losses)
    length = (3 + 0.1) / 2
    assert_near(parameters.grad, (length / 2**0.5, length / 2**0.5), 1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("tau", [0.0, 0.02])
def test_norms_may_lie_sixty_decades_apart(count: int, tau: float) -> None:
    rows = normal(count, 6, seed=3)
    factors = 10.0 ** torch.linspace(-30, 30, count, dtype=torch.float64)
    for order in (factors, factors.flip(0)):
        found = coefficients_of(PCD("a", tau), gramian_of(rows * order[:, None]))
        plain = coefficients_of(PCD("a", tau), gramian_of(rows))
        assert deviation(rows, found * order / order[0], plain) < 1e-12


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_zero_gradient_changes_nothing_for_the_others(count: int) -> None:
    rows = normal(count, 4)
    rows[1] = 0.0
    found = coefficients_of(PCD("a", tau=0.3), gramian_of(rows))
    kept = [k for k in range(count) if k != 1]
    assert found[1] == 0.0
    expected = coefficients_of(PCD("a", tau=0.3), gramian_of(rows[kept]))
    assert_near(found[kept], expected, 1e-12)
    zeros = torch.zeros(count, count).double()
    assert bool(coefficients_of(PCD("a"), zeros).isfinite().all())


def test_equal_losses_share_what_is_added() -> None:
    rows = torch.cat([normal(1, 3, seed=4), -normal(1, 3, seed=4).expand(3, 3) + 0.1])
    found = coefficients_of(PCD("a"), gramian_of(rows))
    assert_near(found[1:], found[1:2].expand(3), 1e-9)


@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_a_float32_gramian_is_solved_to_its_precision(tau: float) -> None:
    for seed in range(50):
        rows = normal(4, 12, seed=seed)
        exact = coefficients_of(PCD("a", tau), gramian_of(rows)) @ rows
        single = coefficients_of(PCD("a", tau), gramian_of(rows.float())).double() @ rows
        assert_near(single, exact, 1e-4)


def test_an_average_of_the_least_squares_may_vanish() -> None:
    """The square of a length of 1e-161 is a number, and a thousandth of it is none."""
    rule = PCD("a")
    gramian = torch.eye(2, dtype=torch.float64) * 1e-321
    answer = rule.weights(statistics_of((1.0, 1.0), gramian), initial_state(rule, 2))
    assert bool(answer.coefficients.isfinite().all())
