"""What an engine is: the way per-loss gradients are taken from autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.engine.parallel import DataParallel
from moo_balance.errors import BalanceError


@dataclass(frozen=True)
class Problem:
    """K losses, and the parameters whose gradients are to be balanced.

    Args:
        names: What the losses are called.
        losses: K 0-d tensors, attached to a graph.
        params: The parameters that receive gradients; all require them.
        measured: Identities of those over which inner products are taken (``params=`` of
            ``BalancedOptimizer``); None for all.
        scale: What every gradient is multiplied by on its way through the graph, as
            ``GradScaler`` does against underflow; None for 1. Gramians are free of it, gradients
            written to ``.grad`` carry it.
        retain_graph: Keep the graph for another pass.
        parallel: The ranks whose gradients are averaged; None for one process.
        features: Tensors through which all losses are computed; empty if none were named.
        exact: With features, take the Gramian over parameters all the same.
    """

    names: Sequence[str]
    losses: Sequence[Tensor]
    params: Sequence[Tensor]
    measured: frozenset[int] | None = None
    scale: Tensor | None = None
    retain_graph: bool = False
    parallel: DataParallel | None = None
    features: Sequence[Tensor] = ()
    exact: bool = False

    def seeds(self, coefficients: Tensor | None = None) -> list[Tensor]:
        """What the backward pass starts from at each loss: coefficient times scale."""
        if coefficients is None:
            # Not in the losses' own precision: a float16 does not hold a scaler's 65536.
            coefficients = torch.ones(len(self.losses), device=self.losses[0].device)
        if self.scale is not None:
            coefficients = coefficients * self.scale.to(coefficients.device)
        kinds = {(loss.device, loss.dtype) for loss in self.losses}
        if len(kinds) == 1:
            return list(coefficients.to(*kinds.pop()).unbind())
        pairs = zip(self.losses, coefficients.unbind(), strict=True)
        return [value.to(loss.device, loss.dtype) for loss, value in pairs]


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
    device = problem.losses[0].device
    pairs = zip(problem.losses, coefficients.unbind(), strict=True)
    return torch.stack([(loss * c.to(loss)).to(device) for loss, c in pairs]).sum()


def weighted_backward(problem: Problem, coefficients: Tensor) -> None:
    """One ordinary backward pass of the weighted sum.

    It runs through ``torch.autograd.backward``, so hooks, data parallelism, sharding and sparse
    gradients behave as they do without balancing.
    """
    torch.autograd.backward(
        list(problem.losses), problem.seeds(coefficients), retain_graph=problem.retain_graph
    )
