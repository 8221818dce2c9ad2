"""``torch.amp.GradScaler``: the factor on the losses, and the order of calls that it needs.

This module is used only where a scaler was passed to ``backward``, and in ``GradScaler.step``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from moo_balance._several import parts_of
from moo_balance._torch_internals import scaler_device, scaler_stage
from moo_balance.errors import BalanceError


class Scaling(NamedTuple):
    """An enabled scaler.

    ``GradScaler`` identifies an optimizer by ``id``: the BalancedOptimizer must be the one it is
    given, in ``unscale_`` and in ``step``.
    """

    scaler: GradScaler

    def factor(self, default: torch.device) -> Tensor:
        """The present loss scale, a 0-d tensor on the scaler's device.

        Args:
            default: Its device, where the scaler does not say.
        """
        device = scaler_device(self.scaler) or default
        scaled: Tensor = self.scaler.scale(torch.ones((), device=device))
        return scaled

    def check_unscaled(self, optimizer: Optimizer, wrapped: Optimizer) -> None:
        """Refuse a step on gradients that carry the scale, or that were unscaled twice.

        Args:
            optimizer: The BalancedOptimizer that takes the step.
            wrapped: The optimizer inside.
        """
        stages = [scaler_stage(self.scaler, part) for part in parts_of(wrapped)]
        if not all(stage in (None, "UNKNOWN") for stage in stages):
            raise BalanceError(
                "`scaler.unscale_` and `scaler.step` should be given the BalancedOptimizer. Found "
                "the wrapped optimizer in the scaler, which would unscale the same gradients twice."
            )
        if scaler_stage(self.scaler, optimizer) not in ("UNSCALED", "UNKNOWN"):
            raise BalanceError(
                "A step under a GradScaler should be taken by `scaler.step(optimizer)`. Found "
                "`optimizer.step()`, with gradients that still carry the scale."
            )


def read_scaling(scaler: GradScaler | None, optimizer: Optimizer) -> Scaling | None:
    """The scaling of a call with ``grad_scaler=``; None without an enabled scaler.

    Raises:
        BalanceError: The gradients of this step are unscaled already.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    if scaler_stage(scaler, optimizer) == "UNSCALED":
        raise BalanceError(
            "`backward` should come before `scaler.unscale_`. Found gradients that are unscaled "
            "already. Call `scaler.step(optimizer)` and `scaler.update()` first."
        )
    return Scaling(scaler)
