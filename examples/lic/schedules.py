"""When the learning rate falls: at fixed points of a run, or when the loss no longer does.

A schedule is a value; ``start`` gives the scheduler of a run, which takes each step's loss, or None
for a skipped step, and can be saved and resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

FIRST_FALL = 0.7
"""The fraction of a run after which the learning rate falls first."""


@dataclass(frozen=True)
class Milestones:
    """The learning rate falls to `factor` of itself after each of these fractions of the run."""

    at: tuple[float, ...] = (FIRST_FALL, 0.9)
    factor: float = 0.3

    def start(self, optimizer: Optimizer, steps: int) -> _AtMilestones:
        """Begin a run of so many steps."""
        milestones = [int(fraction * steps) for fraction in self.at]
        return _AtMilestones(optimizer, lambda t: self.factor ** sum(t >= m for m in milestones))


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

    def start(self, optimizer: Optimizer, steps: int) -> _OnPlateau:
        """Begin a run of so many steps."""
        scheduler = _OnPlateau(optimizer, factor=self.factor, patience=self.patience)
        scheduler.every = self.every
        return scheduler


Schedule: TypeAlias = Milestones | Plateau


class _AtMilestones(LambdaLR):
    def step(self, loss: Tensor | None = None) -> None:
        super().step()


class _OnPlateau(ReduceLROnPlateau):
    # In the state dict, as everything that a scheduler has.
    every = 1
    seen = 0
    total = torch.zeros(())

    def step(self, loss: Tensor | None) -> None:
        if loss is None:
            return
        self.total = self.total.to(loss.device) + loss
        self.seen += 1
        if self.seen == self.every:  # read on the host only once in `every` steps
            super().step(self.total.item() / self.every)
            self.total, self.seen = torch.zeros(()), 0
