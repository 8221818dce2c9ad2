"""The problems of the worth benchmark are well formed and repeatable."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.worth.arms import SEARCH, draw_weights, every_arm
from benchmarks.worth.problems import PROBLEMS, _pinn
from benchmarks.worth.training import train


# torch.func.jvp of PyTorch 2.13 emits it by itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_the_losses_that_it_names_and_repeats(name: str) -> None:
    problem = PROBLEMS[name]
    torch.manual_seed(1)
    training = problem.start(1)
    losses = training.losses(training.draw())
    assert tuple(losses) == problem.loss_names
    assert problem.primary in problem.loss_names
    assert all(loss.shape == () and math.isfinite(loss.item()) for loss in losses.values())
    assert set(problem.preference or problem.loss_names) == set(problem.loss_names)
    assert set(problem.targets) <= set(problem.loss_names)
    first, second = (train(problem, SEARCH, problem.rates[0], 3, steps=2) for _ in range(2))
    assert not first.error
    assert first[:2] == second[:2]


def test_static_weights_sum_to_k_and_differ_between_trials() -> None:
    problem = PROBLEMS["digits"]
    drawn = [draw_weights(problem, trial) for trial in range(50)]
    assert all(sum(weights.values()) == pytest.approx(4.0) for weights in drawn)
    spans = [max(weights.values()) / min(weights.values()) for weights in drawn]
    assert len(set(spans)) == 50
    assert 1e2 < sorted(spans)[25] < 1e6


@pytest.mark.parametrize("arm", every_arm())
def test_each_method_takes_steps(arm: str) -> None:
    problem = PROBLEMS["constrained"]
    outcome = train(problem, every_arm()[arm], problem.rates[1], 1, steps=3)
    assert not outcome.error
    assert math.isfinite(outcome.test)


def test_derivatives_carried_through_the_layers_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    network = _pinn.tanh_network(2, 8, 2, _pinn.Standardise(0, 1), outputs=2)
    points = torch.rand(5, 2, requires_grad=True)
    derivatives = _pinn.differentiate(network, points, twice=2)
    for output in range(2):
        value = network(points)[:, output]
        (slopes,) = torch.autograd.grad(value.sum(), points, create_graph=True)
        torch.testing.assert_close(derivatives.value[:, output], value)
        torch.testing.assert_close(derivatives.first[:, :, output].T, slopes)
        for k in range(2):
            (curvature,) = torch.autograd.grad(slopes[:, k].sum(), points, retain_graph=True)
            torch.testing.assert_close(derivatives.second[k, :, output], curvature[:, k])
