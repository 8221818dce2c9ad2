"""Accelerate: its backward, for losses by name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from moo_balance.integrations import balanced
from moo_balance.optimizer import Closure, Losses


def backward(accelerator: Any, optimizer: Any, losses: Losses | Closure, **options: Any) -> Losses:
    """Balanced gradients, in place of ``accelerator.backward(sum(losses.values()))``.

    Like ``accelerator.backward`` it divides by ``gradient_accumulation_steps`` and minds the loss
    scaler. Within ``accelerator.accumulate`` the micro-batches are one batch to the method: its
    weights are found once, when the last of them is in.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        optimizer: What ``accelerator.prepare`` made of the ``BalancedOptimizer``.
        losses: Scalar tensors by name, or a closure that computes them, for a method that watches
            the step. Bind its batch (``partial(model, batch)``): it may be called again when the
            loop is already at another.
        options: Those of ``BalancedOptimizer.backward``, such as ``features``.

    Returns:
        The losses, divided as said.

    Raises:
        BalanceError: As ``BalancedOptimizer.backward``.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from moo_balance import BalancedOptimizer, MGDA
        >>> from moo_balance.integrations.accelerate import backward
        >>> model, accelerator = torch.nn.Linear(2, 2), Accelerator(cpu=True)
        >>> optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> output = model(torch.ones(1, 2))[0]
        >>> losses = backward(accelerator, optimizer, {"a": output[0] ** 2, "b": output[1] ** 2})
        >>> optimizer.step()
    """
    inner, steps = balanced(optimizer), accelerator.gradient_accumulation_steps

    def shares(losses: Losses) -> Losses:
        if not isinstance(losses, Mapping):
            return losses  # refused where all losses are
        return {name: loss / steps for name, loss in losses.items()}

    with nullcontext() if accelerator.sync_gradients else inner.accumulate():
        return inner.backward(
            (lambda: shares(losses())) if callable(losses) else shares(losses),
            grad_scaler=accelerator.scaler,
            **options,
        )
