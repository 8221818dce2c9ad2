"""Evaluates the losses of a batch again after the step: from the same state, and with no trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moo_balance._reevaluation.copies import RESHAPES, Copies, KnownWrites
from moo_balance._reevaluation.module_state import ModuleState
from moo_balance._reevaluation.random_state import NumpyState, RandomState
from moo_balance._reevaluation.reachable import find_reachable
from moo_balance._reevaluation.writes import memory_address
from moo_balance._torch_internals import (
    as_plain,
    broadcasts_buffers,
    request_buffer_broadcast,
)
from moo_balance.engine.base import is_distributed
from moo_balance.errors import BalanceError, BalanceValueError


class Reevaluation:
    """A closure that is evaluated twice: before the step and after it.

    The second evaluation sees what the first saw, except for the step: the same random numbers,
    and in tensors that the forward pass writes (running statistics, codebooks) the same values.
    Afterwards all of that is as the first evaluation has left it.

    Args:
        closure: Computes the losses.
        params: The parameters that train.
        known: What earlier second evaluations have written.
    """

    def __init__(
        self, closure: Callable[[], Any], params: Sequence[Tensor], known: KnownWrites
    ) -> None:
        self._closure = closure
        self._params = params
        self._known = known

    def first(self) -> Any:
        """Evaluate, and keep what the second evaluation starts from."""
        self._autocast = AutocastState({param.device.type for param in self._params})
        self._random = RandomState({param.device for param in self._params})
        self._modules, self._tensors = find_reachable(self._closure)
        self._numpy = NumpyState(exact=self._known.draws_from_numpy)
        state = ModuleState(
            self._modules, [*self._params, *self._tensors], only_versions=not self._known.assigns
        )
        self._before = Copies()
        self._known.add_to(self._before)
        with self._known.watch_first(self._before, self._modules):
            result = evaluate(self._closure)
        self._known.note_draws(self._numpy.has_changed())
        self._assigned, self._moved = state.changes(), state.relocations()
        self._written = state.written()
        return result

    def repeat(self) -> Any:
        """Evaluate again; the losses have no graph."""
        with self._restore_all():
            return _detach(evaluate(self._closure))

    @contextmanager
    def _restore_all(self) -> Iterator[None]:
        """Start as the first evaluation did, and put back everything that changes inside."""
        end = RandomState(self._random.devices)
        numpy_end = NumpyState(exact=self._numpy.has_changed())
        state = ModuleState(self._modules, [*self._params, *self._tensors])
        copies = Copies()
        try:
            self._rewind(copies)
            self._random.restore()
            self._numpy.restore()
            # Within an autocast region the cache still holds casts of the parameters from before
            # the step; afterwards it would hold casts of this evaluation's graph.
            torch.clear_autocast_cache()
            watch = self._known.watch_second(copies, self._modules, self._written)
            with watch, self._autocast.restore(), without_synchronization(self._modules):
                yield
        finally:
            torch.clear_autocast_cache()
            copies.put_back()
            is_assigned = state.put_back()
            self._known.assigns = is_assigned or bool(self._assigned or self._moved)
            end.restore()
            numpy_end.restore()
        self._known.learn(copies)

    def _rewind(self, copies: Copies) -> None:
        """Undo what the first evaluation has written, after a copy of it.

        A parameter with a gradient keeps what the step has made of it.
        """
        stepped = [param for param in self._params if param.grad is not None]
        addresses = {memory_address(param) for param in stepped}
        for tensor in self._written:
            copies.add(tensor)
        for tensor, _ in self._before.shapes:
            copies.add(tensor, RESHAPES)
        self._known.add_to(copies)
        for storage, _ in self._before.storages.values():
            copies.add_storage(storage)
        for tensor, _ in self._before.others.values():
            copies.add(tensor)
        self._before.put_back(addresses)
        for change in self._assigned:
            if change.holds():
                change.undo()
        trained = set(map(id, stepped))
        for tensor, data in self._moved:
            if id(tensor) not in trained:
                tensor.data = data


class AutocastState:
    """Whether autocast is on for some device types, and with which dtype."""

    def __init__(self, device_types: Iterable[str]) -> None:
        self._types = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", *device_types}
            if kind != "meta"
        }

    @contextmanager
    def restore(self) -> Iterator[None]:
        """Restore it within the context."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._types.items():
                if torch.is_autocast_enabled(kind) != enabled or enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def evaluate(closure: Callable[[], Any]) -> Any:
    """Evaluate with a graph, also under ``no_grad``."""
    with torch.enable_grad():
        return closure()


def _detach(losses: Any) -> Any:
    """The losses without their graph, which is freed; anything else as it is."""
    if not isinstance(losses, Mapping):
        return losses
    return {
        name: as_plain(loss).detach() if isinstance(loss, Tensor) else loss
        for name, loss in losses.items()
    }


def repeat_all(
    reevaluations: Sequence[Reevaluation], agree: Callable[[bool], bool] | None = None
) -> Any:
    """Evaluate the micro-batches of a window again, and add their losses.

    Args:
        reevaluations: The micro-batches.
        agree: Whether all ranks have succeeded, given whether this one has; None for one process.
            It is called between two micro-batches, whose forward pass may need the other ranks.
    """
    results = []
    for number, reevaluation in enumerate(reevaluations, start=1):
        is_last = number == len(reevaluations)
        try:
            results.append(reevaluation.repeat())
            if not (is_last or isinstance(results[-1], Mapping)):
                raise BalanceValueError(
                    "A closure should return a mapping of losses also when it is evaluated again. "
                    f"Found {type(results[-1]).__name__}. Return the same losses as at first."
                )
        except BaseException:
            if agree is not None and not is_last:
                agree(False)
            raise
        if agree is not None and not is_last and not agree(True):
            raise BalanceError(
                "All ranks should evaluate their micro-batches again after the step. Found one "
                "that could not. Its own message says why."
            )
    if len(results) == 1 or not isinstance(results[-1], Mapping):
        return results[-1]  # what is no mapping will be refused as a result of the closure
    return add_losses(results)


def add_losses(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several micro-batches, added by name."""
    total: dict[str, Tensor] = {}
    for losses in batches:
        for name, loss in losses.items():
            total[name] = total[name] + loss if name in total else loss
    return total


@contextmanager
def without_synchronization(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep DistributedDataParallel from expecting a backward pass of what runs inside."""
    loaded = sys.modules.get("torch.nn.parallel.distributed")
    if loaded is None or not is_distributed():
        yield
        return
    with ExitStack() as stack:
        parallel = [each for each in modules if isinstance(each, loaded.DistributedDataParallel)]
        broadcasting = [each for each in parallel if broadcasts_buffers(each)]
        for module in parallel:
            stack.enter_context(module.no_sync())
        try:
            yield
        finally:
            for module in broadcasting:
                request_buffer_broadcast(module)
