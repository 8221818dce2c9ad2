"""``preference``: what a method makes equal is made proportional to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moo_balance import FAMO, MGDA, AnalyticQP, BalancedTrajectory, SumLog
from moo_balance.weighting import Statistics
from tests.support.statistics import initial_state, names, statistics_of, vector

PREFERENCE = {"a": 1.0, "b": 2.0, "c": 4.0}
SHARES = vector((1.0, 2.0, 4.0)) / 7.0
EQUAL = dict.fromkeys("abc", 3.0)
METHODS = [
    (SumLog, {}),
    (SumLog, {"renormalize": False}),
    (FAMO, {"lr": 0.5}),
    (FAMO, {"lr": 0.5, "logit_optimizer": "sgd"}),
    (BalancedTrajectory, {}),
    (MGDA, {}),
    (MGDA, {"normalize": "loss+"}),
    (MGDA, {"normalize": "log"}),
    (AnalyticQP, {}),
    (AnalyticQP, {"projection": "simplex"}),
    (AnalyticQP, {"projection": "exact", "renormalize": False}),
]


def problem(seed: int, conflicting: bool = False) -> tuple[Tensor, Tensor]:
    """Losses of three, and gradients that point into one half-space unless they may conflict."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    rows = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    return losses, rows if conflicting else 0.3 * rows + torch.eye(3, 8, dtype=torch.float64)


@pytest.mark.parametrize(("cls", "arguments"), METHODS)
def test_equal_preferences_change_nothing(cls, arguments) -> None:
    plain, equal = cls(**arguments), cls(**arguments, preference=EQUAL)
    state, other = initial_state(plain, 3), initial_state(equal, 3)
    for seed in range(4):
        losses, rows = problem(seed, conflicting=True)
        statistics = statistics_of(losses, rows @ rows.T)
        expected, actual = plain.weights(statistics, state), equal.weights(statistics, other)
        torch.testing.assert_close(actual.weights, expected.weights, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            actual.coefficients, expected.coefficients, rtol=1e-12, atol=1e-15
        )
        state, other = expected.state, actual.state
        if plain.observes_step:
            after = statistics_of(losses * vector((0.9, 0.8, 0.99)), None)
            state, other = plain.observe(after, state), equal.observe(after, other)


def test_sum_log_weights_are_the_preference() -> None:
    losses, _ = problem(0)
    weights, coefficients, _ = SumLog(preference=PREFERENCE).weights(statistics_of(losses), {})
    torch.testing.assert_close(weights, SHARES)
    torch.testing.assert_close(coefficients, SHARES / losses / (SHARES / losses).sum())
    raw = SumLog(preference=PREFERENCE, renormalize=False).weights(statistics_of(losses), {})
    torch.testing.assert_close(raw.coefficients, 3 * SHARES / losses)


@pytest.mark.parametrize("seed", range(5))
def test_mgda_improves_losses_in_proportion_to_their_preference(seed: int) -> None:
    for conflicting in (False, True):
        losses, rows = problem(seed, conflicting)
        answer = MGDA(preference=PREFERENCE).weights(statistics_of(losses, rows @ rows.T), {})
        along = rows @ (answer.coefficients @ rows)
        rates = along / SHARES
        least = rates.amin()
        assert float(answer.coefficients.sum()) == pytest.approx(1.0, rel=1e-12)
        assert float(least) > 0.0
        has_weight = answer.weights > 1e-9
        torch.testing.assert_close(
            rates[has_weight], least.expand(int(has_weight.sum())), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "method",
    [
        MGDA("log", preference=PREFERENCE),
        AnalyticQP("simplex", shift=0.0, preference=PREFERENCE),
        AnalyticQP("exact", shift=0.0, preference=PREFERENCE),
    ],
    ids=repr,
)
def test_relative_rates_are_in_proportion_to_the_preference(method, seed: int) -> None:
    losses, rows = problem(seed)
    answer = method.weights(statistics_of(losses, rows @ rows.T), {})
    rates = rows @ (answer.coefficients @ rows) / losses / SHARES
    assert bool((answer.weights > 0.0).all())
    torch.testing.assert_close(rates, rates.mean().expand(3), rtol=1e-8, atol=0)


def test_the_softmax_leaves_the_preference_where_it_is() -> None:
    """Orthogonal log gradients of equal length, whose rates are their weights."""
    gramian = torch.eye(3, dtype=torch.float64)
    statistics = statistics_of(torch.ones(3, dtype=torch.float64), gramian)
    weights = AnalyticQP(shift=0.0, preference=PREFERENCE).weights(statistics, {}).weights
    exact = AnalyticQP("exact", shift=0.0, preference=PREFERENCE).weights(statistics, {}).weights
    torch.testing.assert_close(exact, SHARES)
    torch.testing.assert_close(weights, SHARES)


@pytest.mark.parametrize(("logit_optimizer", "lr"), [("adam", 0.05), ("sgd", 3000.0)])
def test_famo_comes_to_rates_in_proportion_to_the_preference(
    logit_optimizer: str, lr: float
) -> None:
    """Losses exp(k x) of parameters of their own, each of which falls by what its weight gives."""
    method = FAMO(lr, decay=0.0, logit_optimizer=logit_optimizer, preference=PREFERENCE)
    slopes, point = vector((1.0, 1.5, 0.8)), vector((1.0, 2.0, 0.5))
    state = initial_state(method, 3)
    for step in range(600):
        losses = (slopes * point).exp()
        weights, coefficients, state = method.weights(statistics_of(losses, step=step), state)
        if step == 0:
            torch.testing.assert_close(weights, SHARES)
        point = point - 1e-4 * coefficients * slopes * losses
        after = (slopes * point).exp()
        state = method.observe(statistics_of(after, step=step + 1), state)
    rates = losses.log() - after.log()
    torch.testing.assert_close(rates / rates.sum(), SHARES, rtol=0.05, atol=0)


def test_with_decay_famo_stays_where_sum_log_is() -> None:
    losses, _ = problem(1)
    method = FAMO(decay=1e6, lr=1e-9, logit_optimizer="sgd", preference=PREFERENCE)
    state = initial_state(method, 3)
    for factor in (1.0, 0.5, 0.3):
        statistics = statistics_of(losses * factor)
        weights, coefficients, state = method.weights(statistics, state)
        state = method.observe(statistics_of(losses * vector((0.9, 0.5, 0.1))), state)
    expected = SumLog(preference=PREFERENCE).weights(statistics, {})
    torch.testing.assert_close(weights, expected.weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(coefficients, expected.coefficients, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("cls", "arguments"), METHODS)
def test_absent_losses_leave_the_ratio_of_the_others(cls, arguments) -> None:
    method = cls(**arguments, preference=PREFERENCE)
    pair = cls(**arguments, preference={"a": 1.0, "c": 4.0})
    losses, rows = problem(3)
    gramian = rows @ rows.T
    chosen = [0, 2]
    part = Statistics(("a", "c"), losses[chosen], gramian[chosen][:, chosen])
    state = {key: value[chosen] for key, value in initial_state(method, 3).items()}
    actual = method.weights(part, state)
    expected = pair.weights(part, pair.init(("a", "c"), torch.device("cpu")))
    torch.testing.assert_close(actual.coefficients, expected.coefficients, rtol=1e-12, atol=0)


def test_names_of_the_problem_are_those_of_the_preference() -> None:
    assert names(3) == tuple(PREFERENCE)
