"""Training on several processes: what ranks must agree on, and rows averaged over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.graph import nodes_above
from moo_balance.engine.rows import Row
from moo_balance.errors import BalanceError

_CALLS = ("balance", "gather", "observe")


class Moment(NamedTuple):
    """Where in which run a rank is: ranks at different ones would wait for each other for ever.

    `call` says what is done with the losses: "balance", "gather" or "observe".
    """

    method: str
    step: int
    call: str

    @property
    def number(self) -> int:
        """Step and call in one, small enough for exact squares."""
        return (8 * self.step + _CALLS.index(self.call)) % 1024


@dataclass(eq=False)
class DataParallel:
    """A process group whose ranks see different data and shall take the same step.

    Every method is a collective: all ranks call it, and either all return or all raise.
    """

    group: Any
    names: Sequence[str] | None = None
    layouts: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """Parameters each loss has reached on any rank so far: what to send before it is known."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    def agree(
        self,
        losses: Mapping[str, Tensor],
        declared: Sequence[str] | None,
        moment: Moment,
        fault: BalanceError | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """The mean of each present loss over the ranks: one all-reduce of 2K + 3 numbers.

        A fault that one rank found in its losses is raised there, and reported on all others.
        """
        if self.names is None or declared is None or set(declared) != set(self.names):
            self.names = self._first_names(losses, declared, moment, fault)
        names, count = self.names, len(self.names)
        header = torch.zeros(2 * count + 3, dtype=dtype, device=device)
        for position, name in enumerate(names):
            if name in losses:
                header[position] = losses[name].detach()
                header[count + position] = 1.0
        header[-3:] = header.new_tensor([fault is not None, moment.number, moment.number**2])
        dist.all_reduce(header, group=self.group)
        self._check_header(header[count:].tolist(), fault)
        means = header[:count] / self.size
        return {name: mean for name, mean in zip(names, means, strict=True) if name in losses}

    def _first_names(
        self,
        losses: Mapping[str, Tensor],
        declared: Sequence[str] | None,
        moment: Moment,
        fault: Exception | None,
    ) -> Sequence[str]:
        """The names that all ranks start from."""
        report = (list(declared or losses), moment, None if fault is None else str(fault))
        reports: list[tuple[list[str], Moment, str | None]] = [report] * self.size
        dist.all_gather_object(reports, report, group=self.group)
        if fault is not None:
            raise fault
        first, start, _ = reports[0]
        for rank, (names, found, message) in enumerate(reports):
            if message is not None:
                raise BalanceError(f"Rank {rank} refused its losses: {message}")
            if set(names) != set(first):
                raise BalanceError(
                    f"All ranks should have the same losses. Found {names} on rank {rank} and "
                    f"{first} on rank 0. Name them alike, in the same step."
                )
            if found != start:
                raise BalanceError(
                    f"All ranks should be at the same point of the same run. Found {found.method} "
                    f"at step {found.step} on rank {rank} and {start.method} at step {start.step} "
                    "on rank 0. Give all ranks the same method and the same checkpoint, and call "
                    "`backward`, `accumulate` and `observe` alike on all of them."
                )
        return first

    def _check_header(self, flags: Sequence[float], fault: Exception | None) -> None:
        """Flags [K + 3] are sums over the ranks: they mean the same to all of them."""
        if fault is not None:
            raise fault
        *present, faults, moments, squares = flags
        if faults:
            raise BalanceError(
                f"{faults:g} of {self.size} ranks refused their losses, so no rank takes the "
                "step. Their own message says why."
            )
        if self.size * squares != moments**2:  # not all equal
            raise BalanceError(
                "All ranks should be at the same point of the same run. Found them at different "
                "steps, or in different calls. Give all ranks the same checkpoint, and call "
                "`backward`, `accumulate` and `observe` alike on all of them."
            )
        for name, count in zip(self.names or (), present, strict=True):
            if count not in (0, self.size):
                raise BalanceError(
                    f"Loss `{name}` should be present on all ranks or on none. Found it on "
                    f"{count:g} of {self.size}. Give a rank that lacks it a zero that is attached "
                    "to the graph, such as `0.0 * output.sum()`."
                )

    def start(self, name: str, row: Row, params: Sequence[Tensor]) -> PendingRow:
        """Begin to average the gradient of a loss, while the next one is differentiated."""
        layout = self.layouts.get((name, len(params)), ())
        return PendingRow(name, row, layout, self._launch(row, layout, params))

    def finish(self, pending: Sequence[PendingRow], params: Sequence[Tensor]) -> list[Row]:
        """Wait for the averages. A parameter that no rank's loss reaches stays None."""
        reached = self._reached_anywhere([p.row for p in pending], params)
        rows: list[Row] = []
        for row, columns in zip(pending, reached, strict=True):
            averaged: list[Tensor | None] = [None] * len(params)
            self._collect(row.buckets, averaged)
            late = [column for column in columns if column not in row.layout]
            self._collect(self._launch(row.row, late, params), averaged)
            self.layouts[row.name, len(params)] = tuple(sorted({*row.layout, *columns}))
            rows.append([g if k in columns else None for k, g in enumerate(averaged)])
        return rows

    def _reached_anywhere(
        self, rows: Sequence[Row], params: Sequence[Tensor]
    ) -> list[frozenset[int]]:
        """For each row the parameters it reaches on any rank, in this very step."""
        mask = [[float(gradient is not None) for gradient in row] for row in rows]
        reached = torch.tensor(mask, device=params[0].device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self.group)
        return [frozenset(k for k, there in enumerate(row) if there) for row in reached.tolist()]

    def _launch(self, row: Row, layout: Sequence[int], params: Sequence[Tensor]) -> list[Bucket]:
        """Flatten by dtype and device, and send."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for column in layout:
            gradient = row[column]
            if gradient is not None and gradient.is_sparse:
                raise BalanceError(
                    "Sparse gradients cannot be averaged over ranks row by row. Found one for a "
                    f"parameter of shape {tuple(gradient.shape)}. Use `sparse=False`, or a method "
                    "without a Gramian."
                )
            kinds.setdefault((params[column].dtype, params[column].device), []).append(column)
        buckets = []
        for (dtype, device), columns in kinds.items():
            parts = [
                torch.zeros(params[column].numel(), dtype=dtype, device=device)
                if (gradient := row[column]) is None
                else gradient.reshape(-1)
                for column in columns
            ]
            flat = torch.cat(parts).div_(self.size)
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            shapes = tuple((column, params[column].shape) for column in columns)
            buckets.append(Bucket(shapes, flat, work))
        return buckets

    def _collect(self, buckets: Sequence[Bucket], averaged: list[Tensor | None]) -> None:
        for bucket in buckets:
            bucket.work.wait()
            pieces = torch.split(bucket.flat, [shape.numel() for _, shape in bucket.shapes])
            for (column, shape), piece in zip(bucket.shapes, pieces, strict=True):
                averaged[column] = piece.view(shape)

    def check_drift(
        self, params: Sequence[Tensor], state: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Compare checksums of parameters and balance over the ranks; raise where one differs."""
        tensors = [*params, *state.values()]
        if not tensors:
            return
        own = torch.stack([_checksum(tensor).to(device) for tensor in tensors])
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        for rank, other in enumerate(gathered):
            drifted = (other != gathered[0]).any(1).nonzero()
            if len(drifted):
                what = "a parameter" if int(drifted[0]) < len(params) else "the balance"
                raise BalanceError(
                    f"All ranks should hold the same parameters. Found {what} on rank {rank} that "
                    "differs from rank 0. Wrap the model in DistributedDataParallel or "
                    "fully_shard, seed all ranks alike, or pass process_group=None if each rank "
                    "trains a model of its own."
                )


def _checksum(tensor: Tensor) -> Tensor:
    """Sum and sum of squares: two gradients with the same sum rarely have the same norm."""
    tensor = tensor.detach()
    flat = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = flat.double().nan_to_num().reshape(-1)
    return torch.stack([values.sum(), values.dot(values)])


class Bucket(NamedTuple):
    """Gradients of one kind on their way around the ranks."""

    shapes: tuple[tuple[int, torch.Size], ...]
    flat: Tensor
    work: Any


class PendingRow(NamedTuple):
    """A row on its way around the ranks."""

    name: str
    row: Row
    layout: Sequence[int]
    buckets: list[Bucket]


def in_static_graph(losses: Sequence[Tensor]) -> bool:
    """Do the losses come out of the first step of a DDP model with ``static_graph=True``?"""
    wrappers = (getattr(node, "ddp_weakref", lambda: None)() for node in nodes_above(losses))
    return any(ddp is not None and ddp.static_graph for ddp in wrappers)
