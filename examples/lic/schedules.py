"""When the learning rate falls: at fixed points of a run, or when the loss no longer does.

A schedule is a value; ``start`` gives the scheduler of a run, which takes each step's loss, or None
for a skipped step, and can be saved and resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

FIRST_FALL = 0.7
"""The fraction of a run after which the learning rate falls first."""


@dataclass(frozen=True)
class Milestones:
    """The learning rate falls to `factor` of itself after each of these fractions of the run."""

    at: tuple[float, ...] = (FIRST_FALL, 0.9)
    factor: float = 0.3

    def start(self, optimizer: Optimizer, steps: int) -> AtMilestones:
        """Begin a run of so many steps."""
        milestones = [int(fraction * steps) for fraction in self.at]
        return AtMilestones(MultiStepLR(optimizer, milestones, gamma=self.factor))


@dataclass(frozen=True)
class Plateau:
    """It falls to `factor` once the mean loss of `every` steps has not fallen `patience` times.

    The loss is that of the training crops, equally weighted whatever the weighting minimises:
    held-out images have no part in training. `every` steps stand for an epoch; factor and patience
    are those of Balanced R-D.
    """

    every: int = 500
    patience: int = 10
    factor: float = 0.5

    def start(self, optimizer: Optimizer, steps: int) -> OnPlateau:
        """Begin a run of so many steps."""
        scheduler = ReduceLROnPlateau(optimizer, factor=self.factor, patience=self.patience)
        return OnPlateau(scheduler, self.every)


Schedule: TypeAlias = Milestones | Plateau


class AtMilestones:
    """The scheduler of :class:`Milestones`."""

    def __init__(self, scheduler: MultiStepLR) -> None:
        self._scheduler = scheduler

    def step(self, loss: Tensor | None) -> None:
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        # MultiStepLR keeps its milestones in a Counter, which a safe load refuses; the recipe has
        # them anyway.
        state = self._scheduler.state_dict()
        return {key: value for key, value in state.items() if key != "milestones"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


class OnPlateau:
    """The scheduler of :class:`Plateau`."""

    def __init__(self, scheduler: ReduceLROnPlateau, every: int) -> None:
        self._scheduler, self._every = scheduler, every
        # Read on the host only once in `every` steps.
        self._total, self._seen = torch.zeros(()), 0

    def step(self, loss: Tensor | None) -> None:
        if loss is None:
            return
        self._total = self._total.to(loss.device) + loss
        self._seen += 1
        if self._seen == self._every:
            self._scheduler.step(self._total.item() / self._every)
            self._total, self._seen = torch.zeros(()), 0

    def state_dict(self) -> dict[str, Any]:
        scheduler, total = self._scheduler.state_dict(), self._total.cpu()
        return {"scheduler": scheduler, "total": total, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state["scheduler"])
        self._total, self._seen = state["total"], state["seen"]
