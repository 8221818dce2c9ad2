"""The exact Gramian without K whole gradients: a few layers at a time, then one weighted pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from zlib import crc32

import torch
from torch import Tensor
from torch.autograd.graph import Node

from moo_balance.engine.autograd import (
    KeptTensors,
    edge_of,
    gradient_edge,
    has_reentrant_checkpoint,
    in_static_graph,
    nodes_above,
    silence_hooks,
)
from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    Row,
    gradients_of,
    remove_loss_scale,
)
from moo_balance.engine.distributed import average_over_ranks, is_whole
from moo_balance.engine.features import FeatureGramian
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.linear import OutputGradientRecorder, gramian_in_range
from moo_balance.engine.per_loss import PerLossLinearization
from moo_balance.engine.products import narrow
from moo_balance.engine.streaming.partition import Segment, partition
from moo_balance.errors import BalanceError, BalanceValueError

Split = Callable[[Problem, Collection[Node]], list[Segment]]


@dataclass(frozen=True)
class Streaming(Engine):
    """Differentiate K losses segment by segment; keep no gradient longer than its inner products.

    The graph is cut into segments of neighbouring layers. In each, every loss is differentiated
    from the cut above to the cut below; the K gradients of its parameters are multiplied with each
    other and freed. The weighted sum then takes one ordinary backward pass, with all its hooks.

    Time: K passes, and one more; an activation checkpoint is computed again in each. Memory beyond
    a plain step, in place of the K·P elements of :class:`PerLoss`: K gradients of one segment's
    parameters and of the activations that cross the cut below it. Linear layers stay factored as in
    :class:`PerLoss`.

    There is no cut where a gradient would cross in parts: within a residual block, beneath a skip
    connection, between two uses of a parameter (a recurrence, tied weights). Nor is there one
    within an activation checkpoint, or where a hook on an activation or a module would see a
    gradient twice; hooks are found by sending zeros where a cut is wanted, but for those that only
    observe. Accumulation windows, sharded parameters and reentrant checkpoints need
    :class:`PerLoss`.

    Backward functions must be linear in the gradients that they are given, must not edit these, and
    run several times, once for each loss and once for the weighted sum. Some fused losses write
    into what they have saved, so that they may run once only. Where PyTorch knows of the change
    they are refused; a change by way of ``.data`` or a kernel of their own stays unnoticed and
    makes the gradient wrong.

    Args:
        elements_per_param: How many gradient elements may be kept for all losses together, in
            multiples of the number of parameter elements; above 0. Default 0.5. In any case 2²⁰
            elements (4 MiB in float32) may be kept, so that a small model is one segment.
        dtype: Precision of inner products, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own. Gradients may be of any length that their
            own precision holds. On the CPU a Gramian that leaves the range of float32 comes in
            float64. On an accelerator, where the host does not read it, gradients are multiplied by
            powers of two before their products, and the Gramian always comes in float64; on Apple's
            "mps", which has none, their norms should lie between 1e-15 and 1e19.

    Raises:
        BalanceValueError: `elements_per_param` is not above 0.
    """

    elements_per_param: float = 0.5
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self.elements_per_param > 0:
            raise BalanceValueError(
                "Parameter `elements_per_param` of Streaming should be above 0, such as 0.5. "
                f"Found {self.elements_per_param!r}."
            )

    def linearize(self, problem: Problem) -> Linearization:
        if problem.features:
            return FeatureGramian(problem, self.dtype)
        split = partial(partition, per_param=self.elements_per_param)
        return StreamingLinearization(problem, self.dtype, split)


class StreamingLinearization(PerLossLinearization):
    """One batch. No gradient is kept for the weighted sum, so that it takes a pass of its own."""

    def __init__(self, problem: Problem, dtype: torch.dtype, split: Split) -> None:
        super().__init__(problem, dtype)
        self.split = split

    def gramian(self) -> Tensor:
        nodes = nodes_above(self.problem.losses)
        kept = KeptTensors.of(nodes)
        gramian = self._gramian(nodes)
        _check_unchanged(kept)
        return gramian

    def _gramian(self, nodes: Collection[Node]) -> Tensor:
        problem = self.problem
        _check_surroundings(problem, has_reentrant_checkpoint(nodes))
        if problem.compared is not None:
            params = [problem.params[k] for k in sorted(problem.compared)]
            problem = problem._replace(params=params, compared=None)
        segments = self.split(problem, nodes)
        _check_same_on_all_ranks(problem, segments)
        if not segments:
            return PerLossLinearization(problem._replace(retain_graph=True), self.dtype).gramian()
        sweep = BackwardSweep(problem, self.dtype)
        parts = (sweep.pass_segment(segment, k) for k, segment in enumerate(segments))
        return self._sum(parts)

    def _sum(self, parts: Iterable[Tensor]) -> Tensor:
        """The sum of the segments' products, without the loss scale; on the CPU in float64."""
        total = reduce(torch.add, (part.double() if part.is_cpu else part for part in parts))
        total = remove_loss_scale(total, self.problem.scale)
        kinds = {param.dtype.to_real() for param in self.problem.params}
        dtype = reduce(torch.promote_types, kinds, self.dtype)
        return narrow(total, dtype) if total.is_cpu else total


class BackwardSweep:
    """The gradients of K losses, at the edges where they have arrived.

    A sweep takes them down segment by segment::

        loss_1 ... loss_K       arrived[k] = {edge of loss_k: its own gradient}
        --------------------
        segment 0: the heads    K calls of autograd.grad, from the arrived gradients
           |                      to the parameters: K rows --> [K, K], then freed
           v                      to the leaving edges
        --------------------    arrived[k] = {edge of the features: gradient of loss_k}
        segment 1: layers       the same; what had arrived of a loss is freed with its call
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem, self.dtype = problem, dtype
        losses = zip(problem.losses, problem.grad_outputs(), strict=True)
        self.arrived = [{edge_of(loss): gradient} for loss, gradient in losses]
        self.silenced = silence_hooks(problem.params)

    def pass_segment(self, segment: Segment, number: int) -> Tensor:
        """Inner products [K, K] of the gradients that are completed in this segment."""
        params = [self.problem.params[k] for k in segment.param_indices]
        names = [f"{name}, segment {number}" for name in self.problem.names]
        named = zip(names, self._rows(segment, params), strict=True)
        rows = average_over_ranks(named, self.problem.averager, params)
        device = self.problem.losses[0].device
        gramian = gramian_in_range(Jacobian(rows), segment.layers, None, self.dtype, device)
        for layer in segment.layers:
            layer.output_gradients = []
        return gramian

    def _rows(self, segment: Segment, params: list[Tensor]) -> Iterator[Sequence[Tensor | None]]:
        """The K rows of the parameters, one after the other."""
        edges = [*segment.leaving, *(layer.edge for layer in segment.layers)]
        inputs = [*params, *map(gradient_edge, edges)]
        with OutputGradientRecorder(segment.layers) as recorder:
            for arrived in self.arrived:
                here = [edge for edge in arrived if edge[0] in segment.nodes]
                entering = {edge: arrived.pop(edge) for edge in here}
                roots, grads = [*map(gradient_edge, entering)], [*entering.values()]
                row: Row = [None] * len(inputs)
                if roots:
                    with self.silenced:
                        row = gradients_of(roots, grads, inputs, True)
                rest = iter(row[len(params) :])
                for edge in segment.leaving:
                    if (gradient := next(rest)) is not None:
                        arrived[edge] = gradient
                recorder.append_to_layers(rest)
                yield row[: len(params)]


def _check_surroundings(problem: Problem, reentrant: bool) -> None:
    """Refuse what only whole backward passes differentiate correctly."""
    obstacle = None
    if not all(map(is_whole, problem.params)):
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


def _check_unchanged(kept: KeptTensors) -> None:
    """Refuse functions that may run once only: the pass of the weighted sum would run them again.

    What they write unknown to PyTorch (``.data``, kernels of their own) is not found.
    """
    name = kept.find_change()
    if name is not None:
        raise BalanceError(
            "A backward function should return the same gradient each time that it runs under "
            f"Streaming(). Found `{name}`, which changes the tensors that it has saved. Leave out "
            "`engine=` to have PerLoss(), which runs it once for each loss that it leads to."
        )


def _check_same_on_all_ranks(problem: Problem, segments: Sequence[Segment]) -> None:
    """Ranks average segment by segment, so they must have cut their graphs alike."""
    averager, device = problem.averager, problem.losses[0].device
    digest = crc32(repr([segment.param_indices for segment in segments]).encode())
    if averager is not None and not averager.is_same_everywhere(digest, device):
        raise BalanceError(
            "The losses of all ranks should have the same graph under Streaming(). Found different "
            "ones. Leave out `engine=` to have PerLoss()."
        )
