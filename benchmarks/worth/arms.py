"""The arms of the comparison: static weights, every method of the library, and other libraries."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import moo_balance as mb
from benchmarks.worth.candidates import CANDIDATES
from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.training import Stepper, make_stepper
from moo_balance import Weighting

DECADES = 6.0
"""Static weights are drawn log-uniformly from a range of this many powers of ten."""

SUGGEST_AFTER = 100
SUGGEST_FROM = 8
"""Steps before static weights are suggested, and batches that they are measured on."""

WRAPPERS: dict[str, dict[str, Any]] = {
    "MovingAverage": {"weighting": mb.MGDA()},
    "Rescaled": {"weighting": mb.AnalyticQP()},
}
"""Arguments of methods that wrap others; `Sequential` is among the candidates."""


def draw_weights(problem: Problem, trial: int) -> dict[str, float]:
    """The static weights of a trial of the random search; they sum to K."""
    generator = torch.Generator().manual_seed(trial)
    uniform = torch.rand(len(problem.loss_names), generator=generator, dtype=torch.float64)
    weights = 10.0 ** (DECADES * (uniform - 0.5))
    weights = weights * len(weights) / weights.sum()
    return dict(zip(problem.loss_names, weights.tolist(), strict=True))


@dataclass(frozen=True)
class Static:
    """Static weights drawn at random: a trial of the search, or the null method."""

    name: str
    first_trial: int = 0

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        weights = draw_weights(problem, self.first_trial + seed)
        return make_stepper(optimizer, mb.FixedWeights(weights))


@dataclass(frozen=True)
class Method:
    """A method of the library, with arguments that the problem may fill in.

    Args:
        name: As it is listed.
        cls: Its class.
        arguments: Those that differ from the defaults; milestones are fractions of the training.
        tuned_as: The arm whose learning rate this one takes; None if it is tuned itself.
    """

    name: str
    cls: type[Weighting]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuned_as: str | None = None

    def weighting(self, problem: Problem) -> Weighting:
        fields = {field.name for field in dataclasses.fields(self.cls)}  # type: ignore[arg-type]
        arguments = dict(self.arguments)
        if self.cls is mb.PCD:
            arguments["primary"] = problem.primary
        if self.cls is mb.LearningRateAnnealing:
            arguments["reference"] = problem.primary
        if self.cls is mb.Lagrangian:
            arguments["targets"] = dict(problem.targets)
        if problem.preference is not None and "preference" in fields:
            arguments["preference"] = dict(problem.preference)
        if "milestones" in arguments:
            milestones = arguments["milestones"]
            arguments["milestones"] = [round(problem.steps * part) for part in milestones]
        return self.cls(**arguments)

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        return make_stepper(optimizer, self.weighting(problem))


@dataclass(frozen=True)
class Suggested:
    """The plain sum at first; then the static weights that equal gradient norms suggest."""

    name: str = "suggested static weights"

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        balanced = mb.BalancedOptimizer(optimizer, mb.Sum())
        weights: dict[str, float] = {}
        taken = 0

        def step(training: Training) -> None:
            nonlocal weights, taken
            if taken == SUGGEST_AFTER:
                batches = [training.draw() for _ in range(SUGGEST_FROM)]
                suggested = mb.suggest_weights(training.losses, training.params, batches)
                weights = dict(suggested.gradient_norms)
            losses = training.losses(training.draw())
            if weights:
                losses = {name: weights[name] * loss for name, loss in losses.items()}
            balanced.zero_grad()
            balanced.backward(losses)
            balanced.step()
            taken += 1

        return step


@dataclass(frozen=True)
class ConFIGOfConflictfree:
    """ConFIG of the `conflictfree` library, by its authors."""

    name: str = "ConFIG (conflictfree)"
    tuned_as: str = "ConFIG"

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        from conflictfree.grad_operator import ConFIG_update

        params = [param for group in optimizer.param_groups for param in group["params"]]

        def step(training: Training) -> None:
            losses = list(training.losses(training.draw()).values())
            rows = []
            for index, loss in enumerate(losses):
                last = index == len(losses) - 1
                grads = torch.autograd.grad(
                    loss, params, retain_graph=not last, allow_unused=True, materialize_grads=True
                )
                rows.append(torch.cat([grad.flatten() for grad in grads]))
            combined = ConFIG_update(rows)
            sizes = [param.numel() for param in params]
            for param, part in zip(params, combined.split(sizes), strict=True):
                param.grad = part.view_as(param)
            optimizer.step()

        return step


@dataclass(frozen=True)
class PCGradOfPytorchOptimizer:
    """PCGrad of the `pytorch-optimizer` library."""

    name: str = "PCGrad (pytorch-optimizer)"
    tuned_as: str = "PCGrad"

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        from pytorch_optimizer import PCGrad

        wrapped = PCGrad(optimizer)

        def step(training: Training) -> None:
            wrapped.zero_grad()
            wrapped.pc_backward(list(training.losses(training.draw()).values()))
            wrapped.step()

        return step


def _every_method() -> dict[str, Method]:
    """Each exported method with its defaults; the others have their entry elsewhere."""
    exported = {name: getattr(mb, name) for name in mb.weighting.__all__}
    concrete = {
        name: cls
        for name, cls in sorted(exported.items())
        if Weighting in getattr(cls, "__mro__", ()) and not inspect.isabstract(cls)
    }
    left_out = ("FixedWeights", "Sequential")
    return {
        name: Method(name, cls, WRAPPERS.get(name, {}))
        for name, cls in concrete.items()
        if name not in left_out
    }


def _refreshed_seldom() -> list[Method]:
    """Each method on a Gramian with `every=10`, at the learning rate chosen for `every=1`."""
    arms = []
    for name, method in _every_method().items():
        fields = {field.name: field.default for field in dataclasses.fields(method.cls)}  # type: ignore[arg-type]
        if issubclass(method.cls, mb.GramianWeighting) and fields.get("every") == 1:
            arguments = {**method.arguments, "every": 10}
            arms.append(Method(f"{name}(every=10)", method.cls, arguments, tuned_as=name))
    return arms


SETTINGS = [
    Method("FAMO(lagged=True)", mb.FAMO, {"lagged": True}, tuned_as="FAMO"),
    Method(
        "BalancedTrajectory(lagged=True)",
        mb.BalancedTrajectory,
        {"lagged": True},
        tuned_as="BalancedTrajectory",
    ),
    Method('MGDA("l2")', mb.MGDA, {"normalize": "l2"}),
    Method('MGDA("log")', mb.MGDA, {"normalize": "log"}),
    Method("SmoothTchebycheff(log=True)", mb.SmoothTchebycheff, {"log": True}),
]
"""Other settings of published methods."""

SEARCH = Static("static trial")
NULL = Static("random static weights", first_trial=1_000_000)


def every_arm() -> dict[str, Any]:
    """All arms but the trials of the search, by name."""
    arms = [
        *_every_method().values(),
        *_refreshed_seldom(),
        *SETTINGS,
        *(Method(name, *candidate) for name, candidate in CANDIDATES.items()),
        NULL,
        Suggested(),
        ConFIGOfConflictfree(),
        PCGradOfPytorchOptimizer(),
    ]
    return {arm.name: arm for arm in arms}
