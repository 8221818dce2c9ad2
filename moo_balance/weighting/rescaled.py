"""Rescaled: any method, with a step of a chosen length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moo_balance.errors import BalanceValueError
from moo_balance.functional import rescale
from moo_balance.weighting._arguments import check_choice, check_whole
from moo_balance.weighting._identity import method_name
from moo_balance.weighting._wrapping import (
    WrappingWeighting,
    as_inner,
    check_weighting,
    inner_state,
)
from moo_balance.weighting.base import (
    Needs,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
    state_dtype,
)


@dataclass(frozen=True)
class Rescaled(WrappingWeighting):
    r"""Any method, with coefficients multiplied by one number that sets the length of the step.

    Methods differ in what their coefficients sum to, and where losses differ in scale that says
    little about the length of :math:`d = \sum_i c_i g_i`: the log methods, which divide by the
    losses, follow the gradient of the smallest loss in size. With SGD the learning rate of the
    plain sum then hardly moves the model. `length` chooses :math:`\alpha` in :math:`\alpha d`:

    * ``"sum"`` (default): as long as the gradient of the plain sum, so that a learning rate and a
      clipping threshold that were tuned for the plain sum keep their meaning;
    * ``"mean"``: as long as the gradients are on average;
    * ``"one"``, ``"count"``: coefficients whose absolute values sum to 1, or to K.

    The lengths are read off the Gramian. Where the method computes none, one is computed in every
    `every`-th step and used until the next, with the coefficients of each step: their directions
    are of each step, only the inner products are older.

    Where losses differ in scale, ``"sum"`` served SGD best, with and without clipping. Adam divides
    by the size of recent gradients, so the length matters little to it, except where scales lie
    many orders of magnitude apart: its averages of squared gradients lag behind a length that
    follows the smallest loss. Where scales are alike all lengths did about as well
    (``python -m benchmarks.step_length``).

    ``"sum"`` and ``"mean"`` undo the shrinking of a direction where gradients cancel, which is how
    :class:`MGDA` comes to a stop; the factor is bounded (:func:`~moo_balance.functional.rescale`),
    but prefer a decreasing learning rate with them. Whether a loss may rise: as the method.

    Coefficients: sum to what the length needs; with ``"one"`` and ``"count"`` to 1 and K if none is
    negative. The weights reported are those of the method.

    Args:
        weighting: The method, such as ``FAMO()``.
        length: One of the above. Default ``"sum"``.
        every: Compute a Gramian each n-th step where the method computes none. Default 20: with two
            losses that is one more backward pass in twenty.

    Raises:
        BalanceValueError: `weighting` is no method, or another argument is out of range; a length
            that depends on gradients around a method of independent batches (:class:`MoDo`) or of
            single coordinates (:class:`GradDrop`).

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, Rescaled, SumLog
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Rescaled(SumLog()))
        >>> _ = optimizer.backward({"a": w[0] ** 2, "b": 100 * w[1] ** 2})
        >>> plain = torch.tensor([2.0, 400.0])
        >>> round(float(w.grad.norm() / plain.norm()), 4)
        1.0
    """

    weighting: Weighting
    length: Literal["sum", "mean", "one", "count"] = "sum"
    every: int = 20

    def __post_init__(self) -> None:
        check_weighting(self, "weighting", self.weighting)
        check_choice(self, "length", ("sum", "mean", "one", "count"))
        check_whole(self, "every", 1)
        rows = self.weighting.needs(0).rows
        if (
            self.measures
            and rows is not None
            and (rows.combines == "coordinates" or rows.steps_apart)
        ):
            raise BalanceValueError(
                f"Parameter `length` of Rescaled should be 'one' or 'count' around "
                f"{method_name(self.weighting)}, whose direction is no combination of the "
                f"gradients. Found {self.length!r}."
            )
        if self.measures and self.weighting.uses_independent_batches:
            raise BalanceValueError(
                f"Parameter `length` of Rescaled should be 'one' or 'count' around "
                f"{method_name(self.weighting)}, whose Gramian is an estimate that need not be one "
                f"of lengths. Found {self.length!r}."
            )

    @property
    def measures(self) -> bool:
        """Whether the length depends on the gradients."""
        return self.length in ("sum", "mean")

    @property
    def uses_gramian(self) -> bool:
        return self.measures or self.weighting.uses_gramian

    def needs(self, step: int) -> Needs:
        needs = self.weighting.needs(step)
        if not self.measures or needs.compares:
            return needs
        return needs._replace(compares=True, gramian=step % self.every == 0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        inner = as_inner(self.weighting.init(names, device))
        if not self.measures:
            return inner
        shape, dtype = (len(names), len(names)), state_dtype(device)
        return {"gramian": torch.full(shape, math.nan, dtype=dtype, device=device), **inner}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        seen = statistics
        if not self.weighting.needs(statistics.step).gramian:
            seen = statistics._replace(gramian=None)
        weights, coefficients, inner = self.weighting.weights(seen, inner_state(state))
        kept, gramian = as_inner(inner), statistics.gramian
        if self.measures:
            gramian = state["gramian"] if gramian is None else gramian.to(state["gramian"].dtype)
            kept["gramian"] = gramian
        combined = None if statistics.rows is None else statistics.rows.gramian
        satisfied = statistics.satisfied
        if satisfied is not None:
            coefficients = coefficients.masked_fill(satisfied, 0.0)
            if gramian is not None:  # the kept one still has their products
                gramian = gramian.masked_fill(satisfied.unsqueeze(1) | satisfied, 0.0)
        if self.length == "count":
            total = len(coefficients) if satisfied is None else (~satisfied).sum()
            coefficients = rescale(coefficients, "one") * total
        else:
            coefficients = rescale(coefficients, self.length, gramian, combined)
        return WeightingOutput(weights, coefficients, kept)
