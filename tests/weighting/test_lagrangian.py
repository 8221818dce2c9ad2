"""Lagrangian: multipliers of known optima, units, wind-up, noise, and targets that change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moo_balance import BalancedOptimizer, BalanceValueError, Lagrangian
from moo_balance.weighting import State
from tests.support.statistics import assert_near, initial_state, run_steps, statistics_of, vector

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Programme(NamedTuple):
    """A quadratic objective "f" under quadratic bounds "a", "b", ..., with a known optimum."""

    matrices: Tensor  # [1 + M, N, N]
    centres: Tensor  # [1 + M, N]
    targets: dict[str, float]
    optimum: Tensor
    multipliers: dict[str, float]

    def losses(self, point: Tensor, noise: Tensor | float = 0.0) -> dict[str, Tensor]:
        away = point - self.centres + noise
        values = torch.einsum("ki,kij,kj->k", away, self.matrices, away) / 2 + 1.0
        return dict(zip(["f", *self.targets], values, strict=True))


def draw_programme(seed: int, active: int = 2, slack: int = 1) -> Programme:
    """Drawn from its solution: the conditions of optimality say where the objective's centre is."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * draw

    count, size = 1 + active + slack, 4
    basis, _ = torch.linalg.qr(uniform(-1, 1, count, size, size))
    matrices = basis @ torch.diag_embed(uniform(0.3, 1.0, count, size)) @ basis.mT
    centres, optimum = uniform(-2, 2, count, size), uniform(-1, 1, size)
    away = optimum - centres[1:]
    pulls = torch.einsum("kij,kj->ki", matrices[1:], away)
    values = (pulls * away).sum(1) / 2 + 1.0
    shares = torch.cat([uniform(0.3, 2.0, active), torch.zeros(slack, dtype=torch.float64)])
    multipliers = shares / values
    centres[0] = optimum + torch.linalg.solve(matrices[0], multipliers @ pulls)
    names = "abcdef"[: active + slack]
    bounds = torch.where(shares > 0, values, 1.4 * values)
    return Programme(
        matrices,
        centres,
        dict(zip(names, bounds.tolist(), strict=True)),
        optimum,
        dict(zip(names, multipliers.tolist(), strict=True)),
    )


def descent(lr: float) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr)


def train(
    losses: Callable[[Tensor, int], Mapping[str, Tensor]],
    start: Tensor,
    weighting: Lagrangian,
    steps: int,
    make: Optimizer,
) -> tuple[BalancedOptimizer, list[Mapping[str, float]], Tensor]:
    """The optimizer, the losses of all steps, and the point where it ends."""
    point = torch.nn.Parameter(start.clone())
    optimizer = BalancedOptimizer(make([point]), weighting)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        given = losses(point, step)
        optimizer.backward(given)
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in given.items()})
    return optimizer, history, point.detach()


def multipliers_of(optimizer: BalancedOptimizer) -> dict[str, float]:
    weights = optimizer.metrics.weights
    assert weights is not None
    return {name: float(weight) for name, weight in weights.items()}


# ---------------------------------------------------------------------- quadratics


@pytest.mark.parametrize(("seed", "renormalize"), [(0, True), (1, False), (2, True), (3, False)])
def test_it_ends_at_the_optimum_with_its_multipliers(seed: int, renormalize: bool) -> None:
    programme = draw_programme(seed)
    weighting = Lagrangian(programme.targets, "f", lr=0.05, renormalize=renormalize)
    optimizer, history, point = train(
        lambda at, step: programme.losses(at),
        programme.optimum + 0.5,
        weighting,
        1200,
        descent(0.3),
    )
    assert_near(point, programme.optimum, 1e-3)
    found = multipliers_of(optimizer)
    assert found.pop("f") == 1.0
    for name, expected in programme.multipliers.items():
        assert found[name] == pytest.approx(expected, rel=1e-2)
        assert (found[name] == 0.0) == (expected == 0.0)
        assert history[-1][name] <= programme.targets[name] * (1 + 1e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_adam_with_the_defaults_ends_there_from_far_away(seed: int) -> None:
    programme = draw_programme(seed)
    optimizer, history, _ = train(
        lambda at, step: programme.losses(at),
        programme.optimum + 6.0,
        Lagrangian(programme.targets),
        1800,
        lambda params: torch.optim.Adam(params, lr=0.03),
    )
    assert history[0]["a"] > 3 * programme.targets["a"]
    expected = {"f": 1.0, **programme.multipliers}
    assert multipliers_of(optimizer) == pytest.approx(expected, rel=0.03, abs=1e-12)
    for name, target in programme.targets.items():
        assert history[-1][name] <= target * (1 + 2e-3)


def test_noise_moves_neither_the_bound_nor_the_slack_multiplier() -> None:
    programme = draw_programme(1)
    generator = torch.Generator().manual_seed(0)
    shape = programme.centres.shape

    def noisy(at: Tensor, step: int) -> dict[str, Tensor]:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return programme.losses(at, 0.15 * noise)

    expected = programme.losses(programme.optimum)
    optimizer, history, _ = train(
        noisy, programme.optimum + 1.0, Lagrangian(programme.targets), 2000, descent(0.05)
    )
    tail = history[-1000:]
    mean = {name: sum(each[name] for each in tail) / len(tail) for name in expected}
    for name in ("a", "b"):
        assert mean[name] == pytest.approx(programme.targets[name], rel=0.01)
    assert multipliers_of(optimizer)["c"] == 0.0


# ---------------------------------------------------------------------- rate and distortion

VARIANCES = vector((4.0, 1.0, 0.25))


def codec(at: Tensor, step: int = 0) -> dict[str, Tensor]:
    """Gaussian sources: with `at` bits each its distortion is the variance / 4^bits."""
    return {"rate": at.sum(), "distortion": (VARIANCES * 4**-at).sum()}


@pytest.mark.parametrize("start", [6.0, 0.1])
def test_distortion_as_small_as_possible_with_at_most_so_many_bits(start: float) -> None:
    """From ten times the target, and from below it; equal distortions are the optimum."""
    weighting = Lagrangian(objective="distortion", targets={"rate": 1.8})
    optimizer, history, point = train(
        codec,
        torch.full((3,), start, dtype=torch.float64),
        weighting,
        1300,
        lambda params: torch.optim.Adam(params, lr=0.02),
    )
    bits = VARIANCES.log2() / 2 + (1.8 - float(VARIANCES.log2().sum()) / 2) / 3
    assert_near(point, bits, 2e-3)
    assert history[-1]["rate"] <= 1.8 * 1.001
    price = float(2 * torch.log(vector((2.0,))) * VARIANCES[0] * 4 ** -bits[0])
    assert multipliers_of(optimizer)["rate"] == pytest.approx(price, rel=1e-2)


def test_a_start_far_from_the_target_leaves_no_wind_up() -> None:
    """Hundreds of steps above the target add little, and the rate does not fall far below it."""
    optimizer, history, _ = train(
        codec,
        torch.full((3,), 6.0, dtype=torch.float64),
        Lagrangian({"rate": 1.8}, "distortion"),
        800,
        lambda params: torch.optim.Adam(params, lr=0.02),
    )
    assert len([each for each in history if each["rate"] > 2 * 1.8]) > 200
    assert min(each["rate"] for each in history) > 0.98 * 1.8
    integral = float(optimizer.state_dict()["balance"]["state"]["integral"][0])
    settled = multipliers_of(optimizer)["rate"] * 1.8 / history[-1]["distortion"]
    assert integral == pytest.approx(settled, rel=0.05)


def test_the_problem_can_be_turned_around() -> None:
    weighting = Lagrangian(objective="rate", targets={"distortion": 0.3})
    start = torch.full((3,), 2.0, dtype=torch.float64)
    _, history, point = train(codec, start, weighting, 1500, descent(0.1))
    assert history[-1]["distortion"] == pytest.approx(0.3, rel=1e-3)
    assert_near(VARIANCES * 4**-point, vector((0.1, 0.1, 0.1)), 1e-3)


# ---------------------------------------------------------------------- the rule itself


def play(weighting: Lagrangian, losses: list[list[float]]) -> tuple[list[Tensor], State]:
    outputs = run_steps(weighting, losses)
    return [output.weights for output in outputs], outputs[-1].state


def test_the_update_is_the_documented_one_and_lags_by_a_step() -> None:
    weighting = Lagrangian({"b": 2.0}, "a", lr=0.1, damping=0.5, beta=0.0)
    weights, state = play(weighting, [[3.0, 3.0], [3.0, 8.0], [5.0, 1.0], [4.0, 1.0]])
    expected = [
        0.0,
        3 / 2 * (0.1 * 0.5 + 0.5 * 0.5),  # a violation of 1/2
        3 / 2 * (0.1 * (0.5 + 1 / 3) + 0.5 * 1.0),  # one of 3, which counts as 1/3 and as 1
        5 / 2 * max(0.0, 0.1 * (0.5 + 1 / 3 - 0.5) - 0.5 * 0.5),  # one of -1/2
    ]
    assert_near(torch.stack(weights)[:, 1], expected, 1e-15)
    assert_near(torch.stack(weights)[:, 0], (1.0,) * 4, 0.0)
    assert state["integral"].tolist() == [0.0, 0.0]


def test_averages_start_at_the_first_loss() -> None:
    weighting = Lagrangian({"b": 2.0}, "a", beta=0.75)
    _, state = play(weighting, [[3.0, 4.0], [7.0, 8.0]])
    assert state["mean"].tolist() == [4.0, 5.0]
    assert float(state["scale"]) == 4.0


def test_units_do_not_matter() -> None:
    losses = [[3.0, 3.0], [2.0, 8.0], [5.0, 1.0], [4.0, 2.5]]
    plain, _ = play(Lagrangian({"b": 2.0}, "a"), losses)
    for one, other in ((1e-9, 1.0), (1.0, 1e9), (1e6, 1e-6)):
        scaled, _ = play(
            Lagrangian({"b": 2.0 * other}, "a"), [[a * one, b * other] for a, b in losses]
        )
        for before, after in zip(plain, scaled, strict=True):
            assert float(after[1]) == pytest.approx(float(before[1]) * one / other, rel=1e-12)


def test_a_target_of_zero_is_compared_with_the_first_loss() -> None:
    weighting = Lagrangian({"b": 0.0}, "a", beta=0.0)
    weights, _ = play(weighting, [[1.0, -4.0], [1.0, 2.0], [1.0, 0.0]])
    assert float(weights[1][1]) == 0.0
    assert float(weights[2][1]) == pytest.approx((0.5 + 0.005) / 4)
    assert float(play(weighting, [[1.0, 0.0], [1.0, 0.5], [1.0, 0.0]])[0][2][1]) > 0


def test_coefficients_sum_to_one_and_an_absent_objective_leaves_the_others_alone() -> None:
    weighting = Lagrangian({"b": 2.0}, "a")
    state = initial_state(weighting, 2)
    for step in range(20):
        answer = weighting.weights(statistics_of([1.0, 3.0], step=step), state)
        state = answer.state
        assert float(answer.coefficients.sum()) == pytest.approx(1.0, rel=1e-15)
    whole = weighting.weights(statistics_of([1.0, 3.0], step=20), state)
    part = {key: value[1:] if value.ndim else value for key, value in state.items()}
    names = statistics_of([3.0], step=20)._replace(names=("b",))
    alone = weighting.weights(names, part)
    assert float(alone.coefficients[0]) == pytest.approx(float(whole.coefficients[1]), rel=1e-15)
    assert float(alone.state["scale"]) == float(state["scale"])


def test_all_losses_without_a_target_are_summed_and_weights_are_allowed() -> None:
    both, _ = play(Lagrangian({"b": 2.0}), [[1.0, 3.0, 2.0]] * 3)
    assert both[0].tolist() == [1.0, 0.0, 1.0]
    chosen, _ = play(Lagrangian({"b": 2.0}, {"a": 3.0, "b": 0.5, "c": 1.0}), [[1.0, 3.0, 2.0]] * 3)
    assert chosen[0].tolist() == [3.0, 0.5, 1.0]
    assert float(chosen[2][1]) > 0.5


def test_with_bounds_only_it_looks_for_a_feasible_point() -> None:
    weighting = Lagrangian({"a": 2.5, "b": 2.5})
    first = weighting.weights(statistics_of((5.0, 17.0)), initial_state(weighting, 2))
    assert first.coefficients.tolist() == [0.0, 0.0]
    _, history, _ = train(
        lambda at, step: {"a": (at - 1).square().sum() + 1, "b": (at + 1).square().sum() + 1},
        vector((3.0,)),
        weighting,
        500,
        descent(0.1),
    )
    assert max(history[-1].values()) <= 2.5 * 1.001


def test_bounds_that_cannot_be_met_end_in_the_least_violation() -> None:
    optimizer, history, point = train(
        lambda at, step: {"a": (at - 1).square().sum() + 1, "b": (at + 1).square().sum() + 1},
        vector((3.0,)),
        Lagrangian({"b": 0.9}, "a", lr=0.3),
        400,
        descent(0.1),
    )
    assert float(point) == pytest.approx(-1.0, abs=0.15)
    assert history[-1]["b"] == pytest.approx(1.0, abs=0.02)
    total = sum(float(value) for value in optimizer.metrics.coefficients.values())
    assert total == pytest.approx(1.0, rel=1e-12)


# ---------------------------------------------------------------------- targets that change


def run_codec(
    weighting: Lagrangian, steps: range, state: tuple[Any, Any] | None = None
) -> tuple[dict[str, float], tuple[Any, Any]]:
    point = torch.nn.Parameter(torch.full((3,), 1.0, dtype=torch.float64))
    optimizer = BalancedOptimizer(torch.optim.SGD([point], lr=0.2), weighting)
    if state is not None:
        with torch.no_grad():
            point.copy_(state[0])
        optimizer.load_state_dict(state[1])
    for _ in steps:
        optimizer.zero_grad()
        given = codec(point)
        optimizer.backward(given)
        optimizer.step()
    figures = {name: float(loss.detach()) for name, loss in given.items()}
    return figures, (point.detach().clone(), optimizer.state_dict())


def test_a_target_changes_at_its_step_and_a_resumed_run_follows() -> None:
    weighting = Lagrangian({"rate": {0: 3.0, 400: 1.8}}, "distortion", lr=0.03)
    before, _ = run_codec(weighting, range(400))
    assert before["rate"] == pytest.approx(3.0, rel=0.03)
    whole, end = run_codec(weighting, range(700))
    assert whole["rate"] == pytest.approx(1.8, rel=1e-3)
    for middle in (200, 500):
        _, saved = run_codec(weighting, range(middle))
        resumed, same = run_codec(weighting, range(middle, 700), saved)
        assert resumed == whole
        assert torch.equal(same[0], end[0])


def test_another_target_can_be_given_to_a_loaded_run() -> None:
    _, saved = run_codec(Lagrangian({"rate": 3.0}, "distortion", lr=0.03), range(300))
    with pytest.warns(UserWarning, match=r"targets=\{'rate': 1.8\} \(saved with \{'rate': 3\}\)"):
        after, _ = run_codec(Lagrangian({"rate": 1.8}, "distortion", lr=0.03), range(500), saved)
    assert after["rate"] == pytest.approx(1.8, rel=2e-3)


def test_a_schedule_is_a_copy_and_a_value() -> None:
    schedule = {0: 3.0, 600: 1.8}
    weighting = Lagrangian({"rate": schedule})
    schedule[0] = 0.0
    assert weighting.targets == {"rate": {0: 3.0, 600: 1.8}}
    assert [weighting._targets_at(("rate",), step)[0] for step in (0, 599, 600, 10**6)] == [
        3.0,
        3.0,
        1.8,
        1.8,
    ]


def test_a_loss_without_a_part_is_refused_by_name() -> None:
    with pytest.raises(BalanceValueError, match=r"`objective` should name.*nothing for `b`"):
        Lagrangian({"c": 1.0}, "a").init(("a", "b", "c"), torch.device("cpu"))
