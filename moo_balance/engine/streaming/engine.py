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

from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.bottleneck import AtFeatures
from moo_balance.engine.graph import checkpoints_reentrantly, nodes_above
from moo_balance.engine.kept_rows import measured_columns, unscaled
from moo_balance.engine.parallel import in_static_graph
from moo_balance.engine.products import added
from moo_balance.engine.sharded import is_flattened, is_sharded
from moo_balance.engine.streaming.partition import Segment, partition
from moo_balance.engine.streaming.sweep import BackwardSweep
from moo_balance.errors import BalanceError, BalanceValueError


@dataclass(frozen=True)
class Streaming(Engine):
    """Differentiate K losses segment by segment; keep no gradient longer than its inner products.

    The graph is cut into segments of neighbouring layers. In each, every loss is differentiated
    from the cut above to the cut below; the K gradients of the segment's parameters are multiplied
    with each other and freed. Once the weights are known, one ordinary backward pass of the
    weighted sum follows, so that hooks and data parallelism see what they always see.

    Time: K passes, and one more. Memory beyond a plain step, in place of the K·P elements of
    :class:`PerLoss`: K gradients of one segment's parameters, and K gradients at the activations
    that cross the cut below it. Cuts are made where these are few. Linear layers stay factored as
    in :class:`PerLoss`; K gradients that cross a cut right above a layer are then one of its
    factors, and are not held twice.

    There is no cut where a gradient would cross in parts: within a residual block, below a skip
    connection, or between two uses of one parameter (a recurrence, tied weights). Nor is there one
    where a hook on an activation or a module would see a gradient twice; such a hook is found by
    sending zeros to it, where a cut is wanted. A hook that only observes, and computes nothing, is
    not found: it may see those zeros, and a gradient twice. Accumulation windows need
    :class:`PerLoss`, as do sharded parameters and reentrant checkpoints.

    Args:
        elements_per_param: How many gradient elements may be kept for all losses together, in
            multiples of the number of parameter elements; above 0. Default 0.5. Savings of less
            than 2²⁰ elements (4 MiB in float32) are not worth a cut: so many may be kept in any
            case, and a small model is one segment. Where no cut does with as much as is allowed,
            those are made that do with little.
        dtype: Precision of the Gramian, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own.

    Raises:
        BalanceValueError: `elements_per_param` is not above 0.
    """

    elements_per_param: float = 0.5
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self.elements_per_param > 0:
            raise BalanceValueError(
                "Parameter `elements_per_param` of Streaming should be above 0: gradient elements "
                "to keep for all losses together, for each parameter element. Found "
                f"{self.elements_per_param!r}. Leave it out to have 0.5."
            )

    def linearize(self, problem: Problem) -> Linearization:
        if problem.features:
            return AtFeatures(problem, self.dtype)
        split = partial(partition, elements_per_param=self.elements_per_param)
        return StreamingLinearization(problem, self.dtype, split)


@dataclass
class StreamingLinearization(Linearization):
    """One batch: inner products segment by segment, gradients in a pass of their own.

    Args:
        problem: The losses and the parameters.
        dtype: Precision of the Gramian at least.
        split: From a problem, the nodes that it reaches and the compared parameters to segments.
    """

    problem: Problem
    dtype: torch.dtype
    split: Callable[[Problem, Collection[Node], Collection[int]], list[Segment]]

    def gramian(self) -> Tensor:
        problem, count = self.problem, len(self.problem.losses)
        nodes = nodes_above(problem.losses)
        _check_surroundings(problem, checkpoints_reentrantly(nodes))
        segments = self.split(problem, nodes, measured_columns(problem))
        _check_same_on_all_ranks(problem, segments)
        sweep = BackwardSweep(problem)
        gramian = torch.zeros(count, count, dtype=self.dtype, device=problem.losses[0].device)
        for number, segment in enumerate(segments):
            for products, losses in sweep.pass_segment(segment, number, self.dtype):
                gramian = added(gramian, products, losses)
        return unscaled(gramian, problem)

    def accumulate(self, coefficients: Tensor) -> None:
        weighted_backward(self.problem, coefficients)

    def combined(self, coefficients: Tensor) -> Tensor:
        return weighted_sum(self.problem, coefficients)


def _check_surroundings(problem: Problem, reentrant: bool) -> None:
    """Refuse what only whole backward passes differentiate correctly."""
    obstacle = None
    if is_sharded(problem.params) or is_flattened(problem.params):
        obstacle = "sharded parameters"
    elif reentrant:
        obstacle = "a reentrant checkpoint (or pass `use_reentrant=False`)"
    elif problem.parallel is not None and in_static_graph(problem.losses):
        obstacle = "DistributedDataParallel with `static_graph=True`"
    if obstacle is not None:
        raise BalanceError(
            f"A model under Streaming() should be differentiable in segments. Found {obstacle}. "
            "Leave out `engine=` to have PerLoss()."
        )


def _check_same_on_all_ranks(problem: Problem, segments: Sequence[Segment]) -> None:
    """Ranks average segment by segment, so they must have cut their graphs alike."""
    if problem.parallel is None:
        return
    digest = float(crc32(repr([segment.param_indices for segment in segments]).encode()))
    device = problem.losses[0].device
    extremes = torch.tensor([digest, -digest], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=problem.parallel.group)
    highest, lowest = extremes.tolist()
    if highest != -lowest:
        raise BalanceError(
            "The losses of all ranks should have the same graph under Streaming(). Found different "
            "ones. Leave out `engine=` to have PerLoss()."
        )
