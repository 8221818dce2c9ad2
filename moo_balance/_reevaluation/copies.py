"""Tensors that a forward pass writes in place: copies them before, and writes the copies back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from moo_balance._reevaluation.writes import (
    Effect,
    can_watch_writes,
    is_compiled,
    memory_address,
    watch_writes,
    weak_reference,
)

WRITES = Effect()
RESHAPES = Effect(reshapes=True)


class Copies:
    """Copies of tensors, each made before the first write.

    Whole storages are copied. So views, expanded tensors and tensors made in inference mode need
    no case of their own, and no version counter moves.
    """

    def __init__(self) -> None:
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.others: dict[int, tuple[Tensor, Tensor]] = {}
        self.shapes: list[tuple[Tensor, Tensor]] = []
        self.reported: set[int] = set()

    def add(self, tensor: Tensor, effect: Effect = WRITES) -> None:
        """Copy a tensor, unless there is a copy already.

        Args:
            tensor: Any tensor.
            effect: Of the operator that is about to write it.
        """
        address = memory_address(tensor)
        if address is None:  # sparse, for example
            if id(tensor) not in self.others:
                self.others[id(tensor)] = (tensor, tensor.detach().clone())
            return
        if effect.reshapes:
            self.shapes.append((tensor, tensor.data))
        self.reported.add(address)
        if address not in self.storages:
            self.add_storage(tensor.untyped_storage())

    def add_storage(self, storage: torch.UntypedStorage) -> None:
        """Copy a storage, unless there is a copy already."""
        address = storage.data_ptr()
        if address and address not in self.storages:
            self.storages[address] = (storage, storage.clone())  # type: ignore[no-untyped-call]

    def put_back(self, except_at: Iterable[int | None] = ()) -> None:
        """Write all copies back, except for the storages at some addresses."""
        for tensor, data in reversed(self.shapes):
            tensor.data = data
        left_out = set(except_at)
        for address, (storage, values) in reversed(self.storages.items()):
            if address not in left_out:
                if storage.nbytes() != values.nbytes():
                    storage.resize_(values.nbytes())
                storage.copy_(values)
        with torch.no_grad():
            for tensor, copy in reversed(self.others.values()):
                tensor.copy_(copy)


PATIENCE = 3
"""Second evaluations without an unknown write until they are no longer watched each time."""

INTERVAL = 10
"""One in so many second evaluations is watched even then."""


class KnownWrites:
    """What evaluations have written so far; copied before others write it again.

    Watching costs about as much as the operators of a small model. So a first evaluation is watched
    only if the last second one wrote something unknown. A second evaluation is watched until
    nothing unknown was written for some time, again after a module has changed its mode or the
    first evaluation has written another tensor, and from time to time. A write is
    missed, for less than :data:`INTERVAL` steps, if it begins late in a run and PyTorch does not
    count it (``tensor.data``), or if the closure does not refer to the tensor.

    Attributes:
        assigns: Whether the last evaluations assigned attributes of modules.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Callable[[], torch.UntypedStorage | None]] = {}
        self._modes: set[int] = set()
        self._count = 0
        self._quiet = 0
        self._has_drawn: bool | None = None  # unknown before the first evaluation
        self.assigns = True

    def __reduce__(self) -> tuple[type[KnownWrites], tuple[()]]:
        return KnownWrites, ()  # a copy of a model has other tensors

    def add_to(self, copies: Copies) -> None:
        """Copy all that is known and still in use."""
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None or storage.data_ptr() != address:
                del self._storages[address]
            else:
                copies.add_storage(storage)

    def watch_first(
        self, copies: Copies, modules: Sequence[nn.Module]
    ) -> AbstractContextManager[None]:
        """Add to `copies` what a first evaluation writes, unless all of it is known.

        Args:
            copies: Where to add the copies; what is known is there.
            modules: The modules that the closure refers to.
        """
        _add_buffers(copies, modules)
        return nullcontext() if self._quiet else watch_writes(copies.add)

    def watch_second(
        self, copies: Copies, modules: Sequence[nn.Module], written: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        """Add to `copies` what a second evaluation writes, unless all of it is known.

        Args:
            copies: Where to add the copies; what is known is there.
            modules: The modules that the closure refers to.
            written: What the first evaluation has written in them.
        """
        modes = hash(tuple((id(module), module.training) for module in modules))
        addresses = map(memory_address, written)
        unknown = any(address and address not in self._storages for address in addresses)
        if unknown or modes not in self._modes:
            self._quiet = 0
            self._modes = {modes, *list(self._modes)[:INTERVAL]}
        self._count += 1
        _add_buffers(copies, modules)
        if self._quiet >= PATIENCE and self._count % INTERVAL:
            return nullcontext()
        return watch_writes(copies.add)

    @property
    def draws_from_numpy(self) -> bool:
        """Whether an evaluation may draw from NumPy's global generator."""
        return self._has_drawn is not False

    def note_draws(self, has_drawn: bool) -> None:
        """Say whether an evaluation drew from NumPy: once one has, any later one may."""
        self._has_drawn = bool(self._has_drawn) or has_drawn

    def learn(self, copies: Copies) -> None:
        """Remember what a second evaluation has written."""
        new = copies.reported & copies.storages.keys() - self._storages.keys()
        for address in new:
            self._storages[address] = weak_reference(copies.storages[address][0])
        is_quiet = not (new or copies.others or copies.shapes)
        self._quiet = self._quiet + 1 if is_quiet else 0


def _add_buffers(copies: Copies, modules: Sequence[nn.Module]) -> None:
    """Copy the buffers of modules in training mode, which NumPy or a compiled function may write.

    Of all modules if writes cannot be watched, or one is compiled.
    """
    all_of_them = not can_watch_writes() or any(map(is_compiled, modules))
    for module in modules:
        if module.training or all_of_them:
            for buffer in module._buffers.values():
                if buffer is None:
                    continue
                if memory_address(buffer) is None:
                    copies.add(buffer)
                else:
                    copies.add_storage(buffer.untyped_storage())
