"""Evaluates the losses of many batches, each from the same state, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moo_balance._reevaluation.copies import Copies
from moo_balance._reevaluation.evaluation import evaluate, without_synchronization
from moo_balance._reevaluation.module_state import ModuleState
from moo_balance._reevaluation.random_state import NumpyState, RandomState
from moo_balance._reevaluation.reachable import find_reachable
from moo_balance._reevaluation.writes import watch_writes

Evaluate: TypeAlias = Callable[[Callable[[], Any]], Any]


class DryRuns:
    """Evaluations of losses that are all undone.

    Random numbers go on from one batch to the next, so that the noise of batches is independent.
    What a batch writes (running statistics, codebooks) is undone before the next one.

    Args:
        function: Computes losses. Its closure and arguments tell which modules are restored.
        params: The parameters that gradients are taken of.

    Attributes:
        modules: The modules that are restored.
    """

    def __init__(self, function: Callable[..., Any], params: Sequence[Tensor]) -> None:
        self._params = params
        self.modules, self._tensors = find_reachable(function)
        owned = [param for module in self.modules for param in module._parameters.values()]
        leaves = [param for param in (*params, *owned) if param is not None and param.is_leaf]
        self._leaves = list(dict.fromkeys(leaves))

    @contextmanager
    def restore_random_state(self) -> Iterator[None]:
        """Set all random generators back at the end."""
        random, numpy = RandomState(param.device for param in self._params), NumpyState(exact=True)
        try:
            yield
        finally:
            random.restore()
            numpy.restore()

    @contextmanager
    def undo(self) -> Iterator[Evaluate]:
        """Undo what happens inside to modules and parameters, ``.grad`` included.

        Gives a function that evaluates a closure; writes in place are seen within it only. Losses
        may be differentiated inside.
        """
        copies = Copies()
        for module in self.modules:
            for buffer in module._buffers.values():
                if buffer is not None:
                    copies.add(buffer)
        state = ModuleState(self.modules, [*self._params, *self._tensors])
        leaves = [(leaf, leaf.grad, leaf.requires_grad) for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None  # what is added to it inside goes to a new tensor

        def evaluate_watched(closure: Callable[[], Any]) -> Any:
            with watch_writes(copies.add):
                return evaluate(closure)

        torch.clear_autocast_cache()
        try:
            with without_synchronization(self.modules):
                yield evaluate_watched
        finally:
            torch.clear_autocast_cache()  # it holds casts with a graph that is freed
            copies.put_back()
            state.put_back()
            for leaf, grad, requires_grad in leaves:
                leaf.grad = grad
                leaf.requires_grad_(requires_grad)
