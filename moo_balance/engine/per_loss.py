"""The reference engine: one ``autograd.grad`` per loss, unreachable parameters skipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moo_balance.engine.base import Engine, Linearization, Problem, Window
from moo_balance.engine.kept_rows import KeptRows, RowWindow


@dataclass(frozen=True)
class PerLoss(Engine):
    """Differentiate each loss once and keep the K gradients until they are combined.

    Time: K backward passes, each through the part of the graph its loss reaches. Memory: the
    gradients themselves, at most K·P numbers; a parameter that a loss does not reach takes none.
    A method that needs no Gramian costs one ordinary backward pass.

    The weight of a linear layer has a gradient of two thin factors, the layer's input and the
    gradient at its output. Where inner products and the weighted sum take fewer multiplications
    from the factors, the K gradients of that weight are never formed.

    On several ranks each row is averaged over them while the next one is differentiated, so that
    the Gramian is that of the averaged gradients. Rows of sharded parameters (``fully_shard``)
    stay sharded, and their inner products are summed over the shards.

    Gradients are written to the wrapped optimizer's parameters.

    Args:
        dtype: Precision of the Gramian, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own.
    """

    dtype: torch.dtype = torch.float32

    def linearize(self, problem: Problem) -> Linearization:
        if problem.features:
            from moo_balance.engine.bottleneck import AtFeatures

            return AtFeatures(problem, self.dtype)
        return KeptRows(problem, self.dtype)

    def window(self) -> Window:
        return RowWindow(self.dtype)
