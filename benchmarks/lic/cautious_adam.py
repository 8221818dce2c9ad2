"""Adam that takes only the part of its step which the gradient agrees with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from examples.lic.training import Observer, Trainer


@dataclass(frozen=True)
class CautiousAdam(Observer):
    r"""Makes the Adam of a run cautious (Liang et al., arXiv 2411.16085).

    Of the update :math:`u` of a parameter those entries are kept that point against the gradient
    :math:`g`, and they are enlarged as many were dropped:

    .. math::
        u \leftarrow u \circ m \cdot \min\!\Big(\frac{\dim u}{\sum m},\, s\Big), \qquad
        m = [u \circ g < 0]

    What appears to be the authors' code of Balanced R-D trains Solution 1 with it, and the plain
    sum without. It works on the update as a whole, so Adam may have no decoupled weight decay.

    Args:
        largest: s, the largest factor; 10 there.
    """

    largest: float = 10.0

    def begin(self, trainer: Trainer) -> None:
        adam = trainer.optimizer.optimizer
        before: list[Tensor] = []

        def keep(optimizer: Optimizer, *_: Any) -> None:
            before[:] = [p.detach().clone() for p in _parameters(optimizer)]

        @torch.no_grad()
        def mask(optimizer: Optimizer, *_: Any) -> None:
            for parameter, old in zip(_parameters(optimizer), before, strict=True):
                update = parameter - old
                agrees = (update * parameter.grad < 0).to(update.dtype)
                factor = 1 / agrees.mean().clamp(min=1 / self.largest)
                parameter.copy_(old + factor * agrees * update)

        adam.register_step_pre_hook(keep)
        adam.register_step_post_hook(mask)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    groups = optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.grad is not None]
