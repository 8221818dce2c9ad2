"""A window of micro-batches (``accumulate()``); used only while one is open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance._grad_scaler import Scaling
from moo_balance._reevaluation import Reevaluation, add_losses
from moo_balance.engine import Window
from moo_balance.engine.distributed import is_whole
from moo_balance.errors import BalanceError
from moo_balance.weighting.base import Statistics


class ClearMark:
    """Tells whether gradients were cleared, as by ``model.zero_grad()``, while a window is open.

    The window's gradients are not in ``.grad``, where such a call would find them. So a gradient
    in ``.grad`` is watched: one that is there, or a tensor put there, which is taken away again.

    Args:
        params: The parameters that train. The smallest one is watched, if none has a gradient.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.param = min(params, key=_reluctance)
        self.is_own = self.param.grad is None
        self.grad: Tensor = _almost_zero(self.param) if self.param.grad is None else self.param.grad
        self.param.grad = self.grad
        self.version = self.grad._version

    def is_cleared(self) -> bool:
        """Whether the gradient is gone, or was written to and is zero. The latter synchronizes."""
        if self.param.grad is not self.grad:
            return True
        if self.grad.is_sparse or not is_whole(self.grad):
            return False
        # A write by way of `.data` is not counted. Reading a value on the CPU costs nothing.
        is_readable = self.is_own and self.grad.is_cpu and self.grad.numel()
        if self.grad._version == self.version and not is_readable:
            return False
        return not bool(self.grad.any())

    def remove(self) -> None:
        """Leave ``.grad`` as it would be without a mark."""
        if self.is_own and self.param.grad is self.grad and not self.is_added_to():
            self.param.grad = None

    def is_added_to(self) -> bool:
        """Whether the tensor has got a gradient since. Clipping makes it smaller only."""
        if self.grad._version == self.version or not self.grad.numel():
            return False
        return bool((self.grad.abs() > _smallest(self.grad.dtype)).any())


def _reluctance(param: Tensor) -> tuple[bool, bool, int]:
    """Sort key: first one that has a gradient, then a whole one, then the smallest."""
    return param.grad is None, not (param.numel() and is_whole(param)), param.numel()


def _almost_zero(param: Tensor) -> Tensor:
    """A gradient that still differs from zero once it was clipped."""
    gradient = torch.zeros_like(param, requires_grad=False)
    if param.numel() and is_whole(param):
        gradient[(0,) * param.ndim] = _smallest(param.dtype)
    return gradient


def _smallest(dtype: torch.dtype) -> float:
    tiny = torch.finfo(dtype).tiny
    return tiny if dtype == torch.float16 else tiny * 2**30


@dataclass(eq=False, repr=False)
class Accumulation:
    """Sums over the micro-batches of an open window.

    Args:
        losses: Sums of the losses so far, by name.
        reevaluations: How to evaluate each micro-batch again.
        is_repeatable: Whether this is known of all of them so far.
        gradients: One gradient per loss so far; None for a method that knows its coefficients
            beforehand, whose gradients went straight to ``.grad``.
        coefficients: Those coefficients, in the order of ``losses``.
        scaling: The loss scaler of the first micro-batch.
        mark: What tells whether gradients were cleared meanwhile.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    reevaluations: list[Reevaluation] = field(default_factory=list)
    is_repeatable: bool = True
    gradients: Window | None = None
    coefficients: Tensor | None = None
    scaling: Scaling | None = None
    mark: ClearMark | None = None

    def is_cleared(self) -> bool:
        """Whether gradients were cleared since the last micro-batch, which gives the window up."""
        return self.mark is not None and self.mark.is_cleared()

    def set_mark(self, params: Sequence[Tensor]) -> None:
        """Watch for calls that clear gradients, from now on."""
        mark = self.mark
        if mark is None or mark.param.grad is not mark.grad:
            self.mark = ClearMark(params) if params else None
        elif mark.version != mark.grad._version:
            mark.is_own = mark.is_own and not mark.is_added_to()
            mark.version = mark.grad._version

    def remove_mark(self) -> None:
        """No longer watch for them."""
        if self.mark is not None:
            self.mark.remove()
            self.mark = None

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
        self.is_repeatable = self.is_repeatable and bool(reevaluations)

    def close_reevaluations(self, last: Sequence[Reevaluation]) -> Sequence[Reevaluation]:
        """How to evaluate the window again, with its last micro-batch; none if a part is missing.

        Micro-batches whose losses came without a closure are the caller's to evaluate.
        """
        return [*self.reevaluations, *last] if last and self.is_repeatable else ()

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
