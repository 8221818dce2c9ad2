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

from moo_balance.engine.autograd import (
    has_reentrant_checkpoint,
    in_static_graph,
    is_flattened,
    nodes_above,
)
from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    remove_loss_scale,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.distributed import is_sharded
from moo_balance.engine.features import FeatureGramian
from moo_balance.engine.per_loss import PerLossLinearization
from moo_balance.engine.products import add_products
from moo_balance.engine.streaming.partition import Segment, partition
from moo_balance.engine.streaming.sweep import BackwardSweep
from moo_balance.errors import BalanceError, BalanceValueError


@dataclass(frozen=True)
class Streaming(Engine):
    """Differentiate K losses segment by segment; keep no gradient longer than its inner products.

    The graph is cut into segments of neighbouring layers. In each, every loss is differentiated
    from the cut above to the cut below; the K gradients of its parameters are multiplied with each
    other and freed. Once the weights are known, one ordinary backward pass of the weighted sum
    follows, so that hooks and data parallelism see what they always see.

    Time: K passes, and one more. Memory beyond a plain step, in place of the K·P elements of
    :class:`PerLoss`: K gradients of one segment's parameters, and K gradients at the activations
    that cross the cut below it. Linear layers stay factored as in :class:`PerLoss`.

    There is no cut where a gradient would cross in parts: within a residual block, beneath a skip
    connection, or between two uses of one parameter (a recurrence, tied weights). Nor is there one
    where a hook on an activation or a module would see a gradient twice; hooks are found by
    sending zeros where a cut is wanted. A hook that only observes, and computes nothing, is not
    found: it may see those zeros, and a gradient twice. Accumulation windows need
    :class:`PerLoss`, as do sharded parameters and reentrant checkpoints.

    Args:
        elements_per_param: How many gradient elements may be kept for all losses together, in
            multiples of the number of parameter elements; above 0. Default 0.5. In any case 2²⁰
            elements (4 MiB in float32) may be kept, so that a small model is one segment. Where no
            cut does with what is allowed, the cuts are those that do with little.
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
                "Parameter `elements_per_param` of Streaming should be above 0. Found "
                f"{self.elements_per_param!r}. Pass how many gradient elements may be kept for all "
                "losses together, in multiples of the number of parameter elements."
            )

    def linearize(self, problem: Problem) -> Linearization:
        if problem.features:
            return FeatureGramian(problem, self.dtype)
        split = partial(partition, elements_per_param=self.elements_per_param)
        return StreamingLinearization(problem, self.dtype, split)


@dataclass
class StreamingLinearization(Linearization):
    """One batch. `split` makes segments of the nodes of its graph, or none to leave it whole."""

    problem: Problem
    dtype: torch.dtype
    split: Callable[[Problem, Collection[Node]], list[Segment]]

    def gramian(self) -> Tensor:
        problem, nodes = self.problem, nodes_above(self.problem.losses)
        _check_surroundings(problem, has_reentrant_checkpoint(nodes))
        if problem.compared is not None:
            compared = [problem.params[k] for k in sorted(problem.compared)]
            problem = problem._replace(params=compared, compared=None)
        segments = self.split(problem, nodes)
        _check_same_on_all_ranks(problem, segments)
        if not segments:
            whole = problem._replace(retain_graph=True)
            return PerLossLinearization(whole, self.dtype).gramian()
        sweep, count = BackwardSweep(problem), len(problem.losses)
        gramian = torch.zeros(count, count, dtype=self.dtype, device=problem.losses[0].device)
        for number, segment in enumerate(segments):
            for products, losses in sweep.pass_segment(segment, number, self.dtype):
                gramian = add_products(gramian, products, losses)
        return remove_loss_scale(gramian, problem.scale)

    def add_to_grad(self, coefficients: Tensor) -> None:
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
    elif problem.averager is not None and in_static_graph(problem.losses):
        obstacle = "DistributedDataParallel with `static_graph=True`"
    if obstacle is not None:
        raise BalanceError(
            f"A model under Streaming() should be differentiable in segments. Found {obstacle}. "
            "Leave out `engine=` to have PerLoss()."
        )


def _check_same_on_all_ranks(problem: Problem, segments: Sequence[Segment]) -> None:
    """Ranks average segment by segment, so they must have cut their graphs alike."""
    if problem.averager is None:
        return
    digest = float(crc32(repr([segment.param_indices for segment in segments]).encode()))
    device = problem.losses[0].device
    extremes = torch.tensor([digest, -digest], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=problem.averager.group)
    highest, lowest = extremes.tolist()
    if highest != -lowest:
        raise BalanceError(
            "The losses of all ranks should have the same graph under Streaming(). Found different "
            "ones. Leave out `engine=` to have PerLoss()."
        )
