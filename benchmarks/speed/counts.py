"""What can be counted instead of timed: elements in memory, synchronizations, kernels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.implementations import balanced_step
from moo_balance.engine import Streaming
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput

_COPY = torch.ops.aten._to_copy.default
_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}
# Without cudaDeviceSynchronize, which the profiler itself calls at its end.
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class HostSyncs(TorchDispatchMode):
    """Records when the host reads values of tensors on the meta device.

    The meta device computes nothing, so it stands for an asynchronous device: each read would wait
    for it. A copy of a square matrix to the host returns the identity, one of a mask marks nothing,
    any other copy is of ones, and a single value is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if on_meta and func in _READS:
            self.syncs.append(str(func))
            return 1.0
        if on_meta and func is _COPY and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.syncs.append(str(func))
            return _substitute(args[0], kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class PeakElements(TorchDispatchMode):
    """Counts the most elements alive at the same time in tensors created under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.now = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._register((args, kwargs), created=False)
        result = func(*args, **(kwargs or {}))
        self._register(result, created=True)
        return result

    def _register(self, values: Any, created: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, elements = storage._cdata, storage.nbytes() // value.element_size() * created
            if key not in self.known:
                self.known.add(key)
                self.now += elements
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key, elements)

    def _forget(self, key: int, elements: int) -> None:
        self.known.discard(key)
        self.now -= elements


def _substitute(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.dim() == 2 and like.shape[0] == like.shape[1]:
        return torch.eye(like.shape[0], dtype=dtype)
    return torch.full(like.shape, dtype != torch.bool, dtype=dtype)


@dataclass(frozen=True)
class Probe(Weighting):
    """Equal weights; calls a function when the gradients have been taken and are still held.

    Args:
        call: Called whenever weights are computed.
    """

    uses_gramian = True
    call: Callable[[], None] = field(default=lambda: None)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        self.call()
        equal = torch.full_like(statistics.losses, 1.0 / len(statistics.names))
        return WeightingOutput(equal, equal, state)


def held_elements(optimizer_step: Callable[[Weighting], Callable[[], None]]) -> int:
    """Count elements of tensors that exist when weights are computed, but not before the step.

    Counted are the K rows of an engine and the forward pass's tensors that Python references; not
    counted is what only the graph has saved.

    Args:
        optimizer_step: From a weighting to a function that takes one step with it.
    """
    counted: list[int] = []
    before: set[int] = set()

    def count() -> None:
        counted.append(sum(n for address, n in _storages().items() if address not in before))

    step = optimizer_step(Probe(count))
    before.update(_storages())
    step()
    return counted[-1]


MODES: dict[str, Callable[[Weighting], Callable[[Any], Callable[[], None]]]] = {
    "one gradient per loss": balanced_step,
    "at features": partial(balanced_step, at_features=True),
    "streaming": partial(balanced_step, engine=Streaming()),
}
"""Ways to take gradients, each from a weighting to a step."""


def _storages() -> dict[int, int]:
    """Number of elements of the memory of all living tensors, by address."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes() // thing.element_size()
    return storages


def on_gpu(step: Callable[[], object]) -> dict[str, int]:
    """Count the kernels that a step launches, and how often the host waits within it."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
    events = list(profiler.events())
    kernels = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    waits = [event for event in events if event.name in _WAITS]
    return {"kernels": len(kernels), "waits": len(waits)}
