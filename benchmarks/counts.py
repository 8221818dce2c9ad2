"""What can be counted rather than timed: numbers that are kept, looks at the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contestants import balanced
from moo_balance.engine import Streaming
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput

_COPY = torch.ops.aten._to_copy.default
_LOOKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}
# Not cudaDeviceSynchronize, which the profiler itself calls at its end.
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class HostLooks(TorchDispatchMode):
    """Counts how often the host asks for values of tensors on the meta device.

    That device computes nothing, so it stands for one that is not to be waited for. A copy of a
    square matrix to the host becomes an identity, any other copy ones, and a single number 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if on_meta and func in _LOOKS:
            self.looks.append(str(func))
            return 1.0
        if on_meta and func is _COPY and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.looks.append(str(func))
            return _made_up(args[0], kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class PeakNumbers(TorchDispatchMode):
    """Counts the most numbers that lie at the same time in tensors which were made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.now = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), are_made=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, are_made=True)
        return result

    def _see(self, things: Any, are_made: bool) -> None:
        for thing in tree_leaves(things):
            if not isinstance(thing, Tensor):
                continue
            storage = thing.untyped_storage()
            place, numbers = storage._cdata, storage.nbytes() // thing.element_size() * are_made
            if place not in self.known:
                self.known.add(place)
                self.now += numbers
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, place, numbers)

    def _forget(self, place: int, numbers: int) -> None:
        self.known.discard(place)
        self.now -= numbers


def _made_up(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.dim() == 2 and like.shape[0] == like.shape[1]:
        return torch.eye(like.shape[0], dtype=dtype)
    return torch.ones(like.shape, dtype=dtype)


@dataclass(frozen=True)
class Pause(Weighting):
    """Equal weights; looks around at the moment when gradients have been taken, and are held.

    Args:
        look: Called then.
    """

    uses_gramian: ClassVar[bool] = True
    look: Callable[[], None] = field(default=lambda: None)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        self.look()
        equal = torch.full_like(statistics.losses, 1.0 / len(statistics.names))
        return WeightingOutput(equal, equal, state)


def held_numbers(optimizer_step: Callable[[Weighting], Callable[[], None]]) -> int:
    """Numbers in tensors that are there when weights are chosen and were not before the step.

    The forward pass's own tensors that somebody holds are among them; what the graph has saved is
    not. So are K rows: what an engine keeps beside the graph.

    Args:
        optimizer_step: From a weighting to a function that takes one step under it.
    """
    found: list[int] = []
    before: set[int] = set()

    def look() -> None:
        found.append(sum(n for store, n in _stores().items() if store not in before))

    step = optimizer_step(Pause(look))
    before.update(_stores())
    step()
    return found[-1]


WAYS: dict[str, Callable[[Weighting], Callable[[Any], Callable[[], None]]]] = {
    "one gradient per loss": balanced,
    "at features": partial(balanced, at_features=True),
    "exact, behind features": partial(balanced, at_features=True, exact=True),
    "streaming": partial(balanced, engine=Streaming()),
}
"""Ways to take gradients, each from a weighting to a step."""


def _stores() -> dict[int, int]:
    """Memory behind all living tensors, as address and numbers."""
    stores = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            stores[storage.data_ptr()] = storage.nbytes() // thing.element_size()
    return stores


def on_gpu(step: Callable[[], object]) -> dict[str, int]:
    """Kernels that a step launches, and how often the host waits within it."""
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
