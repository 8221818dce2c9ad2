"""The Tchebycheff family against published figures, autograd and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalancedOptimizer, OnlineTchebycheff, SmoothTchebycheff, Tchebycheff
from moo_balance.weighting import State, Weighting
from tests.support.statistics import (
    assert_near,
    initial_state,
    names,
    normal,
    statistics_of,
    vector,
)

LOSSES = vector((0.5, 2.0, 0.1))
PREFERENCE = {"a": 1.0, "b": 2.0, "c": 5.0}
IDEAL = {"a": -1.0, "c": 0.05}
NADIR = {"a": 1.0, "b": 4.0, "c": 0.5}


def coefficients(weighting: Weighting, losses: Tensor, state: State | None = None) -> Tensor:
    state = initial_state(weighting, len(losses)) if state is None else state
    answer = weighting.weights(statistics_of(losses), state)
    assert_near(answer.weights, answer.coefficients / answer.coefficients.sum(), 1e-15)
    return answer.coefficients


def gradient(value: Tensor, losses: Tensor) -> Tensor:
    return torch.autograd.grad(value, losses)[0]


# ---------------------------------------------------------------------- Tchebycheff


def test_only_the_worst_loss_counts_and_with_its_preference() -> None:
    assert_near(coefficients(Tchebycheff(), LOSSES), (0.0, 1 / 3, 0.0), 1e-15)
    weighted = Tchebycheff(preference={"a": 8.0, "b": 1.0, "c": 1.0})
    assert_near(coefficients(weighted, LOSSES), (0.8, 0.0, 0.0), 1e-15)


@pytest.mark.parametrize("augment", [0.0, 0.1])
def test_coefficients_are_the_gradient_of_the_maximum(augment: float) -> None:
    weighting = Tchebycheff(PREFERENCE, IDEAL, augment)
    for seed in range(20):
        losses = normal(3, seed=seed).requires_grad_()
        distance = vector((1 / 8, 2 / 8, 5 / 8)) * (losses - vector((-1.0, 0.0, 0.05)))
        expected = gradient(distance.max() + augment * distance.sum(), losses)
        assert_near(coefficients(weighting, losses.detach()), expected, 1e-15)


def test_ties_share_equally() -> None:
    assert_near(coefficients(Tchebycheff(), vector((1.0, 1.0, 0.5))), (1 / 6, 1 / 6, 0.0), 1e-15)


def test_a_running_ideal_is_the_least_value_so_far() -> None:
    weighting = Tchebycheff(ideal="running")
    state, least = initial_state(weighting, 3), np.full(3, np.inf)
    for step, losses in enumerate(normal(30, 3, seed=3)):
        answer = weighting.weights(statistics_of(losses, step=step), state)
        state, least = answer.state, np.minimum(least, losses.numpy())
        assert np.array_equal(state["ideal"].numpy(), least)
        distance = losses.numpy() - least
        expected = (distance == distance.max()) / (distance == distance.max()).sum() / 3
        assert_near(answer.coefficients, torch.from_numpy(expected), 1e-15)


# ---------------------------------------------------------------------- SmoothTchebycheff


@pytest.mark.parametrize(
    ("mu", "value", "golden"),
    [
        (1.0, 1.426233, (0.094592, 0.155956, 0.082785)),
        (0.1, 0.667514, (0.002227, 0.330519, 0.000587)),
        (0.01, 0.666667, (0.0, 0.333333, 0.0)),
    ],
)
def test_linear_form_is_that_of_the_reference_run(
    mu: float, value: float, golden: tuple[float, ...]
) -> None:
    losses = LOSSES.clone().requires_grad_()
    smooth = mu * torch.logsumexp(losses / 3 / mu, 0)
    assert smooth.item() == pytest.approx(value, abs=1e-6)
    actual = coefficients(SmoothTchebycheff(mu), LOSSES)
    assert_near(actual, golden, 1e-6)
    assert_near(actual, gradient(smooth, losses), 1e-15)


@pytest.mark.parametrize(
    ("mu", "value", "golden"),
    [
        (1.0, 0.546965, (2.5, 0.625, 5.0)),
        (0.5, -0.924279, (2.777778, 0.694444, 2.222222)),
        (0.1, None, (2.999843, 0.749961, 0.001573)),
    ],
)
def test_log_form_is_that_of_the_reference_run(
    mu: float, value: float | None, golden: tuple[float, ...]
) -> None:
    losses = LOSSES.clone().requires_grad_()
    smooth = 3 * mu * torch.logsumexp((losses / vector((1.0, 4.0, 0.5))).log() / mu, 0)
    if value is not None:
        assert smooth.item() == pytest.approx(value, abs=1e-6)
    actual = coefficients(SmoothTchebycheff(mu, nadir=NADIR, log=True), LOSSES)
    assert_near(actual, golden, 1e-6)
    assert_near(actual, gradient(smooth, losses), 1e-14)


@pytest.mark.parametrize("mu", [2.0, 0.3, 0.02])
@pytest.mark.parametrize("nadir", [None, NADIR, 3.0], ids=["none", "named", "one"])
@pytest.mark.parametrize("log", [False, True])
def test_coefficients_are_the_gradient_of_the_formula(
    log: bool, nadir: dict[str, float] | float | None, mu: float
) -> None:
    weighting = SmoothTchebycheff(mu, PREFERENCE, IDEAL, nadir, log=log)
    preference, ideal = vector((1 / 8, 2 / 8, 5 / 8)), vector((-1.0, 0.0, 0.05))
    top = {None: ideal + 1, 3.0: vector((3.0,) * 3)}.get(
        nadir if not isinstance(nadir, dict) else "", vector(NADIR.values())
    )
    for seed in range(5):
        losses = (normal(3, seed=seed).exp() + 0.1).requires_grad_()
        relative = (losses - ideal) / (top - ideal)
        if log:
            value = 3 * mu * torch.logsumexp(3 * preference * relative.log() / mu, 0)
        else:
            value = mu * torch.logsumexp(preference * relative / mu, 0)
        expected = gradient(value, losses)
        torch.testing.assert_close(
            coefficients(weighting, losses.detach()), expected, rtol=1e-12, atol=1e-15
        )


def test_small_mu_is_the_maximum_and_large_mu_the_weighted_sum() -> None:
    hard = coefficients(Tchebycheff(PREFERENCE), LOSSES)
    assert_near(coefficients(SmoothTchebycheff(1e-4, PREFERENCE), LOSSES), hard, 1e-12)
    flat = coefficients(SmoothTchebycheff(1e6, PREFERENCE), LOSSES)
    assert_near(flat / flat.sum(), (1 / 8, 2 / 8, 5 / 8), 1e-6)


@pytest.mark.parametrize("log", [False, True])
def test_the_warm_up_sums_logs_and_measures_the_mean_as_nadir(log: bool) -> None:
    weighting = SmoothTchebycheff(mu=0.5, warmup_steps=6, log=log, ideal=-0.5)
    sequence, state = normal(8, 3).exp(), initial_state(weighting, 3)
    for step, losses in enumerate(sequence[:6]):
        answer = weighting.weights(statistics_of(losses, step=step), state)
        state = answer.state
        assert_near(answer.coefficients, 1 / (losses + 0.5), 1e-15)
        assert_near(answer.weights, (1 / 3,) * 3, 1e-15)
    mean = np.mean(sequence[:6].numpy(), axis=0)
    expected = SmoothTchebycheff(
        mu=0.5, nadir=dict(zip(names(3), mean.tolist(), strict=True)), log=log, ideal=-0.5
    )
    for step, losses in enumerate(sequence[6:], start=6):
        answer = weighting.weights(statistics_of(losses, step=step), state)
        assert_near(answer.coefficients, coefficients(expected, losses), 1e-13)
        assert all(torch.equal(answer.state[key], state[key]) for key in state)


def test_the_warm_up_averages_each_loss_over_the_steps_that_had_it() -> None:
    parameter = nn.Parameter(vector((1.0, 2.0, 3.0)))
    optimizer = BalancedOptimizer(
        torch.optim.SGD([parameter], lr=0.05),
        SmoothTchebycheff(warmup_steps=4),
        loss_names=["a", "b", "c"],
    )
    seen: dict[str, list[float]] = {"a": [], "b": [], "c": []}

    def step(present: str) -> None:
        losses = {name: parameter["abc".index(name)].square() + 1 for name in present}
        for name, loss in losses.items():
            seen[name].append(float(loss.detach()))
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()

    for present in ("ab", "a", "ab", "b"):
        step(present)
    nadir = optimizer.state_dict()["balance"]["state"]["nadir"]
    assert_near(nadir, (np.mean(seen["a"]), np.mean(seen["b"]), 0.0), 1e-14)
    # One that was never there counts from its own value: it stands at distance one.
    step("abc")
    now = parameter.new_tensor([seen[name][-1] for name in "abc"])
    top = vector((np.mean(seen["a"][:3]), np.mean(seen["b"][:3]), seen["c"][0]))
    expected = torch.softmax(now / top / 3 / 0.1, 0) / 3 / top
    actual = torch.stack(list(optimizer.metrics.coefficients.values()))
    assert_near(actual, expected, 1e-14)


def test_a_logarithm_needs_losses_above_their_ideal() -> None:
    assert SmoothTchebycheff().lower_bounds(names(2)) == [-math.inf, -math.inf]
    for weighting in (
        SmoothTchebycheff(log=True, ideal={"b": 0.5}),
        SmoothTchebycheff(warmup_steps=3, ideal={"b": 0.5}),
    ):
        assert weighting.lower_bounds(names(2)) == [0.0, 0.5]


# ---------------------------------------------------------------------- OnlineTchebycheff


@pytest.mark.parametrize(
    ("update", "golden"), [("mirror", (0.481259, 0.518741)), ("projected", (0.4625, 0.5375))]
)
def test_the_first_online_update_is_that_of_the_reference_run(
    update: str, golden: tuple[float, float]
) -> None:
    weighting = OnlineTchebycheff(update=update)
    first = weighting.weights(statistics_of((0.5, 2.0)), initial_state(weighting, 2))
    assert_near(first.weights, (0.5, 0.5), 1e-15)  # those from before the first losses
    assert_near(first.coefficients, (0.25, 0.25), 1e-15)
    second = weighting.weights(statistics_of((0.5, 2.0)), first.state)
    assert_near(second.weights, golden, 1e-6)


@pytest.mark.parametrize("update", ["mirror", "projected"])
def test_online_weights_follow_the_textbook_ascent(update: str) -> None:
    weighting = OnlineTchebycheff(0.3, update, PREFERENCE)
    state, weights = initial_state(weighting, 3), np.full(3, 1 / 3)
    preference = np.array([1, 2, 5]) / 8
    for losses in normal(60, 3).exp():
        answer = weighting.weights(statistics_of(losses), state)
        assert_near(answer.weights, torch.from_numpy(weights), 1e-12)
        assert_near(answer.coefficients, torch.from_numpy(weights * preference), 1e-12)
        state, gain = answer.state, 0.3 * preference * losses.numpy()
        if update == "mirror":
            weights = weights * np.exp(gain)
            weights = weights / weights.sum()
        else:
            weights = nearest_on_simplex(weights + gain)


def nearest_on_simplex(point: np.ndarray) -> np.ndarray:
    """By bisection on the threshold."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(point - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(point - high, 0)


@pytest.mark.parametrize("update", ["mirror", "projected"])
def test_absent_losses_keep_their_online_weight(update: str) -> None:
    parameter = nn.Parameter(vector((1.0, 2.0, 3.0)))
    optimizer = BalancedOptimizer(
        torch.optim.SGD([parameter], lr=0.01), OnlineTchebycheff(0.2, update)
    )

    def shares_after(present: str) -> Tensor:
        optimizer.zero_grad()
        optimizer.backward({name: parameter["abc".index(name)].square() for name in present})
        optimizer.step()
        state = optimizer.state_dict()["balance"]["state"]
        return torch.softmax(state["logits"], 0) if update == "mirror" else state["weights"]

    before = shares_after("abc")
    after = shares_after("bc")
    assert_near(after[0], before[0], 1e-15)
    assert abs(float(after[1] - before[1])) > 1e-3
    assert_near(after.sum(), vector((1.0,))[0], 1e-14)
    assert shares_after("a").tolist() == pytest.approx(after.tolist(), abs=1e-15)
    assert optimizer.metrics.weights["a"] == 1.0
