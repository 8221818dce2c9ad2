"""The problems of the worth benchmark are well formed and repeatable."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.worth.arms import SEARCH, draw_weights, every_arm
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.training import train


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_the_losses_that_it_names_and_repeats(name: str) -> None:
    problem = PROBLEMS[name]
    torch.manual_seed(1)
    training = problem.start(1)
    losses = training.losses(training.draw())
    assert tuple(losses) == problem.loss_names
    assert problem.primary in problem.loss_names
    assert all(loss.shape == () and math.isfinite(float(loss)) for loss in losses.values())
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
