"""What a framework needs beyond an ordinary optimizer; one module each, imported on demand.

None of them imports its framework: they are handed its objects.
"""

from __future__ import annotations

from typing import Any

from moo_balance.errors import BalanceValueError
from moo_balance.optimizer import BalancedOptimizer

__all__ = ["balanced"]


def balanced(optimizer: Any) -> BalancedOptimizer:
    """The :class:`~moo_balance.BalancedOptimizer` behind a framework's stand-in for it.

    Accelerate (and with it the Trainer of transformers) and Lightning wrap the optimizers they are
    given. Accelerate's wrapper forwards nothing that ``torch.optim.Optimizer`` does not have.

    Args:
        optimizer: A ``BalancedOptimizer``, or what a framework made of it.

    Raises:
        BalanceValueError: There is none inside.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, Sum
        >>> from moo_balance.integrations import balanced
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Sum())
        >>> balanced(optimizer) is optimizer
        True
    """
    found, link = None, optimizer
    while link is not None:
        # The last one: Lightning's stand-in imitates the class of what it stands for.
        found = link if isinstance(link, BalancedOptimizer) else found
        link = getattr(link, "optimizer", None)
    if found is None:
        raise BalanceValueError(
            "Parameter `optimizer` should be a BalancedOptimizer, or a framework's wrapper around "
            f"one. Found {type(optimizer).__name__}. Wrap the optimizer before the framework does."
        )
    return found
