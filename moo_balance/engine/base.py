"""What an engine is: the way per-loss gradients are taken from autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moo_balance.errors import BalanceError

if TYPE_CHECKING:
    from moo_balance.engine.parallel import DataParallel


class Problem(NamedTuple):
    """K losses, and the parameters whose gradients are to be balanced.

    Args:
        names: What the losses are called.
        losses: K 0-d tensors, attached to a graph.
        params: The parameters that receive gradients; all require them.
        measured: Identities of those over which inner products are taken (``shared_params=`` of
            ``BalancedOptimizer``); None for all.
        scale: What every gradient is multiplied by on its way through the graph, as
            ``GradScaler`` does against underflow; None for 1. Gramians are free of it, gradients
            written to ``.grad`` carry it.
        retain_graph: Keep the graph for another pass.
        parallel: The ranks whose gradients are averaged; None for one process.
        features: Tensors through which all losses are computed; empty if none were named.
        vector: The losses side by side as :func:`side_by_side` has them, if somebody has them
            already.
    """

    names: Sequence[str]
    losses: Sequence[Tensor]
    params: Sequence[Tensor]
    measured: frozenset[int] | None = None
    scale: Tensor | None = None
    retain_graph: bool = False
    parallel: DataParallel | None = None
    features: Sequence[Tensor] = ()
    vector: Tensor | None = None

    def seeds(self) -> list[Tensor]:
        """What the backward pass of each loss by itself starts from: the scale."""
        seeds: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for loss in self.losses:
            kind = loss.device, loss.dtype
            if kind not in seeds:
                one = torch.ones((), device=loss.device, dtype=loss.dtype)
                seeds[kind] = one if self.scale is None else self.scale.to(one)
        return [seeds[loss.device, loss.dtype] for loss in self.losses]

    def together(self) -> Tensor:
        """The losses as one vector [K], attached to their graph."""
        return side_by_side(self.losses) if self.vector is None else self.vector


def side_by_side(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one vector [K], attached to their graph if they have one.

    A single root for a backward pass, which starts from the vector of coefficients. Losses of
    different kinds meet on the first one's device, in the widest of their precisions.
    """
    with torch.enable_grad():  # `backward` works under no_grad, as a plain one does
        if len({(loss.dtype, loss.device) for loss in losses}) > 1:
            dtype = reduce(torch.promote_types, [loss.dtype for loss in losses])
            losses = [loss.to(losses[0].device, dtype) for loss in losses]
        return torch.stack(tuple(losses))


class Linearization(ABC):
    """The losses to first order: their Gramian, and any combination of their gradients."""

    @abstractmethod
    def gramian(self) -> Tensor:
        """Inner products of the K gradients, shape [K, K], float32 or better, unscaled."""

    @abstractmethod
    def accumulate(self, coefficients: Tensor) -> None:
        r"""Add :math:`\sum_k c_k \nabla L_k` to ``.grad``. `coefficients` has shape [K]."""

    @abstractmethod
    def combined(self, coefficients: Tensor) -> Tensor:
        r"""The scalar :math:`\sum_k c_k L_k`, with a graph and without any scale."""


class Window(ABC):
    """Several micro-batches whose gradients add up."""

    @abstractmethod
    def add(self, problem: Problem) -> None:
        """Differentiate one more micro-batch."""

    @abstractmethod
    def close(self, problem: Problem) -> Linearization:
        """The window together with its last micro-batch, differentiated when it is asked for."""


class Engine(ABC):
    """Takes gradients. Knows autograd and memory; knows no method by name."""

    @abstractmethod
    def linearize(self, problem: Problem) -> Linearization:
        """Prepare to differentiate; nothing is computed before it is asked for."""

    def window(self) -> Window:
        """An empty window of micro-batches, for gradient accumulation."""
        raise BalanceError(
            "Gradient accumulation should use an engine that keeps one gradient per loss. Found "
            f"{self}. Leave out `engine=` to have PerLoss()."
        )


def weighted_sum(problem: Problem, coefficients: Tensor) -> Tensor:
    """The weighted sum of the losses as one scalar."""
    losses = problem.together()
    with torch.enable_grad():
        return (losses * coefficients.to(losses)).sum()


def weighted_backward(problem: Problem, coefficients: Tensor) -> None:
    """One ordinary backward pass of the weighted sum.

    It runs through ``torch.autograd.backward``, so hooks, data parallelism, sharding and sparse
    gradients behave as they do without balancing.
    """
    losses = problem.together()
    if problem.scale is not None:
        # Not in the losses' own precision: a float16 does not hold a scaler's 65536.
        coefficients = coefficients * problem.scale.to(coefficients)
    torch.autograd.backward(losses, coefficients.to(losses), retain_graph=problem.retain_graph)
