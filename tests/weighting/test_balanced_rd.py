"""Both solutions of Balanced R-D against published figures and the explicit formulae."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moo_balance import FAMO, MGDA, AnalyticQP, BalancedTrajectory
from moo_balance.functional import project_simplex
from tests.support.statistics import (
    assert_near,
    initial_state,
    names,
    normal,
    statistics_of,
    vector,
)

PAIRS = [
    ((0.5, 2.0), (0.45, 1.8)),
    ((0.45, 1.8), (0.44, 1.5)),
    ((0.44, 1.5), (0.46, 1.4)),
]
JACOBIAN = torch.tensor([[1, 2, 0, -1], [0, -1, 1, 0.5], [-2, 0.5, 0.3, 1]], dtype=torch.float64)
LOSSES = vector((0.5, 2.0, 0.1))
TWO = torch.tensor([[2.0, 4.0], [4.0, 10.0]], dtype=torch.float64)  # of (1, 1) and (3, 1)


# ---------------------------------------------------------------------- BalancedTrajectory


@pytest.mark.parametrize(
    ("weighting", "golden"),
    [
        (BalancedTrajectory(decay=3e-3), (0.02499997, 0.04792268, 0.07082399)),
        (BalancedTrajectory(logit_optimizer="sgd"), (0.00021932, 0.00088437, 0.00122569)),
    ],
    ids=["code", "paper"],
)
def test_trajectory_logits_are_those_of_the_reference_run(
    weighting: BalancedTrajectory, golden: tuple[float, ...]
) -> None:
    state = initial_state(weighting, 2)
    for step, ((before, after), xi) in enumerate(zip(PAIRS, golden, strict=True)):
        state = weighting.weights(statistics_of(before, step=step), state).state
        state = weighting.observe(statistics_of(after, step=step + 1), state)
        assert_near(state["logits"], (xi, -xi), 2e-8)
    if weighting.logit_optimizer == "adam":
        answer = weighting.weights(statistics_of((0.46, 1.4)), state)
        assert_near(answer.weights, (0.53535290, 0.46464710), 1e-8)
        assert_near(answer.coefficients, (0.65445507, 0.34554493), 1e-8)


def test_the_first_step_of_a_trajectory_divides_by_the_shifted_losses() -> None:
    weighting = BalancedTrajectory()
    answer = weighting.weights(statistics_of((0.5, 2.0)), initial_state(weighting, 2))
    assert_near(answer.coefficients, (2 / 3, 1 / 3), 1e-15)


@pytest.mark.parametrize("arguments", [{}, {"logit_optimizer": "sgd", "lr": 1.0}, {"lagged": True}])
def test_a_trajectory_is_famo_on_shifted_losses(arguments: dict[str, object]) -> None:
    one, other = BalancedTrajectory(shift=0.7, **arguments), FAMO(shift=0.7, **arguments)
    states = [initial_state(one, 3), initial_state(other, 3)]
    assert one.lower_bounds(names(3)) == other.lower_bounds(names(3)) == [-0.7] * 3
    assert one.observes_step == other.observes_step
    for step, (before, after) in enumerate(normal(30, 2, 3).exp()):
        answers = [
            weighting.weights(statistics_of(before, step=step), state)
            for weighting, state in zip((one, other), states, strict=True)
        ]
        assert torch.equal(answers[0].coefficients, answers[1].coefficients)
        states = [
            weighting.observe(statistics_of(after, step=step + 1), answer.state)
            for weighting, answer in zip((one, other), answers, strict=True)
        ]


# ---------------------------------------------------------------------- AnalyticQP


def test_softmax_of_the_log_qp_is_that_of_the_reference_run() -> None:
    gramian = JACOBIAN @ JACOBIAN.T
    answer = AnalyticQP().weights(statistics_of(LOSSES, gramian), {})
    assert_near(answer.weights, (0.281236, 0.476391, 0.242372), 1e-6)
    assert_near(answer.coefficients, (0.330890, 0.280250, 0.388860), 1e-6)
    # With the solution inside the simplex, projecting it changes nothing.
    for projection in ("simplex", "exact"):
        answer = AnalyticQP(projection=projection).weights(statistics_of(LOSSES, gramian), {})
        assert_near(answer.weights, (0.207226, 0.734270, 0.058504), 1e-6)


@pytest.mark.parametrize(
    ("projection", "expected"),
    [("softmax", (0.880797, 0.119203)), ("simplex", (1.0, 0.0)), ("exact", (1.0, 0.0))],
)
def test_two_tasks_whose_solution_leaves_the_simplex(
    projection: str, expected: tuple[float, float]
) -> None:
    weighting = AnalyticQP(projection=projection, shift=0.0)
    assert_near(weighting.weights(statistics_of((1.0, 1.0), TWO), {}).weights, expected, 1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_analytic_qp_is_the_explicit_inverse(count: int, shift: float) -> None:
    jacobian, losses = normal(count, 9), normal(count, seed=1).exp()
    log_jacobian = jacobian / (losses + shift)[:, None]
    solved = torch.linalg.inv(log_jacobian @ log_jacobian.T).sum(1)
    affine = solved / solved.sum()
    statistics = statistics_of(losses, jacobian @ jacobian.T)
    for projection, weights in (
        ("softmax", torch.softmax(affine, 0)),
        ("simplex", project_simplex(affine)),
    ):
        answer = AnalyticQP(projection, shift).weights(statistics, {})
        assert_near(answer.weights, weights, 1e-12)
        # c times the weighted sum of log gradients. (One published implementation takes raw
        # gradients here.)
        c = 1 / (weights / (losses + shift)).sum()
        assert_near(answer.coefficients @ jacobian, c * weights @ log_jacobian, 1e-12)
        assert_near(answer.coefficients.sum(), vector((1.0,))[0], 1e-14)
        raw = AnalyticQP(projection, shift, renormalize=False).weights(statistics, {})
        assert_near(raw.coefficients @ jacobian, weights @ log_jacobian, 1e-12)


def test_exact_analytic_qp_is_mgda_on_log_gradients() -> None:
    for seed in range(20):
        jacobian, losses = normal(4, 5, seed=seed), normal(4, seed=100 + seed).exp()
        statistics = statistics_of(losses, jacobian @ jacobian.T)
        one = AnalyticQP(projection="exact", shift=0.0).weights(statistics, {})
        other = MGDA(normalize="log").weights(statistics, {})
        assert_near(one.weights, other.weights, 1e-14)
        assert_near(one.coefficients, other.coefficients, 1e-14)


@given(st.floats(-1.0, 1.0), st.floats(0.1, 10.0))
@settings(max_examples=50, deadline=None)
def test_softmax_keeps_both_of_two_weights_above_a_quarter(cosine: float, ratio: float) -> None:
    cross = min(cosine * ratio, 1.0, ratio**2)  # so that the solution is inside the simplex
    gramian = torch.tensor([[1.0, cross], [cross, ratio**2]], dtype=torch.float64)
    weights = AnalyticQP(shift=0.0).weights(statistics_of((1.0, 1.0), gramian), {}).weights
    assert weights.min() >= 0.2689


@pytest.mark.parametrize("projection", ["softmax", "simplex", "exact"])
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]],
        [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]],
        [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
        [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[0.0, 0.0], [1.0, 1.0]],
        [[1.0, 1.0]],
    ],
    ids=["equal", "parallel", "opposed", "one-zero", "zeros", "pair", "zero-pair", "single"],
)
def test_degenerate_gradients_have_weights(projection: str, rows: list[list[float]]) -> None:
    jacobian = torch.tensor(rows, dtype=torch.float64)
    answer = AnalyticQP(projection).weights(
        statistics_of([1.0] * len(rows), jacobian @ jacobian.T), {}
    )
    assert (answer.weights >= 0).all()
    assert_near(answer.weights.sum(), vector((1.0,))[0], 1e-12)
    assert torch.isfinite(answer.coefficients).all()


@pytest.mark.parametrize("projection", ["softmax", "simplex", "exact"])
def test_rounding_of_a_float32_gramian_does_not_decide_between_equal_losses(
    projection: str,
) -> None:
    gradient, third = normal(2, 1000).float()
    for seed in range(20):
        twin = gradient * (1 + 1e-7 * normal(1000, seed=seed).float())
        jacobian = torch.stack([gradient, twin, third])
        answer = AnalyticQP(projection).weights(
            statistics_of((1.0, 1.0, 1.0), jacobian @ jacobian.T), {}
        )
        assert_near(answer.weights[0], answer.weights[1], 1e-6)
        assert answer.weights[2] > 0.3


def test_every_keeps_the_solution_and_follows_the_losses() -> None:
    jacobian = normal(3, 5)
    weighting = AnalyticQP(every=4)
    first = weighting.weights(
        statistics_of(LOSSES, jacobian @ jacobian.T), initial_state(weighting, 3)
    )
    later = weighting.weights(statistics_of(2 * LOSSES, step=1), first.state)
    assert_near(later.weights, first.weights, 1e-15)
    expected = first.weights / (2 * LOSSES + 1)
    assert_near(later.coefficients, expected / expected.sum(), 1e-15)
