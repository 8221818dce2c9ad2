"""The exact Gramian without K whole gradients: a few layers at a time, then one weighted pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.bottleneck import at_features
from moo_balance.engine.differentiation import by_grad
from moo_balance.engine.factored import Inputs
from moo_balance.engine.graph import (
    Edge,
    checkpoints_reentrantly,
    closed,
    edge_of,
    gradient_edge,
    nodes_above,
)
from moo_balance.engine.jacobian import inner_products
from moo_balance.engine.kept_rows import averaged, measured_columns, unscaled, with_layers
from moo_balance.engine.parallel import in_static_graph
from moo_balance.engine.portions import Portion, portions
from moo_balance.engine.rows import Row, add
from moo_balance.engine.sharded import is_flattened, is_sharded
from moo_balance.errors import BalanceError, BalanceValueError

Rows = list[list[Tensor | None]]


@dataclass(frozen=True)
class Streaming(Engine):
    """Go down the graph once with all K losses, and keep no gradient longer than its products.

    The graph is cut into portions of neighbouring layers. In each, every loss is differentiated
    from the cut above to the cut below; the K gradients of the portion's parameters are multiplied
    with each other and dropped. Once the weights are known, one ordinary backward pass of the
    weighted sum follows, so that hooks and data parallelism see what they always see.

    Time: K passes, and one more. Memory beyond a plain step: K gradients of one portion, at most
    `memory` · P numbers (or those of a single layer, if that has more), and K gradients at the
    activations that cross a cut, in place of the K·P numbers of :class:`PerLoss`.

    A parameter that several portions use is kept until the last of them. Accumulation windows need
    :class:`PerLoss`, as do sharded parameters and reentrant checkpoints.

    Args:
        memory: How many numbers a portion may keep for all losses together, in multiples of the
            number of parameters; above 0. Default 0.5.
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
            return at_features(problem, self.dtype)
        return Streamed(problem, self)


@dataclass
class Streamed(Linearization):
    """One batch: products on the way down, gradients in a pass of their own."""

    problem: Problem
    engine: Streaming

    def gramian(self) -> Tensor:
        problem = self.problem
        nodes = nodes_above(problem.losses)
        _check_surroundings(problem, checkpoints_reentrantly(nodes))
        columns = measured_columns(problem)
        memory = self.engine.memory * sum(problem.params[column].numel() for column in columns)
        plan = portions(problem, nodes, columns, memory)
        _check_same_on_all_ranks(problem, plan)
        descent = Descent(problem)
        gramian: Tensor | None = None
        for number, portion in enumerate(plan):
            rows = descent.through(portion, number)
            part = inner_products(rows, portion.last, self.engine.dtype)
            part = with_layers(part, portion.layers, portion.last, self.engine.dtype)
            portion.layers.clear()  # they hold gradients, too
            gramian = part if gramian is None else gramian + part.to(gramian.device)
        assert gramian is not None
        return unscaled(gramian, problem)

    def accumulate(self, coefficients: Tensor) -> None:
        weighted_backward(self.problem, coefficients)

    def combined(self, coefficients: Tensor) -> Tensor:
        return weighted_sum(self.problem, coefficients)


class Descent:
    """K gradients on their way down, at the edges that they have reached."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = len(problem.losses)
        self.arrived: dict[Edge, list[Tensor | None]] = {}
        self.unfinished: dict[int, list[Tensor | None]] = {}
        for k, (loss, seed) in enumerate(zip(problem.losses, problem.seeds(), strict=True)):
            self._arrive(edge_of(loss), k, seed)

    def through(self, portion: Portion, number: int) -> Rows:
        """Pass a portion: K rows of parameters, whole where no later portion will add to them."""
        here = [edge for edge in self.arrived if edge[0] in portion.nodes]
        entering = {edge: self.arrived.pop(edge) for edge in here}
        inputs = Inputs(self.problem.params, portion.layers, portion.columns)
        below = [gradient_edge(edge) for edge in portion.leaving]
        rows: Rows = []
        with closed(portion.leaving if portion.is_led_back_to else ()):
            for k in range(self.count):
                found = self._differentiated(entering, k, [*below, *inputs.inputs])
                for edge, cotangent in zip(portion.leaving, found, strict=False):
                    self._arrive(edge, k, cotangent)
                rows.append(inputs.sorted(found[len(below) :]))
        names = (f"{name}, portion {number}" for name in self.problem.names)
        return self._joined(averaged(zip(names, rows, strict=True), self.problem), portion)

    def _differentiated(
        self, entering: Mapping[Edge, list[Tensor | None]], k: int, inputs: Sequence[Any]
    ) -> Row:
        """One loss, from where it entered; what it entered with is let go afterwards."""
        reached = {edge: each[k] for edge, each in entering.items() if each[k] is not None}
        if not reached:
            return [None] * len(inputs)
        for each in entering.values():
            each[k] = None
        roots = [gradient_edge(edge) for edge in reached]
        seeds = [cotangent for cotangent in reached.values() if cotangent is not None]
        return by_grad(roots, seeds, inputs, retain_graph=True)

    def _arrive(self, edge: Edge, k: int, cotangent: Tensor | None) -> None:
        each = self.arrived.setdefault(edge, [None] * self.count)
        each[k] = add(each[k], cotangent)

    def _joined(self, rows: Rows, portion: Portion) -> Rows:
        """With what earlier portions gave; and what later ones will add to is put aside."""
        for column in portion.columns:
            before = self.unfinished.pop(column, [None] * self.count)
            for k, row in enumerate(rows):
                row[column] = add(before[k], row[column])
            if column not in portion.last:
                self.unfinished[column] = [row[column] for row in rows]
        return rows


def _check_surroundings(problem: Problem, reentrant: bool) -> None:
    """Refuse what whole backward passes alone get right."""
    found = None
    if is_sharded(problem.params) or is_flattened(problem.params):
        found = "sharded parameters"
    elif reentrant:
        found = "a reentrant checkpoint (or pass `use_reentrant=False`)"
    elif problem.parallel is not None and in_static_graph(problem.losses):
        found = "DistributedDataParallel with `static_graph=True`"
    if found is not None:
        raise BalanceError(
            f"A model under Streaming() should be differentiable in portions. Found {found}. Leave "
            "out `engine=` to have PerLoss()."
        )


def _check_same_on_all_ranks(problem: Problem, plan: Sequence[Portion]) -> None:
    """Ranks average portion by portion, so they must have cut their graphs alike."""
    if problem.parallel is None:
        return
    digest = float(crc32(repr([portion.columns for portion in plan]).encode()))
    device = problem.losses[0].device
    extremes = torch.tensor([digest, -digest], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=problem.parallel.group)
    highest, lowest = extremes.tolist()
    if highest != -lowest:
        raise BalanceError(
            "The losses of all ranks should have the same graph under Streaming(). Found different "
            "ones. Leave out `engine=` to have PerLoss()."
        )
