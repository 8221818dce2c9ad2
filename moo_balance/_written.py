"""What a forward pass changes besides its results: keeps it, and puts it back.

Tensors that operators write in place are seen by :func:`watch_writes`, wherever they are.
Attributes of modules and tensors in new memory are found in the modules that a closure refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from moo_balance._torch_internals import (
    Effect,
    can_watch_writes,
    is_compiled,
    memory_address,
    version_of,
    watch_writes,
    weak_reference,
)

WRITES = Effect()
RESHAPES = Effect(reshapes=True)
_MISSING: Any = object()


class Copies:
    """Copies of tensors, each made before the first write.

    Whole storages are copied. So views, expanded tensors and tensors made in inference mode need
    no case of their own, and no version counter moves.
    """

    def __init__(self) -> None:
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.others: dict[int, tuple[Tensor, Tensor]] = {}
        self.shapes: list[tuple[Tensor, Tensor]] = []
        self.read: set[int] = set()

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
        if not effect.is_blind:
            self.read.add(address)
        if address not in self.storages:
            self.add_storage(tensor.untyped_storage())

    def add_storage(self, storage: torch.UntypedStorage) -> None:
        """Copy a storage, unless there is a copy already."""
        address = storage.data_ptr()
        if address and address not in self.storages:
            self.storages[address] = (storage, storage.clone())  # type: ignore[no-untyped-call]

    def put_back(self, but: Iterable[int | None] = ()) -> None:
        """Write all copies back, except for the storages at some addresses."""
        for tensor, data in reversed(self.shapes):
            tensor.data = data
        left_out = set(but)
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
        draws_from_numpy: Whether the last evaluation drew from NumPy's global generator.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Callable[[], torch.UntypedStorage | None]] = {}
        self._unread: set[int] = set()
        self._modes: set[int] = set()
        self._count = 0
        self._quiet = 0
        self.draws_from_numpy = True

    def __reduce__(self) -> tuple[type[KnownWrites], tuple[()]]:
        return KnownWrites, ()  # a copy of a model has other tensors

    def add_to(self, copies: Copies, only_read: bool = False) -> None:
        """Copy all that is known and still in use.

        Args:
            copies: Where to add the copies.
            only_read: Leave out what the results do not depend on.
        """
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None or storage.data_ptr() != address:
                del self._storages[address]
                self._unread.discard(address)
            elif not (only_read and address in self._unread):
                copies.add_storage(storage)

    def watch_first(
        self, copies: Copies, modules: Sequence[nn.Module]
    ) -> AbstractContextManager[None]:
        """Add to `copies` what a first evaluation writes, unless all of it is known.

        Args:
            copies: Where to add the copies; what is known is there.
            modules: The modules that the closure refers to.
        """
        return nullcontext() if self._quiet else _watch(copies, modules)

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
        unknown = any(memory_address(tensor) not in self._storages for tensor in written)
        if unknown or modes not in self._modes:
            self._quiet = 0
            self._modes = {modes, *list(self._modes)[:INTERVAL]}
        self._count += 1
        if self._quiet >= PATIENCE and self._count % INTERVAL:
            return nullcontext()
        return _watch(copies, modules)

    def learn(self, copies: Copies) -> None:
        """Remember what a second evaluation has written."""
        new = copies.storages.keys() - self._storages.keys()
        for address in new:
            self._storages[address] = weak_reference(copies.storages[address][0])
        self._unread = (self._unread | new) - copies.read
        is_quiet = not (new or copies.others or copies.shapes)
        self._quiet = self._quiet + 1 if is_quiet else 0


def _watch(copies: Copies, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Copy what is written inside; buffers beforehand where PyTorch will not tell."""
    if not can_watch_writes() or any(map(is_compiled, modules)):
        for module in modules:
            for buffer in module._buffers.values():
                if buffer is not None:
                    copies.add(buffer)
    return watch_writes(copies.add)


class Change(NamedTuple):
    """An entry of an attribute dict that was assigned, added or deleted."""

    attributes: dict[str, Any]
    name: str
    before: Any
    after: Any

    def undo(self) -> None:
        """Assign what was there before."""
        if self.before is _MISSING:
            self.attributes.pop(self.name, None)
        else:
            self.attributes[self.name] = self.before

    def holds(self) -> bool:
        """Whether the entry has not been assigned again since."""
        return self.attributes.get(self.name, _MISSING) is self.after


class ModuleState:
    """Attributes of modules, and the memory, version and gradient of their tensors.

    Args:
        modules: Any modules. Those of ``torch.distributed`` are left out. Where FSDP assigns
            parameters itself, buffers only.
        others: More tensors.
    """

    def __init__(self, modules: Sequence[nn.Module], others: Iterable[Tensor]) -> None:
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        kinds = [_kind(type(module)) for module in modules]  # type: ignore[arg-type]
        sharded = "sharded" in kinds
        tensors = {} if sharded else {id(tensor): tensor for tensor in others}
        for module, kind in zip(modules, kinds, strict=True):
            if kind == "left out":
                continue
            owned: list[dict[str, Any]] = [module._buffers]
            if not sharded:
                attributes = vars(module)
                owned.append(module._parameters)
                self._dicts.append((attributes, attributes.copy()))
            for values in owned:
                if values:
                    self._dicts.append((values, values.copy()))
                    for tensor in values.values():
                        tensors[id(tensor)] = tensor
        tensors.pop(id(None), None)
        # Tensor, its memory, its version, its gradient.
        self._held = [
            (tensor, tensor.data, version_of(tensor), tensor.grad if tensor.is_leaf else None)
            for tensor in tensors.values()
            if _is_plain(tensor)
        ]

    def changes(self) -> list[Change]:
        """Attributes that are not as they were."""
        return [
            Change(current, name, before.get(name, _MISSING), current.get(name, _MISSING))
            for current, before in self._dicts
            if not _is_same(current, before)
            for name in {**before, **current}
            if before.get(name, _MISSING) is not current.get(name, _MISSING)
        ]

    def relocations(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that were given other memory (``tensor.data = ...``), each with its old data."""
        return [
            (tensor, data)
            for tensor, data, _, _ in self._held
            if tensor.data_ptr() != data.data_ptr()
        ]

    def written(self) -> list[Tensor]:
        """Tensors that were written since, as far as PyTorch counts it."""
        return [tensor for tensor, _, version, _ in self._held if version_of(tensor) != version]

    def put_back(self) -> None:
        """Assign all attributes, memory and gradients as they were."""
        for change in self.changes():
            change.undo()
        for tensor, data in self.relocations():
            tensor.data = data
        for tensor, _, _, grad in self._held:
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one.values(), other.values()))


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own: it is neither sparse nor made of other tensors."""
    known = type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")
    return known and tensor.layout is torch.strided


@lru_cache(1024)
def _kind(module: type[nn.Module]) -> str:
    """How the state of a module of this class is to be kept."""
    if any(each.__name__ in ("FSDPModule", "FullyShardedDataParallel") for each in module.__mro__):
        return "sharded"
    # A module becomes another one when its lazy parameters are made.
    if issubclass(module, LazyModuleMixin):
        return "left out"
    if module.__module__.startswith(("torch.distributed", "torch.nn.parallel")):
        return "left out"
    return "usual"
