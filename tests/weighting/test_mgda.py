"""MGDA under its normalisations, against published figures and the optimality conditions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moo_balance import MGDA, BalancedOptimizer
from tests.support.statistics import (
    assert_near,
    initial_state,
    names,
    normal,
    statistics_of,
    vector,
)

JACOBIAN = torch.tensor([[1, 2, 0, -1], [0, -1, 1, 0.5], [-2, 0.5, 0.3, 1]], dtype=torch.float64)
LOSSES = vector((0.5, 2.0, 0.1))
NORMALIZATIONS = [None, "l2", "loss", "loss+", "log"]


def divisors(normalize: str | None, losses: Tensor, jacobian: Tensor) -> Tensor:
    norms = jacobian.norm(dim=1)
    return {
        None: torch.ones_like(losses),
        "l2": norms,
        "loss": losses,
        "loss+": losses * norms,
        "log": losses,
    }[normalize]


def answer_to(normalize: str | None, losses: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and the direction that they give."""
    answer = MGDA(normalize).weights(statistics_of(losses, jacobian @ jacobian.T), {})
    return answer.weights, answer.coefficients @ jacobian


@pytest.mark.parametrize(
    ("normalize", "weights", "direction"),
    [
        (None, (0.328176, 0.507880, 0.163944), (0.000289, 0.230445, 0.557063, 0.089707)),
        ("l2", (0.420950, 0.364890, 0.214160), (-0.007369, 0.584091, 0.429138, -0.024346)),
        ("loss", (0.111814, 0.881865, 0.006322), (0.099170, -0.655077, 0.883761, 0.335441)),
        ("loss+", (0.177400, 0.812713, 0.009887), None),
    ],
)
def test_weights_apply_to_the_raw_gradients_as_in_the_reference_run(
    normalize: str | None, weights: tuple[float, ...], direction: tuple[float, ...] | None
) -> None:
    actual, along = answer_to(normalize, LOSSES, JACOBIAN)
    assert_near(actual, weights, 1e-6)
    assert_near(along, actual @ JACOBIAN, 1e-15)
    if direction is not None:
        assert_near(along, direction, 2e-6)
    if normalize is None:
        assert float(along.square().sum()) == pytest.approx(0.371471454, abs=1e-9)


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
def test_the_direction_is_not_that_of_the_normalised_gradients(normalize: str) -> None:
    weights, along = answer_to(normalize, LOSSES, JACOBIAN)
    other = weights @ (JACOBIAN / divisors(normalize, LOSSES, JACOBIAN)[:, None])
    assert torch.cosine_similarity(along, other, dim=0) < 0.999


def test_log_takes_log_gradients_on_both_sides() -> None:
    log_jacobian = JACOBIAN / LOSSES[:, None]
    weights, along = answer_to("log", LOSSES, JACOBIAN)
    assert_near(weights, answer_to(None, LOSSES, log_jacobian)[0], 1e-14)
    assert_near(weights, answer_to("loss", LOSSES, JACOBIAN)[0], 1e-14)
    c = 1 / (weights / LOSSES).sum()
    assert_near(along, c * weights @ log_jacobian, 1e-14)


def test_two_tasks_whose_shorter_gradient_is_the_answer() -> None:
    weights, along = answer_to(None, vector((1.0, 1.0)), torch.tensor([[1.0, 1], [3, 1]]).double())
    assert_near(weights, (1.0, 0.0), 1e-15)  # the official code stops at 0.999
    assert_near(along, (1.0, 1.0), 1e-15)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_no_scaled_gradient_conflicts_with_the_shortest_combination(
    normalize: str | None, count: int
) -> None:
    for seed in range(20):
        jacobian, losses = normal(count, 5, seed=seed), normal(count, seed=1000 + seed).exp()
        scaled = jacobian / divisors(normalize, losses, jacobian)[:, None]
        weights, _ = answer_to(normalize, losses, jacobian)
        shortest = weights @ scaled
        slack = scaled @ shortest - shortest.square().sum()
        assert (weights >= 0).all()
        assert slack.min() > -1e-9 * scaled.norm(dim=1).max() ** 2
        assert (weights * slack).abs().max() < 1e-9 * scaled.norm(dim=1).max() ** 2


@pytest.mark.parametrize(
    ("normalize", "indifferent"),
    [(None, False), ("l2", True), ("loss", True), ("loss+", False), ("log", True)],
)
def test_weights_depend_on_the_unit_of_a_loss_as_stated(
    normalize: str | None, indifferent: bool
) -> None:
    units = vector((10.0, 1.0, 0.1))
    plain, _ = answer_to(normalize, LOSSES, JACOBIAN)
    scaled, _ = answer_to(normalize, LOSSES * units, JACOBIAN * units[:, None])
    assert torch.allclose(plain, scaled, rtol=0, atol=1e-9) == indifferent


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_zero_gradient_takes_all_the_weight(normalize: str | None) -> None:
    jacobian = torch.tensor([[1.0, 2], [0, 0], [-1, 1]], dtype=torch.float64)
    weights, along = answer_to(normalize, LOSSES, jacobian)
    assert_near(weights, (0.0, 1.0, 0.0), 1e-15)
    assert_near(along, (0.0, 0.0), 1e-15)


def test_a_float32_gramian_of_nearly_equal_losses_is_solved() -> None:
    gradient, third = normal(2, 1000).float()
    for seed in range(50):
        twin = gradient * (1 + 1e-7 * normal(1000, seed=seed).float())
        jacobian = torch.stack([gradient, twin, third])
        gramian = jacobian @ jacobian.T
        weights = MGDA().weights(statistics_of((1.0, 1.0, 1.0), gramian), {}).weights
        assert_near(weights[0], weights[1], 1e-6)


def test_bounds_follow_the_normalisation() -> None:
    for normalize in NORMALIZATIONS:
        bound = 0.0 if normalize in ("loss", "loss+", "log") else -float("inf")
        assert MGDA(normalize).lower_bounds(names(2)) == [bound, bound]


@pytest.mark.parametrize("normalize", [None, "log"])
def test_every_keeps_the_solution_and_follows_the_losses(normalize: str | None) -> None:
    weighting = MGDA(normalize, every=3)
    first = weighting.weights(
        statistics_of(LOSSES, JACOBIAN @ JACOBIAN.T), initial_state(weighting, 3)
    )
    later = weighting.weights(statistics_of(2 * LOSSES.flip(0), step=1), first.state)
    assert_near(later.weights, first.weights, 1e-15)
    coefficients = first.weights / LOSSES.flip(0) if normalize else first.weights
    assert_near(later.coefficients, coefficients / coefficients.sum(), 1e-15)


def test_losses_that_all_had_weight_zero_count_equally_until_the_next_refresh() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([parameter], lr=0.01), MGDA(every=2))

    def losses(present: str) -> dict[str, Tensor]:
        return {name: {"a": 1, "b": 3, "c": 5}[name] * parameter.sum() for name in present}

    optimizer.step(lambda: losses("abc"))
    assert [float(w) for w in optimizer.metrics.weights.values()] == [1.0, 0.0, 0.0]
    optimizer.step(lambda: losses("bc"))
    assert {name: float(w) for name, w in optimizer.metrics.weights.items()} == {"b": 0.5, "c": 0.5}
    assert parameter.grad.tolist() == [4.0, 4.0]
