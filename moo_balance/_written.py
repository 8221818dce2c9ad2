"""What a forward pass changes besides its results: keeps it, and puts it back.

Tensors that operators write in place are seen by :func:`watch_writes`, wherever they are.
Attributes of modules and tensors in new memory are found in the modules that a closure refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from moo_balance._torch_internals import (
    memory_address,
    version_of,
    watch_writes,
    weak_reference,
)

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

    def add(self, tensor: Tensor, reshapes: bool = False) -> None:
        """Copy a tensor, unless there is a copy already.

        Args:
            tensor: Any tensor.
            reshapes: Whether its sizes or its memory may change, too.
        """
        address = memory_address(tensor)
        if address is None:  # sparse, for example
            if id(tensor) not in self.others:
                self.others[id(tensor)] = (tensor, tensor.detach().clone())
            return
        if reshapes:
            self.shapes.append((tensor, tensor.data))
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


class KnownWrites:
    """What second evaluations have written so far.

    A first evaluation copies it beforehand, and only watches what it writes where the last second
    evaluation wrote something unknown.

    Attributes:
        draws_from_numpy: Whether the last evaluation drew from NumPy's global generator.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Callable[[], torch.UntypedStorage | None]] = {}
        self._complete = False
        self.draws_from_numpy = True

    def __reduce__(self) -> tuple[type[KnownWrites], tuple[()]]:
        return KnownWrites, ()  # a copy of a model has other tensors

    def copy(self) -> Copies:
        """Copies of all that is known and still in use."""
        copies = Copies()
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None or storage.data_ptr() != address:
                del self._storages[address]
            else:
                copies.add_storage(storage)
        return copies

    def watch(self, copies: Copies) -> AbstractContextManager[None]:
        """Add to `copies` what is written inside, unless all of it is known."""
        return nullcontext() if self._complete else watch_writes(copies.add)

    def learn(self, copies: Copies) -> None:
        """Remember what a second evaluation has written."""
        new = copies.storages.keys() - self._storages.keys()
        self._complete = not new and not copies.others
        for address in new:
            self._storages[address] = weak_reference(copies.storages[address][0])


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


class _Held(NamedTuple):
    tensor: Tensor
    data: Tensor
    version: int
    grad: Tensor | None


class ModuleState:
    """Attributes of modules, and the memory, version and gradient of their tensors.

    Args:
        modules: Any modules. Those of ``torch.distributed`` are left out. Where FSDP assigns
            parameters itself, buffers only.
        params: More tensors.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Iterable[Tensor]) -> None:
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        sharded = any(map(_is_fsdp, modules))
        tensors = {} if sharded else {id(param): param for param in params}
        for module in modules:
            if isinstance(module, LazyModuleMixin) or _is_distributed(module):
                continue
            owned: list[dict[str, Any]] = [module._buffers]
            if not sharded:
                owned.append(module._parameters)
                self._dicts.append((vars(module), vars(module).copy()))
            for values in owned:
                if values:
                    self._dicts.append((values, values.copy()))
                    tensors.update((id(each), each) for each in values.values() if each is not None)
        self._held = [
            _Held(tensor, tensor.data, version_of(tensor), tensor.grad if tensor.is_leaf else None)
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
            (held.tensor, held.data)
            for held in self._held
            if held.tensor.data_ptr() != held.data.data_ptr()
        ]

    def written(self) -> Iterator[Tensor]:
        """Tensors that were written since, as far as PyTorch counts it."""
        return (held.tensor for held in self._held if version_of(held.tensor) != held.version)

    def put_back(self) -> None:
        """Assign all attributes, memory and gradients as they were."""
        for change in self.changes():
            change.undo()
        for tensor, data in self.relocations():
            tensor.data = data
        for held in self._held:
            if held.tensor.grad is not held.grad and held.tensor.is_leaf:
                held.tensor.grad = held.grad


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one.values(), other.values()))


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own: it is neither sparse nor made of other tensors."""
    known = type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")
    return known and tensor.layout is torch.strided


def _is_distributed(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.distributed", "torch.nn.parallel"))


def _is_fsdp(module: nn.Module) -> bool:
    return any(
        base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__
    )
