"""FAMO against published figures, the optimizers of torch, and its own promises."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from moo_balance import FAMO, BalancedOptimizer, SumLog
from moo_balance.weighting import State, Statistics
from tests.support.statistics import (
    CPU,
    assert_near,
    initial_state,
    names,
    normal,
    statistics_of,
    vector,
)

Pair = tuple[Tensor, Tensor]

PAIRS = [
    (vector(before), vector(after))
    for before, after in (
        ((0.5, 2.0), (0.45, 1.9)),
        ((0.45, 1.9), (0.44, 1.5)),
        ((0.44, 1.5), (0.46, 1.4)),
    )
]


def follow(weighting: FAMO, pairs: Iterable[Pair]) -> tuple[list[Tensor], State]:
    """The logits after each pair of losses before and after a step, and the last state."""
    state, logits = {}, []
    for step, (before, after) in enumerate(pairs):
        state = state or initial_state(weighting, len(before))
        state = weighting.weights(statistics_of(before, step=step), state).state
        if step % weighting.every == 0:
            state = weighting.observe(statistics_of(after, step=step + 1), state)
        logits.append(state["logits"])
    return logits, state


def updates(state: State) -> list[int]:
    """How often each logit was updated: a running average of ones has come to 1 - 0.9^t."""
    actual = torch.log1p(-state["exp_avg_weight"]) / math.log(0.9)
    return [round(count) for count in actual.tolist()]


def random_pairs(count: int, steps: int = 300) -> list[Pair]:
    draws = normal(steps, 2, count).exp()
    return [(before, after) for before, after in draws]


@pytest.mark.parametrize(
    ("weighting", "golden"),
    [
        (FAMO(decay=0.0), (-0.02499998, -0.01106921, 0.00581391)),
        (FAMO(decay=0.01), (-0.02499998, -0.01104620, 0.00585085)),
        (FAMO(decay=0.01, logit_optimizer="sgd"), (-0.00033792, 0.00099914, 0.00170792)),
    ],
    ids=["adam", "adam-decay", "sgd-decay"],
)
def test_logits_are_those_of_the_reference_run(weighting: FAMO, golden: tuple[float, ...]) -> None:
    logits, _ = follow(weighting, PAIRS)
    for actual, expected in zip(logits, golden, strict=True):
        # The reference adds 1e-8 to each loss.
        assert_near(actual, (expected, -expected), 2e-8)


def test_weights_are_those_of_the_reference_run() -> None:
    weighting = FAMO(decay=0.0)
    first = weighting.weights(statistics_of((0.5, 2.0)), initial_state(weighting, 2))
    assert_near(first.weights, (0.5, 0.5), 1e-15)
    assert_near(first.coefficients, (0.8, 0.2), 1e-15)
    _, state = follow(weighting, PAIRS)
    assert_near(
        weighting.weights(statistics_of((0.46, 1.4)), state).weights, (0.50290692, 0.49709308), 1e-8
    )


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("logits", ["adam", "sgd"])
def test_logits_descend_as_a_parameter_under_the_torch_optimizer(logits: str, decay: float) -> None:
    pairs = random_pairs(5)
    xi = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[logits]
    optimizer = kind([xi], lr=0.025, weight_decay=decay)
    actual, _ = follow(FAMO(decay=decay, logit_optimizer=logits), pairs)
    for (before, after), ours in zip(pairs, actual, strict=True):
        optimizer.zero_grad()
        (torch.softmax(xi, 0) @ (before.log() - after.log())).backward()
        optimizer.step()
        assert_near(ours, xi.detach(), 1e-12)


def test_coefficients_are_the_gradient_of_the_renormalised_sum_of_logs() -> None:
    weighting = FAMO(bounds=-0.5)
    logits, losses = normal(4), normal(4, seed=1).exp().requires_grad_()
    answer = weighting.weights(
        statistics_of(losses.detach()), {**initial_state(weighting, 4), "logits": logits}
    )
    z, gaps = torch.softmax(logits, 0), losses + 0.5
    c = 1 / (z / gaps).sum().detach()
    (c * (z * gaps.log()).sum()).backward()
    assert_near(answer.weights, z, 1e-15)
    assert_near(answer.coefficients, losses.grad, 1e-14)


def test_lagged_updates_use_the_losses_of_the_next_batch() -> None:
    sequence = normal(50, 3).exp()
    watched, _ = follow(FAMO(), pairwise(sequence))
    lagged = FAMO(lagged=True)
    assert FAMO().observes_step
    assert not lagged.observes_step
    state = initial_state(lagged, 3)
    for step, losses in enumerate(sequence):
        answer = lagged.weights(statistics_of(losses, step=step), state)
        state = answer.state
        expected = watched[step - 1] if step else torch.zeros(3)
        assert_near(state["logits"], expected, 1e-14)
        assert_near(answer.weights, torch.softmax(expected.double(), 0), 1e-14)


def test_every_updates_in_each_nth_step_and_follows_the_losses_in_between() -> None:
    pairs = random_pairs(3, steps=20)
    sparse, state = follow(FAMO(every=4), pairs)
    dense, _ = follow(FAMO(), pairs[::4])
    for step, logits in enumerate(sparse):
        assert_near(logits, dense[step // 4], 1e-14)
    losses = vector((1.0, 2.0, 3.0))
    answer = FAMO(every=4).weights(statistics_of(losses, step=21), state)
    expected = torch.softmax(state["logits"], 0) / losses
    assert_near(answer.coefficients, expected / expected.sum(), 1e-15)


def test_lagged_with_every_updates_once_in_n_steps() -> None:
    weighting, sequence = FAMO(lagged=True, every=3), normal(10, 2).exp()
    state, seen = initial_state(weighting, 2), []
    for step, losses in enumerate(sequence):
        state = weighting.weights(statistics_of(losses, step=step), state).state
        seen.append(state["logits"])
    expected, _ = follow(FAMO(), pairwise(sequence[::3]))
    for step in range(1, 10):
        assert_near(seen[step], expected[step // 3 - 1] if step >= 3 else torch.zeros(2), 1e-14)


@pytest.mark.parametrize("logits", ["adam", "sgd"])
def test_a_loss_that_falls_faster_than_the_average_loses_weight(logits: str) -> None:
    before, after = vector((3.0, 1.0, 0.2)), vector((1.5, 0.9, 0.19))  # -50 %, -10 %, -5 %
    weighting = FAMO(logit_optimizer=logits)
    actual, _ = follow(weighting, [(before, after)])
    weights = torch.softmax(actual[0], 0)
    assert weights[0] < 1 / 3 < min(weights[1], weights[2])


def test_weights_do_not_depend_on_the_unit_of_a_loss() -> None:
    units = vector((1e-6, 1.0, 1e6))
    pairs = random_pairs(3, steps=50)
    plain, state = follow(FAMO(), pairs)
    scaled, _ = follow(FAMO(), [(before * units, after * units) for before, after in pairs])
    for one, other in zip(plain, scaled, strict=True):
        assert_near(one, other, 1e-10)  # Adam divides the rounding of small differences by itself
    losses = normal(3).exp()
    one = FAMO().weights(statistics_of(losses), state).coefficients
    other = FAMO().weights(statistics_of(losses * units), state).coefficients * units
    assert_near(one, other / other.sum(), 1e-14)


def test_bounds_and_shift_by_name_move_the_losses() -> None:
    moved = FAMO(bounds={"a": -2.0, "c": 0.1}, shift={"b": 0.5})
    offset = vector((2.0, 0.5, -0.1))
    pairs = [(before + 1, after + 1) for before, after in random_pairs(3, steps=20)]
    assert moved.lower_bounds(names(3)) == [-2.0, -0.5, 0.1]
    actual, state = follow(moved, pairs)
    expected, _ = follow(FAMO(), [(before + offset, after + offset) for before, after in pairs])
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, 1e-12)
    losses = vector((1.0, 2.0, 3.0))
    z = torch.softmax(state["logits"], 0)
    expected_coefficients = z / (losses + offset)
    assert_near(
        moved.weights(statistics_of(losses), state).coefficients,
        expected_coefficients / expected_coefficients.sum(),
        1e-15,
    )


def test_the_logit_of_an_absent_loss_is_kept_and_the_others_are_updated() -> None:
    parameter = nn.Parameter(vector((1.0, 2.0, 3.0)))
    optimizer = BalancedOptimizer(torch.optim.SGD([parameter], lr=0.01), FAMO())

    def step(present: str) -> State:
        optimizer.step(
            lambda: {name: parameter["abc".index(name)].square() + 1 for name in present}
        )
        return optimizer.state_dict()["balance"]["state"]

    step("abc")
    before = step("abc")
    after = step("ac")
    for key, value in after.items():
        assert torch.equal(value[1], before[key][1]), key
        assert not torch.equal(value[[0, 2]], before[key][[0, 2]]), key
    assert set(optimizer.metrics.coefficients) == {"a", "c"}
    total = sum(optimizer.metrics.coefficients.values())
    assert_near(total, vector((1.0,))[0], 1e-15)
    assert updates(step("abc")) == [4, 3, 4]


def test_lagged_updates_a_loss_only_once_it_was_present_before() -> None:
    weighting = FAMO(lagged=True, decay=0.0)
    state = initial_state(weighting, 3)
    pair = {key: value[:2] for key, value in state.items()}
    for step, losses in enumerate(((1.0, 2.0), (0.5, 1.9))):
        pair = weighting.weights(statistics_of(losses, step=step), pair).state
    joined = {key: torch.cat([pair[key], state[key][2:]]) for key in state}
    after = weighting.weights(statistics_of((0.25, 1.8, 7.0), step=2), joined).state
    without = weighting.weights(statistics_of((0.25, 1.8), step=2), pair).state
    assert_near(after["logits"][:2], without["logits"], 1e-15)
    assert after["logits"][2] == 0.0
    assert updates(after) == [2, 2, 0]
    assert_near(after["log_distances"], vector((0.25, 1.8, 7.0)).log(), 1e-15)


def two_bowls(theta: Tensor) -> dict[str, Tensor]:
    a = (theta - vector((1.0, 0.0))).square().sum() + 2.0
    b = 4 * (theta - vector((-1.0, 0.5))).square().sum() + 3.0
    return {"a": a, "b": b}


def final_point(weighting: FAMO | SumLog, steps: int) -> Tensor:
    theta = nn.Parameter(vector((0.3, 0.7)))
    optimizer = BalancedOptimizer(torch.optim.SGD([theta], lr=0.02), weighting)
    for _ in range(steps):
        optimizer.step(lambda: two_bowls(theta))
    return theta.detach()


def test_famo_ends_where_the_sum_of_logs_ends_only_with_decay() -> None:
    end = final_point(SumLog(floor=0), 400)
    decayed = final_point(FAMO(decay=0.1, logit_optimizer="sgd", lr=2.0), 1000)
    assert torch.dist(decayed, end) < 1e-4
    free = final_point(FAMO(decay=0.0, logit_optimizer="sgd", lr=2.0), 1000)
    assert torch.dist(free, end) > 0.1


def test_the_sum_of_logs_ends_at_its_own_stationary_point() -> None:
    theta = final_point(SumLog(floor=0), 400).requires_grad_()
    sum(loss.log() for loss in two_bowls(theta).values()).backward()
    assert theta.grad.norm() < 1e-6


def test_a_state_has_an_entry_per_loss_and_starts_uniform() -> None:
    state = FAMO().init(("a", "b", "c"), CPU)
    assert {key: tuple(value.shape) for key, value in state.items()} == dict.fromkeys(
        (
            *("logits", "log_distances"),
            *("exp_avg", "exp_avg_weight", "exp_avg_sq", "exp_avg_sq_weight"),
        ),
        (3,),
    )
    assert set(FAMO(logit_optimizer="sgd").init(("a",), CPU)) == {"logits", "log_distances"}
    answer = FAMO().weights(Statistics(("a", "b", "c"), torch.ones(3)), state)
    assert_near(answer.weights, (1 / 3,) * 3, 1e-7)
