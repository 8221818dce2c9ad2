"""What a framework needs beyond an ordinary optimizer; one module each.

A module imports its framework only for classes that derive from the framework's: ``lightning`` and
``transformers`` with the module, ``torchjd`` with the first object. ``accelerate`` and
``tensorboard`` work on the objects that are passed to them.
"""

from __future__ import annotations

from typing import Any

from moo_balance.errors import BalanceValueError
from moo_balance.optimizer import BalancedOptimizer

__all__ = ["unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> BalancedOptimizer:
    """The :class:`~moo_balance.BalancedOptimizer` inside a framework's wrapper.

    Accelerate (and with it the Trainer of transformers) and Lightning wrap the optimizers they are
    given. Accelerate's wrapper forwards only what ``torch.optim.Optimizer`` has.

    Args:
        optimizer: A ``BalancedOptimizer``, or a framework's wrapper around one.

    Raises:
        BalanceValueError: It contains none.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, Sum
        >>> from moo_balance.integrations import unwrap_optimizer
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Sum())
        >>> unwrap_optimizer(optimizer) is optimizer
        True
    """
    innermost = find_balanced(optimizer)
    if innermost is None:
        raise BalanceValueError(
            "Parameter `optimizer` should be a BalancedOptimizer, or a framework's wrapper around "
            f"one. Found {type(optimizer).__name__}. Wrap the optimizer before the framework does."
        )
    return innermost


def find_balanced(optimizer: Any) -> BalancedOptimizer | None:
    """What :func:`unwrap_optimizer` returns, or None."""
    innermost, layer = None, optimizer
    while layer is not None:
        # The innermost: Lightning's wrapper claims the class of what it wraps.
        innermost = layer if isinstance(layer, BalancedOptimizer) else innermost
        layer = getattr(layer, "optimizer", None)
    return innermost
