"""The moving average: the formula, its rules, and what it leaves to the method inside."""

from __future__ import annotations

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    BalanceValueError,
    FixedWeights,
    MovingAverage,
    RandomWeights,
    Rescaled,
    Sequential,
    Sum,
    SumLog,
    WithConstant,
)
from moo_balance.weighting import State, Weighting
from tests.support.problems import Scene, play
from tests.support.registry import NAMES
from tests.support.statistics import assert_near, initial_state, normal, statistics_of, vector


def answers(weighting: Weighting, seed: int = 0, steps: int = 6) -> torch.Tensor:
    return torch.stack(
        [a.coefficients for a in play(weighting, Scene.random(seed=seed, steps=steps))]
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("inner", [MGDA(), RandomWeights(seed=2), FAMO(lr=1.0)], ids=repr)
def test_a_fixed_momentum_is_the_moving_average(inner: Weighting, beta: float) -> None:
    raw = answers(inner)
    expected = [raw[0]]
    for wanted in raw[1:]:
        expected.append(beta * expected[-1] + (1 - beta) * wanted)
    assert_near(answers(MovingAverage(inner, beta)), torch.stack(expected), 1e-14)


def test_the_adaptive_rule_averages_the_more_the_less_weights_move() -> None:
    raw = answers(MGDA())
    expected = [raw[0]]
    for count, wanted in enumerate(raw[1:], start=2):
        beta = max(0.0, 1.0 - count * float((wanted - expected[-1]).abs().sum()))
        expected.append(beta * expected[-1] + (1 - beta) * wanted)
    assert_near(answers(MovingAverage(MGDA(), "adaptive")), torch.stack(expected), 1e-14)


def test_the_adaptive_rule_follows_a_large_change_at_once_and_averages_a_small_one() -> None:
    weighting = MovingAverage(MGDA(), "adaptive")
    gramians = [torch.diag(vector(d)) for d in ((1.0, 1.0), (9.0, 1.0), (9.1, 1.0))]
    state, seen = initial_state(weighting, 2), []
    for step, gramian in enumerate(gramians):
        answer = weighting.weights(statistics_of([1.0, 1.0], gramian, step), state)
        state, seen = answer.state, [*seen, answer.coefficients]
    assert_near(seen[1], (0.1, 0.9), 1e-15)
    raw = 1 / 10.1
    moved = 3 * 2 * (0.1 - raw)
    assert_near(seen[2][:1], [(1 - moved) * 0.1 + moved * raw], 1e-15)


def test_coefficients_sum_to_what_those_of_the_method_sum_to() -> None:
    inner = SumLog(renormalize=False)
    raw, smoothed = answers(inner), answers(MovingAverage(inner))
    assert_near(smoothed.sum(1), raw.sum(1), 1e-14)
    assert not torch.allclose(smoothed[1:], raw[1:], rtol=1e-2)


@pytest.mark.parametrize("values", [(1.0, -0.5, 3.0), (1.0, -1.0, 0.0), (0.0, 0.0, 0.0)])
def test_constant_weights_are_not_changed(values: tuple[float, ...]) -> None:
    inner = FixedWeights(dict(zip(NAMES, values, strict=True)))
    assert_near(answers(MovingAverage(inner)), answers(inner), 1e-15)


def test_present_losses_divide_the_whole_and_an_absent_one_keeps_its_share() -> None:
    weighting = MovingAverage(MGDA(), 0.5)
    state: State = {"shares": vector([0.1, 0.3])}  # of "a" and "b"; "c" is away
    answer = weighting.weights(statistics_of([1.0, 1.0], torch.eye(2).double(), 4), state)
    assert_near(answer.coefficients, (0.375, 0.625), 1e-15)


def test_a_new_loss_starts_from_the_coefficients_of_the_method() -> None:
    weighting = MovingAverage(MGDA(), 0.5)
    state: State = {"shares": vector([1.0, float("nan")])}
    answer = weighting.weights(statistics_of([1.0, 1.0], torch.eye(2).double(), 4), state)
    assert_near(answer.coefficients, (7 / 12, 5 / 12), 1e-15)  # (1, 1/2) is two to one


def test_the_method_inside_keeps_its_state_needs_and_bounds() -> None:
    inner = FAMO(bounds=-1.0, every=2)
    weighting = MovingAverage(inner)
    state = initial_state(weighting, 3)
    assert set(state) == {"shares", *(f"inner/{key}" for key in initial_state(inner, 3))}
    assert weighting.observes_step
    assert weighting.every == 2
    assert not weighting.uses_gramian
    assert weighting.needs(0).method.lower_bounds("abc") == [-1.0] * 3
    assert MovingAverage(MGDA(every=3)).uses_gramian
    assert not MovingAverage(RandomWeights()).uses_losses


def test_moving_averages_can_be_nested() -> None:
    state = initial_state(MovingAverage(MovingAverage(FAMO(lagged=True))), 2)
    assert "inner/inner/logits" in state


def test_the_moving_average_agrees_with_torchjd() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    ours, theirs = MovingAverage(MGDA(), 0.9), torchjd.CRMOGMWeighting(torchjd.MGDAWeighting(), 0.9)
    state = initial_state(ours, 2)
    for step in range(5):
        rows = normal(2, 7, seed=step)
        answer = ours.weights(statistics_of([1.0, 1.0], rows @ rows.T, step), state)
        state = answer.state
        assert_near(answer.coefficients, theirs(rows @ rows.T), 1e-2)  # theirs stops early


def test_a_rescaled_method_is_refused_at_any_depth():
    phases = Sequential([Rescaled(MGDA()), Sum()], [5])
    for method in (Rescaled(MGDA()), WithConstant(Rescaled(MGDA()), {"c": 1.0}), phases):
        with pytest.raises(BalanceValueError, match=r"no Rescaled in it.*Found .*Rescaled\(MGDA\)"):
            MovingAverage(method)
