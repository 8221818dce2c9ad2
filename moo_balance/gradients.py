"""Functional use: a balanced backward pass, and a Gramian, without an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moo_balance._validation import check_stateless, read_engine, read_losses, read_named_params
from moo_balance.engine import Engine, Problem
from moo_balance.monitor import StepMetrics
from moo_balance.optimizer import BalancedOptimizer
from moo_balance.weighting.base import Weighting


def balanced_backward(
    losses: Mapping[str, Tensor],
    params: nn.Module | Iterable[Tensor],
    weighting: Weighting,
    *,
    shared_params: Iterable[Tensor] | nn.Module | None = None,
    engine: Engine | None = None,
    features: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> StepMetrics:
    r"""Add the balanced gradient to ``.grad``, as ``BalancedOptimizer.backward`` does in one step.

    .. math:: \texttt{.grad} \mathrel{+}= \sum_k c_k \nabla L_k

    The method starts from its initial state in each call, and nothing is kept. So it suits methods
    of a single step, such as ``MGDA()`` or ``SumLog(floor=0)``; one that learns or averages over
    steps (``GradNorm``, ``DWA``, ``MovingAverage``) stays where it starts, and belongs in a
    :class:`BalancedOptimizer`. So do accumulation, loss scalers and the handling of steps that are
    skipped. On several ranks losses and gradients are averaged, as there.

    Args:
        losses: Scalar tensors by name, with a graph.
        params: A module, or the parameters, whose gradients are balanced. Frozen ones are left out.
        weighting: The method.
        shared_params: Parameters, or a module, over which inner products are taken. Default: all.
        engine: How gradients are taken. Default: ``PerLoss()``.
        features: What all losses are computed from, as for ``BalancedOptimizer.backward``.
        retain_graph: Keep the graph for another backward pass. Default False: it is freed.

    Returns:
        Losses, weights, coefficients and Gramian.

    Raises:
        BalanceValueError: A loss or an argument does not fit; the method observes the step, or
            takes the step of an optimizer for each loss (``SeparateMoments``). Nothing has changed.
        NonFiniteError: A loss or gradient is not finite; checked on the CPU only.

    Example:
        >>> import torch
        >>> from moo_balance import MGDA, balanced_backward
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> metrics = balanced_backward({"a": w[0], "b": 2 * w[1]}, [w], MGDA())
        >>> w.grad
        tensor([0.8000, 0.4000])
        >>> round(float(metrics.coefficients["a"]), 2)
        0.8
    """
    check_stateless(weighting)
    trained = [param for _, param in read_named_params(params)]
    carrier = torch.optim.SGD(trained, lr=0.0)  # never steps
    optimizer = BalancedOptimizer(carrier, weighting, shared_params=shared_params, engine=engine)
    optimizer.backward(losses, features=features, retain_graph=retain_graph)
    return optimizer.metrics


def gramian(
    losses: Mapping[str, Tensor],
    params: nn.Module | Iterable[Tensor],
    *,
    engine: Engine | None = None,
    retain_graph: bool = False,
) -> Tensor:
    r"""Inner products of the gradients of several losses.

    .. math:: G_{kl} = \nabla L_k^\top \nabla L_l

    Nothing is written to ``.grad``, and hooks of parameters do not run. Of this process only: on
    several ranks each gets the products of its own losses.

    Args:
        losses: K scalar tensors by name, with a graph.
        params: A module, or the parameters, over which products are taken. Frozen ones are left
            out.
        engine: How gradients are taken. Default: ``PerLoss()``, in float32 or better.
        retain_graph: Keep the graph for another backward pass. Default False: it is freed, except
            by ``Streaming``.

    Returns:
        A symmetric matrix [K, K] in the order of `losses`, detached.

    Raises:
        BalanceValueError: A loss is not a scalar with a graph, or there is no parameter.

    Example:
        >>> import torch
        >>> from moo_balance import gramian
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> gramian({"a": w[0], "b": w[0] + 2 * w[1]}, [w])
        tensor([[1., 1.],
                [1., 5.]])
    """
    scalars = read_losses(losses, None)
    problem = Problem(
        tuple(scalars),
        tuple(scalars.values()),
        [param for _, param in read_named_params(params)],
        retain_graph=retain_graph,
    )
    products = read_engine(engine).linearize(problem).gramian()
    return (products + products.mT) / 2  # the triangles may differ by rounding
