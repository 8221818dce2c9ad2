"""What ranks must agree on: their losses, the step they are at, and the parameters they hold.

Averaging gradients over ranks is the engine's (``engine/distributed.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance._validation import Given
from moo_balance.engine.autograd import in_static_graph
from moo_balance.engine.base import is_distributed
from moo_balance.engine.distributed import RowAverager, is_whole
from moo_balance.errors import BalanceError
from moo_balance.weighting.base import state_dtype

T = TypeVar("T")

CALLS = ("backward", "accumulate", "observe")
"""What is done with the losses; part of :class:`StepId`."""


class StepId(NamedTuple):
    """A rank's position in the run. Ranks at different positions would deadlock in a collective.

    Args:
        method: The weighting with its hyper-parameters.
        step: Steps taken.
        call: One of :data:`CALLS`.
        trainable: Digest of the trainable parameters.
    """

    method: str
    step: int
    call: str
    trainable: int

    @property
    def digits(self) -> tuple[int, int]:
        """A checksum of all of them as two numbers below 2¹⁶, whose squares can be summed."""
        return divmod(crc32(repr(tuple(self)).encode()), 2**16)


def find_ranks(group: Any, known: Ranks | None) -> Ranks | None:
    """The ranks that share a model; None for a single process.

    Args:
        group: ``"auto"``, None or a process group: the argument ``process_group=``.
        known: What the last call returned.
    """
    if group is None:
        return None
    if not is_distributed():
        if known is None and group == "auto":
            return None
        raise BalanceError(
            "The process group that this run began with should still be there. Found none. Step "
            "before `destroy_process_group`, or build a new BalancedOptimizer and load the state "
            "dict."
        )
    group = dist.group.WORLD if group == "auto" else group
    if known is not None and known.group is group:
        return known
    return Ranks(group) if dist.get_world_size(group) > 1 else None


class Ranks:
    """A process group whose ranks see different data and take the same steps.

    Every method but `digest_trainable` is a collective: all ranks call it, and either all return or
    all raise.

    Args:
        group: The process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.averager = RowAverager(group)
        self._names: Sequence[str] | None = None
        self._trainable: tuple[Sequence[int], int] = (), 0

    def digest_trainable(self, groups: Iterable[Mapping[str, Any]]) -> int:
        """A number that is the same on all ranks if the same parameters train there."""
        params = [param for group in groups for param in group["params"]]
        ids = [id(param) for param in params if param.requires_grad]
        known, digest = self._trainable
        if ids != known:
            # Each rank has another part of a parameter that FSDP1 has flattened.
            kept = [
                (k, p.dtype, p.shape if is_whole(p) else None)
                for k, p in enumerate(params)
                if p.requires_grad
            ]
            digest = crc32(repr(kept).encode())
            self._trainable = ids, digest
        return digest

    def read_losses(
        self,
        read: Callable[[], Given],
        declared: Sequence[str] | None,
        step_id: StepId,
        device: torch.device,
    ) -> tuple[Given, Tensor]:
        """What this rank is given, and the means of its losses over the ranks, shape [K].

        Args:
            read: Validates and returns what this rank is given. What it raises, an interrupt
                included, is raised here once the other ranks have been told.
            declared: The names that this rank knows; None before the first step.
            step_id: Where this rank is.
            device: Of the means, if this rank has no losses.
        """
        given = fault = None
        try:
            given = read()
            device = next(iter(given.losses.values())).device
        except BaseException as error:
            fault = error
        losses = {} if given is None else given.losses
        like = torch.empty((), dtype=state_dtype(device), device=device)
        means = self._average_losses(losses, declared, step_id, fault, like)
        assert given is not None  # else its fault has been raised
        given = given._replace(losses={name: losses[name] for name in means})
        return given, torch.stack(list(means.values()))

    def _average_losses(
        self,
        losses: Mapping[str, Tensor],
        declared: Sequence[str] | None,
        step_id: StepId,
        fault: BaseException | None,
        like: Tensor,
    ) -> dict[str, Tensor]:
        """The mean of each present loss over the ranks, by one all-reduce of 2K + 5 elements."""
        if self._names is None or declared is None or set(declared) != set(self._names):
            self._names = self._agree_on_names(losses, declared, step_id, fault)
        names, count = self._names, len(self._names)
        # [sums of the losses | which are present | a fault, the position and its squares]
        message = torch.zeros(2 * count + 5, dtype=like.dtype, device=like.device)
        for position, name in enumerate(names):
            if name in losses:
                message[position] = losses[name].detach()
                message[count + position] = 1.0
        high, low = step_id.digits
        message[-5:] = message.new_tensor([fault is not None, high, high**2, low, low**2])
        dist.all_reduce(message, group=self.group)
        self._check_sums(message[count:].tolist(), names, step_id, fault)
        means = message[:count] / self.size
        return {name: mean for name, mean in zip(names, means, strict=True) if name in losses}

    def _agree_on_names(
        self,
        losses: Mapping[str, Tensor],
        declared: Sequence[str] | None,
        step_id: StepId,
        fault: BaseException | None,
    ) -> Sequence[str]:
        """The names that all ranks start from, in the order of rank 0."""
        own = f"{type(fault).__name__}: {fault}" if fault else None
        own = str(fault) if isinstance(fault, BalanceError) else own
        reports = self.gather((list(declared or losses), own))
        if fault is not None:
            raise fault
        first_names, _ = reports[0]
        for rank, (names, message) in enumerate(reports):
            if message is not None:
                raise BalanceError(f"Rank {rank} could not compute its losses: {message}")
            if set(names) != set(first_names):
                raise BalanceError(
                    f"All ranks should have the same losses. Found {names} on rank {rank} and "
                    f"{first_names} on rank 0. Name them alike, in the same step."
                )
        self._check_position(step_id)
        return first_names

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _check_position(self, step_id: StepId) -> None:
        """Refuse ranks at different positions, and name the first that differs."""
        first, *others = self.gather(step_id)
        for rank, other in enumerate(others, start=1):
            if other.trainable != first.trainable:
                raise BalanceError(
                    f"All ranks should train the same parameters. Found others on rank {rank} than "
                    "on rank 0. Build the optimizer from the same parameters in the same order, "
                    "and freeze and unfreeze them alike on all ranks."
                )
            for what, there, here in zip(StepId._fields, other, first, strict=True):
                if there != here:
                    raise BalanceError(
                        f"All ranks should be at the same point of the same run. Found {what} "
                        f"{there} on rank {rank} and {here} on rank 0. Give all ranks the same "
                        "method and the same checkpoint, and call `backward`, `accumulate` and "
                        "`observe` alike on all of them."
                    )

    def _check_sums(
        self,
        sums: Sequence[float],
        names: Sequence[str],
        step_id: StepId,
        fault: BaseException | None,
    ) -> None:
        """Raise alike on all ranks: `sums` [K + 5] over the ranks are the same everywhere."""
        if fault is not None:
            raise fault
        *present, faults, high, high_squares, low, low_squares = sums
        if faults:
            raise BalanceError(
                f"{faults:g} of {self.size} ranks could not compute their losses, so no rank goes "
                "on. Their own message says why."
            )
        # The mean square equals the squared mean only if all are equal.
        if self.size * high_squares != high**2 or self.size * low_squares != low**2:
            self._check_position(step_id)
        for name, count in zip(names, present, strict=True):
            if count not in (0, self.size):
                raise BalanceError(
                    f"Loss `{name}` should be present on all ranks or on none. Found it on "
                    f"{count:g} of {self.size}. Give a rank that lacks it a zero that is attached "
                    "to the graph, such as `0.0 * output.sum()`."
                )

    def are_all(self, value: bool, device: torch.device) -> bool:
        """Whether `value` is true on all ranks. They exchange it on `device`."""
        least = torch.tensor(float(value), device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return bool(least)

    def check_drift(
        self, params: Sequence[Tensor], state: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Compare checksums of parameters and balance over the ranks; raise where one differs.

        Parameters of which each rank holds a part are left out.
        """
        params = [param for param in params if is_whole(param)]
        tensors = [*params, *state.values()]
        if not tensors:
            return
        own = torch.stack([_checksum(tensor).to(device) for tensor in tensors])
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        for rank, other in enumerate(gathered):
            different = (other != gathered[0]).any(1).nonzero()
            if len(different):
                what = "a parameter" if int(different[0]) < len(params) else "the balance"
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


def check_static_graph(losses: Sequence[Tensor], method: str) -> None:
    """Refuse a window in the first step of DistributedDataParallel with a static graph."""
    if in_static_graph(losses):
        raise BalanceError(
            f"DistributedDataParallel should not have `static_graph=True` together with "
            f"`accumulate` and {method}: it records its hooks in the first step, where gradients "
            "of single losses bypass them. Found it. Use `find_unused_parameters` instead."
        )
