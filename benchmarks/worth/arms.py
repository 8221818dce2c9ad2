"""The arms of the comparison: static weights, every method of the library, and other libraries."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import moo_balance as mb
from benchmarks.worth.candidates import CANDIDATES
from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.training import Arm, Stepper, make_stepper
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


def prefer(method: Weighting, preference: Mapping[str, float]) -> Weighting:
    """The method, and those inside of it, with the preference where they take one."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if field.name == "preference":
            changes["preference"] = dict(preference)
        elif isinstance(value, Weighting):
            changes[field.name] = prefer(value, preference)
        elif field.name == "weightings":
            changes[field.name] = [prefer(each, preference) for each in value]
    return dataclasses.replace(method, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class PlainLoop:
    """The plain sum without the library, which costs are compared with."""

    name: str = "plain loop"
    rate_of: str = "Sum"

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        def step(training: Training) -> None:
            optimizer.zero_grad()
            sum(training.losses(training.draw()).values()).backward()  # type: ignore[union-attr]
            optimizer.step()

        return step


@dataclass(frozen=True)
class Static:
    """Static weights drawn at random: a trial of the search, or the null method.

    Args:
        name: As it is listed.
        differs: Whether each problem gets draws of its own, so that luck on one is not luck on all.
    """

    name: str
    differs: bool = False
    rate_of: None = None

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        first = zlib.crc32(problem.title.encode()) if self.differs else 0
        weights = draw_weights(problem, first + seed)
        return make_stepper(optimizer, mb.FixedWeights(weights))


@dataclass(frozen=True)
class Method:
    """A method of the library, with arguments that the problem may fill in.

    Args:
        name: As it is listed.
        cls: Its class.
        arguments: Those that differ from the defaults; milestones are fractions of the training.
        variant_of: The method whose other setting it is; None for defaults.
        shares_rate: Whether it takes the learning rate of that method.
    """

    name: str
    cls: type[Weighting]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variant_of: str | None = None
    shares_rate: bool = True

    @property
    def rate_of(self) -> str | None:
        """The arm whose learning rate this one takes; None if it has pilots of its own."""
        return self.variant_of if self.shares_rate else None

    def weighting(self, problem: Problem) -> Weighting:
        arguments = dict(self.arguments)
        if self.cls is mb.PCD:
            arguments["primary"] = problem.primary
        if self.cls is mb.LearningRateAnnealing:
            arguments["reference"] = problem.primary
        if self.cls is mb.Lagrangian:
            arguments["targets"] = dict(problem.targets)
        if "milestones" in arguments:
            milestones = arguments["milestones"]
            arguments["milestones"] = [round(problem.steps * part) for part in milestones]
        method = self.cls(**arguments)
        if problem.preference is None:
            return method
        return prefer(method, problem.preference)

    def wrap(self, optimizer: Optimizer, problem: Problem, seed: int) -> Stepper:
        return make_stepper(optimizer, self.weighting(problem))


@dataclass(frozen=True)
class Suggested:
    """The plain sum at first; then the static weights that equal gradient norms suggest."""

    name: str = "suggested static weights"
    rate_of: None = None

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
    rate_of: str = "ConFIG"

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
    rate_of: str = "PCGrad"

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
    left_out = ("FixedWeights", "Sequential", "WithConstant")
    return {
        name: Method(name, cls, WRAPPERS.get(name, {}))
        for name, cls in concrete.items()
        if name not in left_out
    }


def _every_10() -> list[Method]:
    """Each method on a Gramian with `every=10`, at the learning rate chosen for `every=1`."""
    arms = []
    for name, method in _every_method().items():
        fields = {field.name: field.default for field in dataclasses.fields(method.cls)}  # type: ignore[arg-type]
        if issubclass(method.cls, mb.GramianWeighting) and fields.get("every") == 1:
            arguments = {**method.arguments, "every": 10}
            arms.append(Method(f"{name}(every=10)", method.cls, arguments, variant_of=name))
    return arms


SETTINGS = [
    Method("FAMO(lagged=True)", mb.FAMO, {"lagged": True}, variant_of="FAMO"),
    Method(
        "BalancedTrajectory(lagged=True)",
        mb.BalancedTrajectory,
        {"lagged": True},
        variant_of="BalancedTrajectory",
    ),
    Method("SumLog(floor=0)", mb.SumLog, {"floor": 0.0}, "SumLog", shares_rate=False),
    Method('MGDA("l2")', mb.MGDA, {"normalize": "l2"}, "MGDA", shares_rate=False),
    Method('MGDA("log")', mb.MGDA, {"normalize": "log"}, "MGDA", shares_rate=False),
    Method(
        "SmoothTchebycheff(log=True)",
        mb.SmoothTchebycheff,
        {"log": True},
        "SmoothTchebycheff",
        shares_rate=False,
    ),
]
"""Other settings of published methods."""

PLAIN = PlainLoop()
SEARCH = Static("static trial")
NULL = Static("random static weights", differs=True)


@functools.cache
def every_arm() -> dict[str, Arm]:
    """All arms but the trials of the search, by name."""
    arms: list[Arm] = [
        *_every_method().values(),
        *_every_10(),
        *SETTINGS,
        *(Method(name, *candidate) for name, candidate in CANDIDATES.items()),
        PLAIN,
        NULL,
        Suggested(),
        ConFIGOfConflictfree(),
        PCGradOfPytorchOptimizer(),
    ]
    return {arm.name: arm for arm in arms}
