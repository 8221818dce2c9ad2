"""Several processes: ranks agree on the losses and the step, and hold the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.distributed import RowAverager
from moo_balance.errors import BalanceError

_CALLS = ("balance", "gather", "observe")


class StepId(NamedTuple):
    """A rank's position in the run. Ranks at different positions would deadlock in a collective.

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
class Ranks:
    """A process group whose ranks see different data and should take the same step.

    Every method is a collective: all ranks call it, and either all return or all raise.
    """

    averager: RowAverager
    names: Sequence[str] | None = None

    @property
    def group(self) -> Any:
        """The process group."""
        return self.averager.group

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.averager.size

    def synchronize_losses(
        self,
        losses: Mapping[str, Tensor],
        declared: Sequence[str] | None,
        step_id: StepId,
        fault: BalanceError | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """The mean of each present loss over the ranks: one all-reduce of 2K + 3 numbers.

        A fault that one rank found in its losses is raised there, and reported on all others.
        """
        if self.names is None or declared is None or set(declared) != set(self.names):
            self.names = self._first_names(losses, declared, step_id, fault)
        names, count = self.names, len(self.names)
        header = torch.zeros(2 * count + 3, dtype=dtype, device=device)
        for position, name in enumerate(names):
            if name in losses:
                header[position] = losses[name].detach()
                header[count + position] = 1.0
        header[-3:] = header.new_tensor([fault is not None, step_id.number, step_id.number**2])
        dist.all_reduce(header, group=self.group)
        self._check_header(header[count:].tolist(), fault)
        means = header[:count] / self.size
        return {name: mean for name, mean in zip(names, means, strict=True) if name in losses}

    def _first_names(
        self,
        losses: Mapping[str, Tensor],
        declared: Sequence[str] | None,
        step_id: StepId,
        fault: Exception | None,
    ) -> Sequence[str]:
        """The names that all ranks start from."""
        report = (list(declared or losses), step_id, None if fault is None else str(fault))
        reports: list[tuple[list[str], StepId, str | None]] = [report] * self.size
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
