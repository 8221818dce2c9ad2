"""What takes part: ways to take a step on K losses, ours, the plain loop, and its limit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads import Outcome, Workload
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

FORWARD, PLAIN, LIMIT = "forward alone", "plain sum", "limit"

Step = Callable[[], object]


@dataclass
class Stand:
    """A contestant's own copy of a model, with the batch that all of them train on."""

    workload: Workload
    model: nn.Module
    batch: tuple[Tensor, ...]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # The cheapest optimizer: a dearer one is part of every step and would flatter all ratios.
        # The rate is low so that losses stay where they are, however many steps are taken.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)

    @staticmethod
    def of(workload: Workload, device: torch.device, seed: int = 0) -> Stand:
        torch.manual_seed(seed)
        model = workload.build().to(device)
        return Stand(workload, model, tuple(part.to(device) for part in workload.draw()))

    def copy(self) -> Stand:
        return Stand(self.workload, deepcopy(self.model), self.batch)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def outcome(self) -> Outcome:
        return self.workload.forward(self.model, self.batch)


@dataclass(frozen=True)
class Contestant:
    """A way to take a step.

    Args:
        name: What the tables call it.
        build: From a stand to a function that takes one step: forward, backward, optimizer.
        rows: Does it take gradients of single losses? Such contestants race one another.
        period: Steps after which it repeats itself.
        obstacle: Why it cannot take part with this workload, or None.
        of_peer: Is it somebody else's work, which may refuse a model?
    """

    name: str
    build: Callable[[Stand], Step]
    rows: bool = False
    period: int = 1
    obstacle: Callable[[Workload], str | None] = lambda workload: None
    of_peer: bool = False


def forward(stand: Stand) -> Step:
    """What every step begins with."""
    return stand.outcome


def plain(stand: Stand) -> Step:
    """One step of the loop that everybody writes."""

    def step() -> None:
        stand.optimizer.zero_grad()
        sum(stand.outcome().losses.values()).backward()
        stand.optimizer.step()

    return step


def limit(stand: Stand) -> Step:
    """What exact per-loss gradients cost at least: one differentiation per loss, and their sum."""
    params = stand.params

    def step() -> None:
        stand.optimizer.zero_grad()
        losses = list(stand.outcome().losses.values())
        totals: list[Tensor | None] = [None] * len(params)
        own = [False] * len(params)
        for k, loss in enumerate(losses):
            keep = k < len(losses) - 1
            row = torch.autograd.grad(loss, params, retain_graph=keep, allow_unused=True)
            for column, gradient in enumerate(row):
                if gradient is None:
                    continue
                total = totals[column]
                if total is None:
                    totals[column] = gradient
                elif own[column]:
                    total.add_(gradient)
                else:  # the first may be memory of somebody else's
                    totals[column], own[column] = total + gradient, True
        for param, total in zip(params, totals, strict=True):
            param.grad = total
        stand.optimizer.step()

    return step


def balanced(
    weighting: Weighting, at_features: bool = False, exact: bool = False, **arguments: Any
) -> Callable[[Stand], Step]:
    """The same loop through the wrapper."""

    def build(stand: Stand) -> Step:
        optimizer = BalancedOptimizer(stand.optimizer, weighting, **arguments)

        def step() -> None:
            optimizer.zero_grad()
            outcome = stand.outcome()
            features = outcome.features if at_features else None
            optimizer.backward(outcome.losses, features=features, exact=exact)
            optimizer.step()

        return step

    return build


def observed(weighting: Weighting) -> Callable[[Stand], Step]:
    """Through the wrapper, for a method that evaluates the losses again after the step."""

    def build(stand: Stand) -> Step:
        optimizer = BalancedOptimizer(stand.optimizer, weighting)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.backward(lambda: stand.outcome().losses)
            optimizer.step()

        return step

    return build


def _no_features(workload: Workload) -> str | None:
    return None if workload.has_features else "no features that all losses are computed from"


OWN = (
    Contestant("Sum", balanced(Sum())),
    Contestant("FAMO", observed(FAMO())),
    Contestant("FAMO, every 10", observed(FAMO(every=10)), period=10),
    Contestant("FAMO, lagged", balanced(FAMO(lagged=True))),
    Contestant("SmoothTchebycheff", balanced(SmoothTchebycheff())),
    Contestant("MGDA at features", balanced(MGDA(), at_features=True), obstacle=_no_features),
    Contestant("MGDA, every 10", balanced(MGDA(every=10)), period=10),
    Contestant("AnalyticQP", balanced(AnalyticQP()), rows=True),
    Contestant("MGDA", balanced(MGDA()), rows=True),
    Contestant(
        "MGDA, exact behind features",
        balanced(MGDA(), at_features=True, exact=True),
        rows=True,
        obstacle=_no_features,
    ),
    Contestant("MGDA, streaming", balanced(MGDA(), engine=Streaming()), rows=True),
)
