"""TensorBoard: the figures of a step, one chart each or one chart for a kind."""

from __future__ import annotations

from typing import Any

from moo_balance.integrations import balanced


def add_balance(
    writer: Any, optimizer: Any, step: int, *, prefix: str = "moo/", grouped: bool = False
) -> None:
    """Write ``optimizer.log_dict()`` to a ``SummaryWriter``.

    Args:
        writer: Anything with ``add_scalar`` and ``add_scalars``.
        optimizer: A ``BalancedOptimizer``, or what a framework made of it.
        step: Where on the axis.
        prefix: What the tags begin with.
        grouped: Draw the losses' weights into one chart, likewise their coefficients, and so on,
            with ``add_scalars``. Default False: TensorBoard keeps a file of its own for each curve
            in such a chart.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from moo_balance import BalancedOptimizer, Sum
        >>> from moo_balance.integrations.tensorboard import add_balance
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Sum())
        >>> losses = optimizer.backward({"a": w**2, "b": w**4})
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     add_balance(writer, optimizer, step=0)
    """
    charts: dict[str, dict[str, float]] = {}
    for key, value in balanced(optimizer).log_dict(prefix="").items():
        kind, _, name = key.partition("/")
        if grouped and name:
            charts.setdefault(kind, {})[name] = value
        else:
            writer.add_scalar(prefix + key, value, step)
    for kind, values in charts.items():
        writer.add_scalars(prefix + kind, values, step)
