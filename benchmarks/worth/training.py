"""The training loop that all problems share."""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol

import torch
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.worth.problem import Problem, Training
from moo_balance import BalancedOptimizer, BalanceError, Weighting


class Stepper(Protocol):
    """Takes one training step, learning-rate schedule not included."""

    def __call__(self, training: Training) -> None: ...


class Arm(Protocol):
    """A way to turn several losses into one step; the name identifies its measured runs."""

    @property
    def name(self) -> str: ...

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper: ...


class Outcome(NamedTuple):
    """One run.

    Args:
        validation: The score on validation data, infinite if the run broke off.
        test: The score on test data, infinite if the run broke off.
        seconds: Processor time of a step.
        error: Why the run broke off; empty if it did not.
    """

    validation: float
    test: float
    seconds: float
    error: str = ""


def balanced_step(optimizer: BalancedOptimizer, training: Training) -> None:
    """A step of the library."""
    optimizer.zero_grad()
    optimizer.backward(training.losses(training.draw()))
    optimizer.step()


def balanced_step_with_closure(optimizer: BalancedOptimizer, training: Training) -> None:
    """A step of a method that evaluates the losses again after it."""
    batch = training.draw()
    optimizer.zero_grad()
    optimizer.backward(lambda: training.losses(batch))
    optimizer.step()


def balanced_step_on_two(optimizer: BalancedOptimizer, training: Training) -> None:
    """A step of a method that multiplies gradients of different batches: on two of them."""
    # Both first: drawing may train a discriminator that the losses use.
    batches = [training.draw() for _ in range(2)]
    optimizer.zero_grad()
    first, second = (
        {name: loss / 2 for name, loss in training.losses(batch).items()} for batch in batches
    )
    with optimizer.accumulate():
        optimizer.backward(first)
    optimizer.backward(second)
    optimizer.step()


def train(problem: Problem, arm: Arm, lr: float, seed: int, steps: int | None = None) -> Outcome:
    """Train once, from `seed`. A method that raises, and a score that is NaN, give infinity."""
    torch.manual_seed(seed)
    training = problem.start(seed)
    optimizer = Adam(training.params, lr=lr, fused=True)
    count = problem.steps if steps is None else steps
    started = time.process_time()
    try:
        step = arm.wrap(optimizer, problem, seed)
        schedule = CosineAnnealingLR(optimizer, count)
        started = time.process_time()
        for _ in range(count):
            step(training)
            schedule.step()
    except (BalanceError, ArithmeticError, torch.linalg.LinAlgError) as error:
        message = f"{type(error).__name__}: {error}".split("\n")[0]
        return Outcome(math.inf, math.inf, (time.process_time() - started) / count, message)
    seconds = (time.process_time() - started) / count
    scores = (training.validate(), training.test())
    validation, test = (score if math.isfinite(score) else math.inf for score in scores)
    return Outcome(validation, test, seconds)


def make_stepper(optimizer: Optimizer, weighting: Weighting) -> Stepper:
    """Steps of the library with a method."""
    balanced = BalancedOptimizer(optimizer, weighting)
    step = balanced_step
    if weighting.observes_step:
        step = balanced_step_with_closure
    if weighting.uses_independent_batches:
        step = balanced_step_on_two
    return lambda training: step(balanced, training)
