"""When the learning rate falls: at fixed points of a run, or when the loss no longer does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

SETTLED = 0.7
"""The fraction of a run after which the learning rate falls, and weights are taken for settled."""


class Running(ABC):
    """A schedule under way: hears of each step's loss, and can be saved and resumed."""

    @abstractmethod
    def step(self, loss: Tensor) -> None: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Schedule(ABC):
    """What a recipe says about the learning rate."""

    @abstractmethod
    def begin(self, optimizer: Optimizer, steps: int) -> Running:
        """Start a run of so many steps."""


@dataclass(frozen=True)
class Milestones(Schedule):
    """The learning rate falls to `factor` of itself after each of these fractions of the run."""

    at: tuple[float, ...] = (SETTLED, 0.9)
    factor: float = 0.3

    def begin(self, optimizer: Optimizer, steps: int) -> Running:
        milestones = [int(fraction * steps) for fraction in self.at]
        return _AtMilestones(MultiStepLR(optimizer, milestones, gamma=self.factor))


@dataclass(frozen=True)
class Plateau(Schedule):
    """It falls to `factor` once the mean loss of `every` steps has not fallen `patience` times.

    The loss is R + λD of the training crops, whatever the weighting minimises: held-out images
    have no say in training. `every` steps stand for an epoch; factor and patience are the paper's.
    """

    every: int = 500
    patience: int = 10
    factor: float = 0.5

    def begin(self, optimizer: Optimizer, steps: int) -> Running:
        scheduler = ReduceLROnPlateau(optimizer, factor=self.factor, patience=self.patience)
        return _OnPlateau(scheduler, self.every)


class _AtMilestones(Running):
    def __init__(self, scheduler: MultiStepLR) -> None:
        self._scheduler = scheduler

    def step(self, loss: Tensor) -> None:
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        # MultiStepLR keeps its milestones in a Counter, which a safe load refuses; the recipe has
        # them anyway.
        state = self._scheduler.state_dict()
        return {key: value for key, value in state.items() if key != "milestones"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


class _OnPlateau(Running):
    def __init__(self, scheduler: ReduceLROnPlateau, every: int) -> None:
        self._scheduler = scheduler
        self._every = every
        self._seen = 0
        # On the host once in `every` steps only.
        self._total = torch.zeros(())

    def step(self, loss: Tensor) -> None:
        self._total = self._total.to(loss.device) + loss
        self._seen += 1
        if self._seen == self._every:
            self._scheduler.step(self._total.item() / self._every)
            self._total, self._seen = torch.zeros(()), 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self._scheduler.state_dict(),
            "total": self._total.cpu(),
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state["scheduler"])
        self._total, self._seen = state["total"], state["seen"]
