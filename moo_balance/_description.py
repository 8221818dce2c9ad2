"""What a BalancedOptimizer is, as text of several lines."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from torch import Tensor
from torch.nn.parameter import is_lazy

from moo_balance._balancer import Balancer


def describe_optimizer(name: str, balancer: Balancer) -> str:
    """Method, losses, engine, parameters, steps and wrapped optimizer. Reads coefficients.

    Args:
        name: The class.
        balancer: Of the optimizer.
    """
    record = balancer.record
    lines = [
        f"weighting: {balancer.weighting}",
        f"losses: {_describe_losses(balancer)}",
        f"engine: {balancer.engine}",
        f"compared: {_describe_compared(balancer.params, balancer.shared_params)}",
        f"steps: {record.steps}",
        f"optimizer: {balancer.optimizer}",
    ]
    return f"{name}(\n{indent(chr(10).join(lines), '    ')}\n)"


def _describe_losses(balancer: Balancer) -> str:
    metrics, names = balancer.record.metrics, balancer.record.names
    coefficients = {k: f"{float(value):.4g}" for k, value in metrics.coefficients.items()}
    known = names or metrics.names
    if not known:
        return "none so far"
    return ", ".join(
        f"{each} × {coefficients[each]}" if each in coefficients else each for each in known
    )


def _describe_compared(params: Sequence[Tensor], shared: Sequence[Tensor] | None) -> str:
    """How many of the parameters that train are compared, and of how many elements."""
    if shared is None:
        return f"all {len(params)} parameters of {_count(params):,} elements"
    ids = set(map(id, shared))
    compared = [param for param in params if id(param) in ids]
    return (
        f"{len(compared)} of {len(params)} parameters, "
        f"{_count(compared):,} of {_count(params):,} elements"
    )


def _count(params: Sequence[Tensor]) -> int:
    """Elements of all parameters; those that a first call of the model makes are not there yet."""
    return sum(0 if is_lazy(param) else param.numel() for param in params)
