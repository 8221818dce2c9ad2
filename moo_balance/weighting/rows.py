"""Methods that look at single coordinates of gradients, not only at inner products.

A *row* is the gradient of one loss. Once the Gramian of a step is known and finite, the engine
goes through the rows, parameter by parameter, and applies what such a method gives:

    row k, averaged over ranks --> track(what was kept of loss k, row k) --> kept, as large as a row
                               --> summand(kept, row k), added up        --> statistics.rows.total
                               --> max |g|, mean |g|                     --> statistics.rows
    K kept rows --> statistics.rows.gramian
    solve(statistics, ...) --> coefficients
    coefficients, and K gradients, K kept rows, or combine(K gradients) --> .grad

What is kept belongs to one parameter and one loss. It is staged in ``backward`` and committed in
``step``, saved, resumed, sharded and copied like the state of an optimizer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from moo_balance.errors import BalanceError
from moo_balance.weighting.base import GramianWeighting, Needs, State, Statistics


class RowStatistics(NamedTuple):
    """What a :class:`RowWeighting` is told of single coordinates, over the compared parameters.

    Args:
        largest: Largest magnitude of an element of each gradient, shape [K].
        mean: Mean magnitude of all elements, shape [K]; zero where a loss does not reach.
        total: The sum of ``summand`` over all coordinates, shape [K].
        gramian: Inner products of what is kept, shape [K, K], for a method that combines that.
    """

    largest: Tensor | None = None
    mean: Tensor | None = None
    total: Tensor | None = None
    gramian: Tensor | None = None


class RowWeighting(GramianWeighting):
    """A weighting that looks at single coordinates of gradients.

    It needs the K gradients whole, so its engine is ``PerLoss``. Six properties say what it does
    with them; a subclass overrides them as those of :class:`Weighting`. The functions below are
    applied to what this rank holds of one parameter, in float32 or better and without the loss
    scale; they must not write into what they are given.
    """

    @property
    def uses_magnitudes(self) -> bool:
        """Whether :meth:`solve` needs ``statistics.rows.largest`` and ``mean``."""
        return False

    @property
    def keeps(self) -> str:
        """What the tensors that :meth:`track` returns are called in a checkpoint; "" for none."""
        return ""

    @property
    def uses_total(self) -> bool:
        """Whether :meth:`solve` needs ``statistics.rows.total``, the sum of :meth:`summand`."""
        return False

    @property
    def combines(self) -> Literal["gradients", "kept", "coordinates"]:
        """What becomes ``.grad``.

        The sum of coefficients times "gradients", or times what is "kept"; or, coordinate by
        coordinate, :meth:`combine` of coefficients times gradients. The latter two allow no
        ``every``, as they are needed in each step.
        """
        return "gradients"

    @property
    def steps_apart(self) -> bool:
        """Whether each loss takes the wrapped optimizer's step by itself, with its own state.

        The steps are averaged with the coefficients, which sum to 1.
        """
        return False

    @property
    def seed(self) -> int:
        """Seed of what is drawn for :meth:`combine`."""
        return 0

    def needs(self, step: int) -> Needs:
        needs = super().needs(step)
        return needs._replace(rows=self) if needs.gramian else needs

    def row_factors(self, statistics: Statistics) -> Tensor | None:
        """What each gradient is multiplied by before :meth:`track`, shape [K]; None for 1."""
        return None

    def track(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """What is kept of the gradient of a loss: zeros before its first one."""
        raise NotImplementedError

    def summand(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """A quantity of each coordinate whose sum is wanted, given what :meth:`track` returned."""
        raise NotImplementedError

    def combine(self, gradients: Sequence[Tensor], draw: Callable[[], Tensor]) -> Tensor:
        """The gradient of a parameter, from those of the losses that reach it, one or more.

        A common factor of the gradients, such as a loss scale, must pass through. ``draw()`` gives
        a uniform random number in [0, 1) for each coordinate. It depends on the ``seed`` of the
        method, the step and the parameter only.
        """
        raise NotImplementedError

    @abstractmethod
    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        """As :meth:`GramianWeighting.solve`; ``statistics.rows`` tells of single coordinates."""


def rows_of(statistics: Statistics, method: RowWeighting) -> RowStatistics:
    """The statistics of the rows, which ``BalancedOptimizer`` gives."""
    if statistics.rows is None:
        raise BalanceError(
            f"{type(method).__name__} looks at single coordinates of gradients. Found statistics "
            "without `rows`. A method around it should forward its `needs`."
        )
    return statistics.rows
