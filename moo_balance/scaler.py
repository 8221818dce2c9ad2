"""``torch.amp.GradScaler``: its factor, and the order in which it wants to be called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from moo_balance.errors import BalanceError
from moo_balance.ledger import Accumulation, Staged


def loss_scale(scaler: GradScaler | None) -> Tensor | None:
    """The factor a scaler applies to losses; None for one that is absent or disabled."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=_device(scaler)))


def check_ready_to_scale(scaler: GradScaler | None, optimizer: Optimizer) -> None:
    """Refuse to add scaled gradients to unscaled ones."""
    if _stage(scaler, optimizer) == "UNSCALED":
        raise BalanceError(
            "`backward` should come before `scaler.unscale_`. Found gradients that are unscaled "
            "already. Call `scaler.step(optimizer)` and `scaler.update()` first."
        )


def check_one_scale(scaler: GradScaler | None, before: Staged | Accumulation | None) -> None:
    """Refuse to add gradients of one scale to those of another."""
    if before is None or (isinstance(before, Staged) and before.combined):
        return
    if _enabled(scaler) is not _enabled(before.scaler):
        raise BalanceError(
            "Gradients that are added up should be of one scale. Found a `backward` with another "
            "`grad_scaler` than the one before. Give the same one to each `backward` of a step, "
            "and call `zero_grad` between steps."
        )


def check_scaled(staged: Staged | None) -> None:
    """Refuse to have a scaler divide gradients by a scale they never had."""
    if staged is not None and staged.scaler is None and not staged.combined:
        raise BalanceError(
            "A step by `scaler.step` should follow `backward(losses, grad_scaler=scaler)`. Found "
            "gradients that carry no scale, which the scaler would divide by it. Give the scaler "
            "to `backward`."
        )


def check_unscaled(scaler: GradScaler | None, optimizer: Optimizer, wrapped: Optimizer) -> None:
    """Refuse to step on gradients that still carry the scale, or that were unscaled twice."""
    if scaler is None or not scaler.is_enabled():
        return
    if _stage(scaler, wrapped) is not None:
        raise BalanceError(
            "`scaler.unscale_` and `scaler.step` should be given the BalancedOptimizer. Found the "
            "wrapped optimizer in the scaler, which would unscale the same gradients twice."
        )
    if _stage(scaler, optimizer) != "UNSCALED":
        raise BalanceError(
            "A step under a GradScaler should be taken by `scaler.step(optimizer)`. Found "
            "`optimizer.step()`, with gradients that still carry the scale."
        )


def _stage(scaler: GradScaler | None, optimizer: Optimizer) -> str | None:
    """How far the scaler has come with this optimizer, or None if it has not met it."""
    if scaler is None or not scaler.is_enabled():
        return None
    state = scaler._per_optimizer_states
    return state[id(optimizer)]["stage"].name if id(optimizer) in state else None


def _enabled(scaler: GradScaler | None) -> GradScaler | None:
    return None if scaler is None or not scaler.is_enabled() else scaler


def _device(scaler: GradScaler) -> str:
    return str(getattr(scaler, "_device", "cpu"))
