"""Accelerate: its backward, for losses by name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from moo_balance._balancer import Closure, Losses
from moo_balance.integrations import unwrap_optimizer


def backward(accelerator: Any, optimizer: Any, losses: Losses | Closure, **options: Any) -> Losses:
    """Balanced gradients, in place of ``accelerator.backward(sum(losses.values()))``.

    Like ``accelerator.backward`` it divides by ``gradient_accumulation_steps`` and applies the loss
    scaler. Within ``accelerator.accumulate`` the micro-batches are one batch to the method, whose
    weights are computed once, with the last of them.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        optimizer: The ``BalancedOptimizer`` as ``accelerator.prepare`` returned it.
        losses: Scalar tensors by name, or a closure that computes them, for a method that
            needs the losses after the step. Bind its batch (``partial(model, batch)``): it may be
            called again when the loop has already fetched the next one.
        options: Those of ``BalancedOptimizer.backward``, such as ``features``.

    Returns:
        The losses, divided by ``gradient_accumulation_steps``.

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
    inner, steps = unwrap_optimizer(optimizer), accelerator.gradient_accumulation_steps

    def divide(losses: Losses) -> Losses:
        if not isinstance(losses, Mapping):
            return losses  # `backward` refuses it
        return {name: loss / steps for name, loss in losses.items()}

    with nullcontext() if accelerator.sync_gradients else inner.accumulate():
        return inner.backward(
            (lambda: divide(losses())) if callable(losses) else divide(losses),
            grad_scaler=accelerator.scaler,
            **options,
        )
