"""A window of micro-batches (``accumulate()``); used only while one is open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance._grad_scaler import Scaling
from moo_balance._reevaluation import Reevaluation, add_losses
from moo_balance.engine import Window
from moo_balance.errors import BalanceError
from moo_balance.weighting.base import Statistics


@dataclass(eq=False, repr=False)
class Accumulation:
    """Sums over the micro-batches of an open window.

    Args:
        losses: Sums of the losses so far, by name.
        reevaluations: How to evaluate each micro-batch again.
        gradients: One gradient per loss so far; None for a method that knows its coefficients
            beforehand, whose gradients went straight to ``.grad``.
        coefficients: Those coefficients, in the order of ``losses``.
        scaling: The loss scaler of the first micro-batch.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    reevaluations: list[Reevaluation] = field(default_factory=list)
    gradients: Window | None = None
    coefficients: Tensor | None = None
    scaling: Scaling | None = None

    def sum_losses(self, statistics: Statistics) -> Statistics:
        """Statistics of the window so far together with one more micro-batch."""
        if not self.losses:
            return statistics
        added = dict(zip(statistics.names, statistics.losses.unbind(), strict=True))
        sums = add_losses([self.losses, added])
        return statistics._replace(names=tuple(sums), losses=torch.stack(list(sums.values())))

    def add(self, statistics: Statistics, reevaluations: Sequence[Reevaluation]) -> None:
        """Take in one more micro-batch, given the statistics of the whole window."""
        self.losses = dict(zip(statistics.names, statistics.losses.unbind(), strict=True))
        self.reevaluations.extend(reevaluations)

    def select_coefficients(
        self, statistics: Statistics, coefficients: Tensor, names: Sequence[str]
    ) -> Tensor:
        """Coefficients of one micro-batch; an error if those of earlier ones no longer hold.

        The coefficients of such a method depend only on which losses there are, so that only a
        loss which joins the window can change them.

        Args:
            statistics: The window as a whole.
            coefficients: The method's, for the window as a whole.
            names: The losses of this micro-batch.
        """
        before = self.coefficients
        # Compared only where a loss has joined. Otherwise nothing can differ, comparing would
        # synchronize, and the NaN of a step that GradScaler will skip would count as a change.
        if (
            before is not None
            and len(before) < len(coefficients)
            and not torch.equal(before, coefficients[: len(before)])
        ):
            raise BalanceError(
                "A window of micro-batches should have the same losses throughout for this "
                f"method. Found {list(statistics.names)} after {list(self.losses)}."
            )
        self.coefficients = coefficients
        if tuple(names) == statistics.names:
            return coefficients
        return coefficients[[statistics.names.index(name) for name in names]]
