"""The exact Gramian without K whole gradients: a few layers at a time, then one weighted pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node

from moo_balance.engine.autograd import has_reentrant_checkpoint, in_static_graph, nodes_above
from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    remove_loss_scale,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.descent import Descent
from moo_balance.engine.distributed import is_flattened, is_sharded
from moo_balance.engine.features import FeatureGramian
from moo_balance.engine.portions import Portion, portions
from moo_balance.engine.products import add_products
from moo_balance.errors import BalanceError, BalanceValueError


@dataclass(frozen=True)
class Streaming(Engine):
    """Go down the graph once with all K losses, and keep no gradient longer than its products.

    The graph is cut into portions of neighbouring layers. In each, every loss is differentiated
    from the cut above to the cut below; the K gradients of the portion's parameters are multiplied
    with each other and dropped. Once the weights are known, one ordinary backward pass of the
    weighted sum follows, so that hooks and data parallelism see what they always see.

    Time: K passes, and one more. Memory beyond a plain step, in place of the K·P numbers of
    :class:`PerLoss`: K gradients of one portion's parameters, and K gradients at the activations
    that cross the cut below it. Cuts are made where these are fewest. Linear layers stay factored
    as in :class:`PerLoss`; then the K gradients at the cut above the layer are one of its factors,
    and are not there twice.

    A parameter that several portions use is kept until the last of them. Where somebody's hook on
    an activation or a module would see a gradient in parts, there is no cut; a hook on an
    activation is found by sending it zeros, where a cut is wanted. One that only looks on, and
    computes nothing, is not found: beside each loss's gradient it may see those zeros, and a
    gradient twice. Accumulation windows need :class:`PerLoss`, as do sharded parameters and
    reentrant checkpoints.

    Args:
        memory: How many numbers may be kept for all losses together, in multiples of the number of
            parameters; above 0. Default 0.5. What is too small to be noticed is not saved: 2²⁰
            numbers (4 MiB in float32) may be kept whatever this says, so that a small model is one
            portion. Where no cuts do with as much as is allowed, those are made that do with the
            least, or with up to 2²⁰ numbers more.
        dtype: Precision of the Gramian, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own.

    Raises:
        BalanceValueError: `memory` is not above 0.
    """

    memory: float = 0.5
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self.memory > 0:
            raise BalanceValueError(
                "Parameter `memory` of Streaming should be above 0, in multiples of the number of "
                f"parameters. Found {self.memory!r}."
            )

    def linearize(self, problem: Problem) -> Linearization:
        if problem.features:
            return FeatureGramian(problem, self.dtype)
        return Streamed(problem, self.dtype, partial(portions, memory=self.memory))


@dataclass
class Streamed(Linearization):
    """One batch: products on the way down, gradients in a pass of their own.

    Args:
        problem: The losses, and their parameters.
        dtype: Precision of the Gramian at least.
        plan: From a problem, the nodes that it reaches and the parameters that count to portions.
    """

    problem: Problem
    dtype: torch.dtype
    plan: Callable[[Problem, Collection[Node], Collection[int]], list[Portion]]

    def gramian(self) -> Tensor:
        problem = self.problem
        nodes = nodes_above(problem.losses)
        _check_surroundings(problem, has_reentrant_checkpoint(nodes))
        columns = range(len(problem.params)) if problem.compared is None else problem.compared
        plan = self.plan(problem, nodes, columns)
        _check_same_on_all_ranks(problem, plan)
        descent, count = Descent(problem), len(problem.losses)
        gramian = torch.zeros(count, count, dtype=self.dtype, device=problem.losses[0].device)
        for number, portion in enumerate(plan):
            for products, reached in descent.through(portion, number, self.dtype):
                gramian = add_products(gramian, products, reached)
        return remove_loss_scale(gramian, problem.scale)

    def add_to_grad(self, coefficients: Tensor) -> None:
        weighted_backward(self.problem, coefficients)

    def combined(self, coefficients: Tensor) -> Tensor:
        return weighted_sum(self.problem, coefficients)


def _check_surroundings(problem: Problem, reentrant: bool) -> None:
    """Refuse what whole backward passes alone get right."""
    found = None
    if is_sharded(problem.params) or is_flattened(problem.params):
        found = "sharded parameters"
    elif reentrant:
        found = "a reentrant checkpoint (or pass `use_reentrant=False`)"
    elif problem.averager is not None and in_static_graph(problem.losses):
        found = "DistributedDataParallel with `static_graph=True`"
    if found is not None:
        raise BalanceError(
            f"A model under Streaming() should be differentiable in portions. Found {found}. Leave "
            "out `engine=` to have PerLoss()."
        )


def _check_same_on_all_ranks(problem: Problem, plan: Sequence[Portion]) -> None:
    """Ranks average portion by portion, so they must have cut their graphs alike."""
    if problem.averager is None:
        return
    digest = float(crc32(repr([portion.columns for portion in plan]).encode()))
    device = problem.losses[0].device
    extremes = torch.tensor([digest, -digest], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=problem.averager.group)
    highest, lowest = extremes.tolist()
    if highest != -lowest:
        raise BalanceError(
            "The losses of all ranks should have the same graph under Streaming(). Found different "
            "ones. Leave out `engine=` to have PerLoss()."
        )
