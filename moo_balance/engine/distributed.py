"""Several processes: gradients averaged over ranks, and inner products of sharded parameters."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.autograd import is_flattened as is_flattened, silence_hooks
from moo_balance.engine.base import (
    Problem,
    Row,
    deliver,
    gradients_of,
    precomputed_gradient,
    remove_loss_scale,
    weighted_backward,
    weighted_root,
    weighted_sum,
)
from moo_balance.engine.jacobian import inner_products
from moo_balance.engine.products import products_in_range
from moo_balance.errors import BalanceError

T = TypeVar("T", Tensor, "Tensor | None")


def is_sharded(params: Iterable[Tensor]) -> bool:
    """Whether one of these is a DTensor. Where the module was never imported, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(param, module.DTensor) for param in params)


def is_whole(param: Tensor) -> bool:
    """Whether each rank holds all of this parameter."""
    return not (is_sharded([param]) or is_flattened([param]))


# ---------------------------------------------------------------------- averages over ranks


@dataclass(eq=False)
class RowAverager:
    """Averages rows over the ranks of a process group.

    An all-reduce must send the same parameters on all ranks, but a rank knows only which ones its
    own losses reach. So each row goes out at once with the parameters that its loss has reached on
    any rank in an earlier step; the few others follow when the ranks have told each other.

    Every method is a collective: all ranks call it, and either all return or all raise.

    Args:
        group: The process group.
        known_reach: By loss and number of parameters, the parameters reached so far on any rank.
    """

    group: Any
    known_reach: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    def begin_all_reduce(self, name: str, row: Row, params: Sequence[Tensor]) -> PendingRow:
        """Begin to average the gradient of a loss, while the next one is differentiated."""
        known = self.known_reach.get((name, len(params)), ())
        return PendingRow(name, row, known, self._send(row, known, params))

    def wait(self, pending: Sequence[PendingRow], params: Sequence[Tensor]) -> list[Row]:
        """Wait for the averages. A parameter that no rank's loss reaches stays None."""
        reached = self._reduce_reach([p.row for p in pending], params)
        rows: list[Row] = []
        for row, indices in zip(pending, reached, strict=True):
            average: list[Tensor | None] = [None] * len(params)
            self._receive(row.buckets, average)
            new = [k for k in indices if k not in row.known]
            self._receive(self._send(row.row, new, params), average)
            self.known_reach[row.name, len(params)] = tuple(sorted({*row.known, *indices}))
            rows.append([g if k in indices else None for k, g in enumerate(average)])
        return rows

    def is_same_everywhere(self, number: int, device: torch.device) -> bool:
        """Whether all ranks pass the same number, of 32 bits at most."""
        extremes = torch.tensor([number, -number], dtype=torch.float64, device=device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        highest, lowest = extremes.tolist()
        return bool(highest == -lowest)

    def _reduce_reach(self, rows: Sequence[Row], params: Sequence[Tensor]) -> list[frozenset[int]]:
        """For each row the parameters that it reaches on any rank, in this very step."""
        mask = [
            [0.0 if gradient is None else 2.0 if gradient.is_sparse else 1.0 for gradient in row]
            for row in rows
        ]
        reached = torch.tensor(mask, device=params[0].device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self.group)
        kinds = reached.tolist()
        for row in kinds:
            if 2.0 in row:
                shape = tuple(params[row.index(2.0)].shape)
                raise BalanceError(
                    "Sparse gradients cannot be averaged over ranks row by row. Found one for a "
                    f"parameter of shape {shape}. Use `sparse=False`, or a method without a "
                    "Gramian."
                )
        return [frozenset(k for k, there in enumerate(row) if there) for row in kinds]

    def _send(self, row: Row, indices: Sequence[int], params: Sequence[Tensor]) -> list[Bucket]:
        """Flatten by dtype and device, and begin to reduce."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k in indices:
            kinds.setdefault((params[k].dtype, params[k].device), []).append(k)
        buckets = []
        for (dtype, device), members in kinds.items():
            parts = [
                torch.zeros(params[k].numel(), dtype=dtype, device=device)
                if (gradient := row[k]) is None
                else gradient.reshape(-1)
                for k in members
            ]
            flat = torch.cat(parts).div_(self.size)
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            buckets.append(Bucket(tuple((k, params[k].shape) for k in members), flat, work))
        return buckets

    def _receive(self, buckets: Sequence[Bucket], average: list[Tensor | None]) -> None:
        for bucket in buckets:
            bucket.work.wait()
            pieces = torch.split(bucket.flat, [shape.numel() for _, shape in bucket.shapes])
            for (k, shape), piece in zip(bucket.shapes, pieces, strict=True):
                average[k] = piece.view(shape)


class Bucket(NamedTuple):
    """Gradients of one dtype and device in one vector that is being reduced.

    Args:
        shapes: Positions and shapes of the parameters, in the order of the vector.
        flat: The vector.
        work: What to wait for.
    """

    shapes: tuple[tuple[int, torch.Size], ...]
    flat: Tensor
    work: Any


class PendingRow(NamedTuple):
    """A row that is being averaged.

    Args:
        name: The loss.
        row: This rank's own gradient.
        known: Positions of the parameters that were sent.
        buckets: The vectors in which they were sent.
    """

    name: str
    row: Row
    known: Sequence[int]
    buckets: list[Bucket]


def average_over_ranks(
    named: Iterable[tuple[str, Row]], averager: RowAverager | None, params: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """Averages of rows, each of which is sent while the next one is computed.

    With one process, or no parameters, there is nothing to send.
    """
    if averager is None or not params:
        return [list(row) for _, row in named]
    pending = [averager.begin_all_reduce(name, row, params) for name, row in named]
    return [list(row) for row in averager.wait(pending, params)]


# ---------------------------------------------------------------------- averaged weighted sums


def add_weighted_sum(problem: Problem, coefficients: Tensor) -> None:
    """Add the gradient of the weighted sum to ``.grad``, by one backward pass.

    A data-parallel wrapper would average the gradient of an ordinary pass; a bare model has none.
    So it is averaged here for both. Sharded parameters are averaged by their own hooks.
    """
    if all(map(is_whole, problem.params)):
        deliver(_averaged_gradient(problem, coefficients), problem)
    else:
        weighted_backward(problem, coefficients)


def combined_sum(problem: Problem, coefficients: Tensor) -> Tensor:
    """The weighted sum as a scalar, whose backward pass does the same, without the scale."""
    value = weighted_sum(problem, coefficients)
    if not all(map(is_whole, problem.params)):
        return value
    gradient = _averaged_gradient(problem._replace(scale=None), coefficients)
    return precomputed_gradient(value.detach(), gradient, problem)


def _averaged_gradient(problem: Problem, coefficients: Tensor) -> Row:
    losses, grad_outputs = weighted_root(problem, coefficients)
    with silence_hooks(problem.params):
        row = gradients_of([losses], [grad_outputs], problem.params, problem.retain_graph)
    (average,) = average_over_ranks([("", row)], problem.averager, problem.params)
    return average


# ---------------------------------------------------------------------- sharded parameters


def sharded_inner_products(
    rows: Sequence[Row],
    compared: Collection[int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Gramian of rows whose tensors may be DTensors, over the compared parameters.

    Local products of equally sharded parameters are summed over the mesh dimensions they are
    sharded along; along the others every rank holds the same.
    """
    rows = [[_complete(gradient) for gradient in row] for row in rows]
    families: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for k in range(len(rows[0])) if compared is None else compared:
        gradient = next((row[k] for row in rows if row[k] is not None), None)
        if gradient is not None:
            families.setdefault(sharding_of(gradient), []).append(k)
    local = [[local_part(gradient) for gradient in row] for row in rows]
    total = torch.zeros(len(rows), len(rows), dtype=dtype, device=device)
    for (mesh, dims), members in families.items():
        products = inner_products(local, members, dtype, device)
        for dim in dims:
            dist.all_reduce(products, group=mesh.get_group(dim))
        total = total.to(products) + products
    return total


def sharded_gramian(
    rows: Sequence[Row],
    compared: Collection[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    scale: Tensor | None = None,
) -> Tensor:
    """:func:`sharded_inner_products` without the loss scale, in `dtype` or in one that holds it."""

    def products(dtype: torch.dtype) -> Tensor:
        return remove_loss_scale(sharded_inner_products(rows, compared, dtype, device), scale)

    return products_in_range(products, dtype)


def _complete(gradient: Tensor | None) -> Tensor | None:
    """Carry out a sum over ranks that a tensor-parallel module has left open."""
    placements = getattr(gradient, "placements", ())
    if gradient is None or not any(placement.is_partial() for placement in placements):
        return gradient
    from torch.distributed.tensor import Replicate

    complete = [Replicate() if p.is_partial() else p for p in placements]
    return gradient.redistribute(placements=complete)  # type: ignore[attr-defined, no-any-return]


def sharding_of(gradient: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh, and its dimensions along which this tensor is split."""
    placements = getattr(gradient, "placements", None)
    if placements is None:
        return None, ()
    dims = tuple(dim for dim, placement in enumerate(placements) if placement.is_shard())
    return gradient.device_mesh, dims  # type: ignore[attr-defined]


def local_part(tensor: T) -> T:
    """What this rank holds of a tensor; a whole one, or None, as it is."""
    part: T = getattr(tensor, "to_local", lambda: tensor)()
    return part


def sharded_as(param: Tensor, tensor: Tensor) -> Tensor:
    """A tensor in the same shards as a parameter, sums over ranks carried out."""
    placements = getattr(param, "placements", None)
    if placements is None or getattr(tensor, "placements", None) == placements:
        return tensor
    return tensor.redistribute(placements=placements)  # type: ignore[attr-defined, no-any-return]


def as_shard_of(param: Tensor, part: Tensor) -> Tensor:
    """What this rank holds of a tensor that is sharded as a parameter; `part` itself if none is."""
    if not is_sharded([param]):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def slice_as(param: Tensor, whole: Tensor) -> Tensor:
    """What this rank would hold of a tensor, the same on all ranks, that is sharded as `param`."""
    if not is_sharded([param]):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    copies = [Replicate() for _ in placements]
    shared = DTensor.from_local(whole, mesh, copies, run_check=False)
    return local_part(shared.redistribute(placements=placements))
