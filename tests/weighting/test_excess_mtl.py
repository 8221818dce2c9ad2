"""ExcessMTL against TorchJD, and what its epsilons would do."""

from __future__ import annotations

import pytest
import torch

from moo_balance import BalancedOptimizer, ExcessMTL
from moo_balance.weighting import Statistics
from tests.support.naive_rows import NaiveRows
from tests.support.problems import Scene, SmallModel, jacobian, play, sgd

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("warmup_steps", [1, 2])
def test_weights_are_those_of_torchjd(warmup_steps):
    """Up to the 1e-7 that it adds to squares and to the unit of each loss."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(200):
        scene = Scene.random(seed=seed, steps=4)
        theirs = aggregation.ExcessMTL(0.3, n_warmup_steps=warmup_steps)
        for rows, answer in zip(
            scene.jacobians, play(ExcessMTL(lr=0.3, warmup_steps=warmup_steps), scene), strict=True
        ):
            expected = theirs.weighting(rows)
            torch.testing.assert_close(answer.coefficients, expected, rtol=1e-4, atol=0)


def test_each_step_is_the_published_rule():
    scene, squares, weights, unit = Scene.random(), 0.0, torch.ones(3).double() / 3, None
    for rows, answer in zip(scene.jacobians, play(ExcessMTL(lr=0.7), scene), strict=True):
        squares = squares + rows**2
        risks = (rows**2 / squares.sqrt()).sum(1)
        if unit is None:
            unit = risks
        else:
            weights = weights * torch.exp(0.7 * risks / unit)
            weights = weights / weights.sum()
        torch.testing.assert_close(answer.coefficients, weights, rtol=1e-12, atol=0)


def test_training_keeps_the_root_of_the_squares():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), ExcessMTL(lr=0.7))
    squares = 0.0
    for step in range(4):
        rows = jacobian(model.losses(step), list(model.parameters()))
        squares = squares + rows**2
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        optimizer.step()
    kept = optimizer.state_dict()["balance"]["rows"]
    weights = torch.stack([kept[0][name]["root"].flatten() for name in NAMES])
    torch.testing.assert_close(weights, squares[:, :12].sqrt(), rtol=1e-12, atol=0)
    assert list(kept[2]) == ["a"]  # a head


def test_a_noisy_loss_does_not_take_over():
    """Its value stays large, but its gradients cancel, and its risk falls."""
    generator = torch.Generator().manual_seed(0)
    weighting, names = ExcessMTL(lr=0.1), ("learnable", "noise")
    state, naive = weighting.init(names, torch.device("cpu")), NaiveRows(weighting)
    steady = torch.ones(1, 20, dtype=torch.float64)
    for step in range(30):
        noise = torch.randn(1, 20, generator=generator, dtype=torch.float64) / (1 + step)
        rows = torch.cat([steady, noise])
        statistics = Statistics(names, torch.ones(2).double(), rows @ rows.T, step)
        weights, _, state = weighting.weights(naive.tell(statistics, rows), state)
    assert weights[0] > weights[1]


def test_a_loss_without_a_gradient_gets_its_unit_later():
    weighting = ExcessMTL(lr=0.5)
    state, naive = weighting.init(NAMES, torch.device("cpu")), NaiveRows(weighting)
    rows = Scene.random().jacobians[0]
    for step in range(3):
        shown = rows.clone()
        shown[1] *= step > 0
        statistics = Statistics(NAMES, torch.ones(3).double(), shown @ shown.T, step)
        _, coefficients, state = weighting.weights(naive.tell(statistics, shown), state)
        assert bool(coefficients.isfinite().all())
    assert state["counts"].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(state["first"][1], rows[1].abs().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_units_do_not_matter_even_at_the_ends_of_float32(exponent):
    scene = Scene.random()
    scaled = scene.scale([10.0**exponent, 1.0, 10.0**-exponent])
    scene.jacobians, scaled.jacobians = scene.jacobians.float(), scaled.jacobians.float()
    for one, other in zip(play(ExcessMTL(), scene), play(ExcessMTL(), scaled), strict=True):
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-5, atol=0)


def test_the_preference_is_the_share_at_the_start():
    weighting = ExcessMTL(preference={"a": 1.0, "b": 2.0, "c": 5.0}, reduction="sum")
    answer = play(weighting, Scene.random())[0]
    expected = torch.tensor([0.375, 0.75, 1.875], dtype=torch.float64)
    torch.testing.assert_close(answer.coefficients, expected, rtol=1e-12, atol=0)
