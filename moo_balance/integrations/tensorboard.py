"""TensorBoard: the metrics of a step, one chart each or one chart per kind."""

from __future__ import annotations

from typing import Any

from moo_balance.integrations import unwrap_optimizer


def add_metrics(
    writer: Any, optimizer: Any, step: int, *, prefix: str = "moo/", grouped: bool = False
) -> None:
    """Write ``optimizer.log_dict()`` to a ``SummaryWriter``.

    Args:
        writer: Anything with ``add_scalar`` and ``add_scalars``.
        optimizer: A ``BalancedOptimizer``, or a framework's wrapper around one.
        step: Position on the horizontal axis.
        prefix: Prefix of the tags.
        grouped: Draw the losses' weights into one chart, likewise their coefficients, and so on,
            with ``add_scalars``. Default False: for such a chart TensorBoard writes one file per
            curve.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from moo_balance import BalancedOptimizer, Sum
        >>> from moo_balance.integrations.tensorboard import add_metrics
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Sum())
        >>> losses = optimizer.backward({"a": w**2, "b": w**4})
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     add_metrics(writer, optimizer, step=0)
    """
    charts: dict[str, dict[str, float]] = {}
    for key, value in unwrap_optimizer(optimizer).log_dict(prefix="").items():
        kind, _, name = key.partition("/")
        if grouped and name:
            charts.setdefault(kind, {})[name] = value
        else:
            writer.add_scalar(prefix + key, value, step)
    for kind, values in charts.items():
        writer.add_scalars(prefix + kind, values, step)
