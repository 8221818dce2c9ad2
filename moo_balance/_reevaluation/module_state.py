"""Attributes of modules, and what tensors refer to: keeps both, and assigns them again.

A write in place changes neither, and is found elsewhere (``copies.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from moo_balance._reevaluation.writes import version_of

_MISSING: Any = object()


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
        only_versions: Hold the versions of tensors only.
    """

    def __init__(
        self, modules: Sequence[nn.Module], others: Iterable[Tensor], only_versions: bool = False
    ) -> None:
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        kinds = [_kind(type(module)) for module in modules]  # type: ignore[arg-type]
        sharded = "sharded" in kinds
        tensors = {} if sharded else {id(tensor): tensor for tensor in others}
        for module, kind in zip(modules, kinds, strict=True):
            if kind == "left out":
                continue
            owned: list[dict[str, Any]] = [module._buffers]
            if not sharded:
                owned.append(module._parameters)
                if not only_versions:
                    self._dicts.append((vars(module), vars(module).copy()))
            for values in owned:
                if values and not only_versions:
                    self._dicts.append((values, values.copy()))
                for tensor in values.values():
                    tensors[id(tensor)] = tensor
        tensors.pop(id(None), None)
        self._versions = [(tensor, version_of(tensor)) for tensor in tensors.values()]
        # Tensor, its memory, its gradient.
        self._held = [
            (tensor, tensor.data, tensor.grad if tensor.is_leaf else None)
            for tensor in ([] if only_versions else tensors.values())
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
            (tensor, data) for tensor, data, _ in self._held if tensor.data_ptr() != data.data_ptr()
        ]

    def written(self) -> list[Tensor]:
        """Tensors that were written since, as far as PyTorch counts it."""
        return [tensor for tensor, version in self._versions if version_of(tensor) != version]

    def put_back(self) -> bool:
        """Assign all attributes, memory and gradients as they were.

        Returns:
            Whether an attribute or the memory of a tensor was another one.
        """
        changes, relocations = self.changes(), self.relocations()
        for change in changes:
            change.undo()
        for tensor, data in relocations:
            tensor.data = data
        for tensor, _, grad in self._held:
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
        return bool(changes or relocations)


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
