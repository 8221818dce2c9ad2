"""Lightning: what ``manual_backward`` and the trainer's backward do, for losses by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moo_balance._balancer import Closure, Losses
from moo_balance.integrations import unwrap_optimizer


def backward(
    module: Any, losses: Losses | Closure, optimizer: Any = None, **options: Any
) -> Losses:
    """Balanced gradients, in place of ``self.manual_backward(sum(losses.values()))``.

    For manual optimisation. It passes on the loss scaler of ``precision="16-mixed"`` and calls
    ``strategy.pre_backward``, without which Lightning's DistributedDataParallel does not
    synchronise gradients. The hooks ``on_before_backward`` and ``on_after_backward`` take a single
    loss and are not called.

    Args:
        module: The ``LightningModule``: ``self``, in ``training_step``.
        losses: Scalar tensors by name, or a closure that computes them, for a method that
            needs the losses after the step.
        optimizer: Which of ``self.optimizers()``. Default: the only one.
        options: Those of ``BalancedOptimizer.backward``, such as ``features``.

    Returns:
        The losses.

    Raises:
        BalanceError: As ``BalancedOptimizer.backward``.

    Example::

        def training_step(self, batch, batch_index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            backward(self, partial(self.losses, batch))
            optimizer.step()
            self.log_dict(optimizer.log_dict())
    """
    strategy = module.trainer.strategy

    def announce(losses: Losses) -> Losses:
        if torch.is_grad_enabled() and isinstance(losses, Mapping):
            strategy.pre_backward(list(losses.values()))
        return losses

    inner = unwrap_optimizer(module.optimizers() if optimizer is None else optimizer)
    evaluated = inner.backward(
        (lambda: announce(losses())) if callable(losses) else announce(losses),
        grad_scaler=_scaler(module),
        **options,
    )
    strategy.post_backward(next(iter(evaluated.values())))
    return evaluated


def combined_loss(module: Any, losses: Losses, optimizer: Any = None, **options: Any) -> Tensor:
    """One scalar to return from ``training_step``, whose gradient is the balanced gradient.

    For automatic optimisation: ``BalancedOptimizer.combined_loss`` with the trainer's loss scaler.

    Args:
        module: The ``LightningModule``: ``self``, in ``training_step``.
        losses: Scalar tensors by name.
        optimizer: Which of ``self.optimizers()``. Default: the only one.
        options: Those of ``BalancedOptimizer.combined_loss``, such as ``features``.

    Raises:
        BalanceError: As ``BalancedOptimizer.combined_loss``.

    Example::

        def training_step(self, batch, batch_index):
            combined = combined_loss(self, self.losses(batch))
            self.log_dict(self.optimizers().log_dict())
            return combined
    """
    inner = unwrap_optimizer(module.optimizers() if optimizer is None else optimizer)
    return inner.combined_loss(losses, grad_scaler=_scaler(module), **options)


def _scaler(module: Any) -> Any:
    """The loss scaler; the precision plugin has one for ``"16-mixed"`` only."""
    return getattr(module.trainer.strategy.precision_plugin, "scaler", None)
