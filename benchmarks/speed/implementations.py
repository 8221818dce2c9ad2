"""Ways to take a step on K losses: the plain loop, its limit, and ours."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.workloads import Outcome, Workload
from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    SmoothTchebycheff,
    Sum,
)
from moo_balance.engine import Streaming
from moo_balance.weighting import Weighting

FORWARD, PLAIN, LIMIT = "forward only", "plain sum", "limit"

Step = Callable[[], object]


@dataclass
class Setup:
    """An implementation's own copy of a model, its optimizer, and the batch that all share."""

    workload: Workload
    model: nn.Module
    batch: tuple[Tensor, ...]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # The cheapest optimizer: it is part of every step, and a slower one would lower all ratios.
        # The rate is low so that losses stay where they are, however many steps are taken.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)

    @staticmethod
    def create(workload: Workload, device: torch.device, seed: int = 0) -> Setup:
        torch.manual_seed(seed)
        model = workload.build().to(device)
        return Setup(workload, model, tuple(part.to(device) for part in workload.draw()))

    def copy(self) -> Setup:
        return Setup(self.workload, deepcopy(self.model), self.batch)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def outcome(self) -> Outcome:
        return self.workload.forward(self.model, self.batch)


@dataclass(frozen=True)
class Implementation:
    """A way to take a step.

    Args:
        name: Its name in the tables.
        build: From a setup to a function that takes one step: forward, backward, optimizer.
        per_loss: Whether it takes gradients of single losses. Such implementations form a group
            of their own in the tables.
        period: Number of steps after which it repeats itself.
        unsupported: From a workload to why this implementation cannot run it, or None.
        third_party: Whether it is part of another library, and may refuse a model.
    """

    name: str
    build: Callable[[Setup], Step]
    per_loss: bool = False
    period: int = 1
    unsupported: Callable[[Workload], str | None] = lambda workload: None
    third_party: bool = False


def forward(setup: Setup) -> Step:
    """The forward pass, with which every step begins."""
    return setup.outcome


def plain(setup: Setup) -> Step:
    """One step of the usual training loop on the sum of the losses."""

    def step() -> None:
        setup.optimizer.zero_grad()
        sum(setup.outcome().losses.values()).backward()
        setup.optimizer.step()

    return step


def limit(setup: Setup) -> Step:
    """The least that exact gradients of single losses cost: one differentiation each, and a sum."""
    params = setup.params

    def step() -> None:
        setup.optimizer.zero_grad()
        losses = list(setup.outcome().losses.values())
        totals: list[Tensor | None] = [None] * len(params)
        writable = [False] * len(params)
        for k, loss in enumerate(losses):
            keep = k < len(losses) - 1
            row = torch.autograd.grad(loss, params, retain_graph=keep, allow_unused=True)
            for index, gradient in enumerate(row):
                if gradient is None:
                    continue
                total = totals[index]
                if total is None:
                    totals[index] = gradient
                elif writable[index]:
                    total.add_(gradient)
                else:  # autograd may still use the first gradient's memory
                    totals[index], writable[index] = total + gradient, True
        for param, total in zip(params, totals, strict=True):
            param.grad = total
        setup.optimizer.step()

    return step


def balanced_step(
    weighting: Weighting, at_features: bool = False, **arguments: Any
) -> Callable[[Setup], Step]:
    """The same loop with a `BalancedOptimizer`."""

    def build(setup: Setup) -> Step:
        optimizer = BalancedOptimizer(setup.optimizer, weighting, **arguments)

        def step() -> None:
            optimizer.zero_grad()
            outcome = setup.outcome()
            features = outcome.features if at_features else None
            optimizer.backward(outcome.losses, features=features)
            optimizer.step()

        return step

    return build


def observing_step(weighting: Weighting) -> Callable[[Setup], Step]:
    """The same loop for a method that evaluates the losses again after the step."""

    def build(setup: Setup) -> Step:
        optimizer = BalancedOptimizer(setup.optimizer, weighting)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.backward(lambda: setup.outcome().losses)
            optimizer.step()

        return step

    return build


def _no_features(workload: Workload) -> str | None:
    return None if workload.has_features else "no features that all losses are computed from"


OURS = (
    Implementation("Sum", balanced_step(Sum())),
    Implementation("FAMO", observing_step(FAMO())),
    Implementation("FAMO, every 10", observing_step(FAMO(every=10)), period=10),
    Implementation("FAMO, lagged", balanced_step(FAMO(lagged=True))),
    Implementation("SmoothTchebycheff", balanced_step(SmoothTchebycheff())),
    Implementation(
        "MGDA at features", balanced_step(MGDA(), at_features=True), unsupported=_no_features
    ),
    Implementation("MGDA, every 10", balanced_step(MGDA(every=10)), period=10),
    Implementation("AnalyticQP", balanced_step(AnalyticQP()), per_loss=True),
    Implementation("MGDA", balanced_step(MGDA()), per_loss=True),
    Implementation("MGDA, streaming", balanced_step(MGDA(), engine=Streaming()), per_loss=True),
)
