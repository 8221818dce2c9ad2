"""Evaluates the losses of a batch again after the step: same random numbers, no trace left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moo_balance._torch_internals import (
    announce_module_calls,
    as_plain,
    broadcasts_buffers,
    request_buffer_broadcast,
)


class RandomState:
    """The state of torch's random generators: the CPU's, and those of the devices in use."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    @property
    def devices(self) -> list[torch.device]:
        """The devices whose generators are held."""
        return list(self._devices)


class Reevaluation:
    """A closure before its first evaluation, with the random state that it starts from.

    ``repeat`` evaluates it again after the step. Dropout and quantization noise repeat, so that a
    difference in the losses is due only to the step. Running statistics of modules in training
    mode (batch norm, codebooks) and the random generators are put back afterwards.
    """

    def __init__(self, closure: Callable[[], Any], devices: Iterable[torch.device]) -> None:
        self._closure = closure
        self._start = RandomState(devices)

    def repeat(self) -> Any:
        """Evaluate once more, without a graph."""
        with repeat_conditions(self._start):
            return self._closure()


def evaluate(closure: Callable[[], Any]) -> Any:
    """Evaluate with a graph, also under ``no_grad``."""
    with torch.enable_grad():
        return closure()


def add_losses(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several micro-batches, added by name."""
    total: dict[str, Tensor] = {}
    for losses in batches:
        for name, loss in losses.items():
            plain = as_plain(loss) if isinstance(loss, Tensor) else loss
            total[name] = total[name] + plain if name in total else plain
    return total


@contextmanager
def repeat_conditions(start: RandomState) -> Iterator[None]:
    """Run a forward pass as it ran from `start`, without a graph, and put back what it changes."""
    end = RandomState(start.devices)
    start.restore()
    # Within an autocast region the cache still holds casts of the parameters from before the step;
    # after this pass it would hold casts without a graph.
    torch.clear_autocast_cache()
    try:
        with torch.no_grad(), _restore_buffers():
            yield
    finally:
        torch.clear_autocast_cache()
        end.restore()


class _SavedBuffer(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    copy: Tensor


@contextmanager
def _restore_buffers() -> Iterator[None]:
    """Put back the buffers of every module that runs inside."""
    known: set[nn.Module] = set()
    saved: list[_SavedBuffer] = []
    broadcasting: list[nn.Module] = []

    def save(root: nn.Module) -> None:
        # The outermost module that runs brings its submodules: compiled ones are not announced.
        for module in [] if root in known else root.modules():
            if module in known:
                continue
            known.add(module)
            if broadcasts_buffers(module):
                broadcasting.append(module)
            saved.extend(
                _SavedBuffer(module, name, buffer, buffer.clone())
                for name, buffer in _buffers_of(module)
            )

    try:
        with announce_module_calls(save):
            yield
    finally:
        for module, name, buffer, copy in reversed(saved):
            # `_version` cannot tell whether it was written: batch norm does not increment it.
            if not _is_expanded(buffer):
                buffer.copy_(copy)
            setattr(module, name, buffer)
        for module in broadcasting:
            request_buffer_broadcast(module)


def _buffers_of(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The buffers that a forward pass may write: those of a module in training mode."""
    if not module.training:
        return ()
    return module.named_buffers(recurse=False, remove_duplicate=False)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several entries share memory, so that PyTorch allows no write in place."""
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, strides, strict=False))
