"""Seeing the same batch again under the same conditions: random numbers, buffers, no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RandomState:
    """The state of torch's random streams: the host's, and those of the devices in use."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._host = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Set the streams back to where they were."""
        torch.set_rng_state(self._host)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    @property
    def devices(self) -> list[torch.device]:
        """The devices whose streams are held."""
        return list(self._devices)


@contextmanager
def same_conditions(before: RandomState) -> Iterator[None]:
    """Run a forward pass again as it ran from `before`: common random numbers, no gradient.

    Dropout and quantisation noise repeat, so that a difference in the losses is due to the step
    alone. Running statistics of modules in training mode (BatchNorm, codebooks) and the random
    streams leave as they came: training goes on as if nobody had looked.
    """
    after = RandomState(before.devices)
    before.restore()
    # Within an autocast region it holds the parameters from before the step; and afterwards,
    # copies that have no graph.
    torch.clear_autocast_cache()
    try:
        with torch.no_grad(), _buffers_kept():
            yield
    finally:
        torch.clear_autocast_cache()
        after.restore()


def evaluated(closure: Callable[[], Any]) -> Any:
    """Evaluate for training, with a graph."""
    with torch.enable_grad():
        return closure()


class Replay:
    """A closure that is about to be evaluated, and the random numbers it begins with."""

    def __init__(self, closure: Callable[[], Any], devices: Iterable[torch.device]) -> None:
        self._closure = closure
        self._before = RandomState(devices)

    def again(self) -> Any:
        """Evaluate once more under the same conditions."""
        with same_conditions(self._before):
            return self._closure()


def summed(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several micro-batches, added up by name."""
    total: dict[str, Tensor] = {}
    for losses in batches:
        for name, loss in losses.items():
            total[name] = total[name] + loss if name in total else loss
    return total


class _Kept(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    copy: Tensor


@contextmanager
def _buffers_kept() -> Iterator[None]:
    """Put back the buffers of every module that runs inside."""
    known: set[nn.Module] = set()
    kept: list[_Kept] = []
    spreading: list[nn.Module] = []

    def keep(root: nn.Module) -> None:
        # The outermost module that runs brings its children along: compiled ones tell nobody.
        for module in [] if root in known else root.modules():
            if module in known:
                continue
            known.add(module)
            if getattr(module, "require_forward_param_sync", False):
                spreading.append(module)
            kept.extend(
                _Kept(module, name, buffer, buffer.clone())
                for name, buffer in (module._buffers.items() if module.training else ())
                if buffer is not None
            )

    try:
        with _announced(keep):
            yield
    finally:
        for module, name, buffer, copy in reversed(kept):
            # Its version would not tell whether it was written: batch norm does not count that up.
            if not _is_expanded(buffer):
                buffer.copy_(copy)
            module._buffers[name] = buffer
        for module in spreading:
            # DistributedDataParallel spreads no buffers after a pass without a graph.
            module.require_forward_param_sync = True  # type: ignore[assignment]


_listeners: list[Callable[[nn.Module], None]] = []
_call = nn.Module.__call__


def _announcing_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A compiler finds the same function in every step, and nothing in it to compile.
    if not torch.compiler.is_compiling():
        _listeners[-1](module)
    return _call(module, *args, **kwargs)


@contextmanager
def _announced(listener: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tell `listener` of each module that is about to run.

    Not by a global hook, which would be compiled along with the model, anew in each step.
    """
    _listeners.append(listener)
    nn.Module.__call__ = _announcing_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        _listeners.pop()
        nn.Module.__call__ = _call  # type: ignore[method-assign]


def _is_expanded(tensor: Tensor) -> bool:
    """Do several entries share memory? Then nobody can have written to it, nor can we."""
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, strides, strict=False))
