"""Priority-constrained descent: one loss first, and a little progress for all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import check_square, precision, result_dtype
from moo_balance.functional._pair import Pair, read_pair
from moo_balance.weighting._arguments import (
    FloatOrByName,
    check_common,
    check_names,
    check_range,
    constant_state,
    values_by_name,
)
from moo_balance.weighting.base import GramianWeighting, State, Statistics


@dataclass(frozen=True)
class PCD(GramianWeighting):
    r"""Priority-Constrained Descent: follow one loss, with some progress for each of the others.

    With :math:`g_1` the gradient of the primary loss, and all gradients divided by their usual
    length, :math:`\tilde g_i = g_i / \sqrt{\hat v_i}`,

    .. math::
        \tilde d = \arg\min_d \tfrac12 \lVert d - \tilde g_1 \rVert^2 \quad \text{s.t.} \quad
        \tilde g_j \cdot d \ge \tau \lVert \tilde g_j \rVert^2 \ \ (j \ge 2), \qquad
        d = \lVert g_1 \rVert \frac{\tilde d}{\lVert \tilde d \rVert}

    where :math:`\hat v_i` is the moving average of :math:`\lVert g_i \rVert^2`, divided by what its
    start from zero lacks, as Adam's second moment is.

    Published: all of the above; the primary gradient itself where the conditions exclude one
    another, which takes two other losses; and zero where :math:`g_1` or :math:`\tilde d` is.
    Decided here: the primary loss is named, so that order does not matter; the published
    :math:`\varepsilon = 10^{-8}` under the root is left out, because it has the unit of a squared
    gradient; a loss's average moves only in steps in which it is present and has a gradient. Where
    the *primary* loss is absent, or its gradient zero, the others are balanced among themselves:
    the shortest :math:`d` with progress in proportion to :math:`\tau`, as long as the mean of their
    gradients' lengths.

    The programme is solved exactly, through its dual, a non-negative least squares problem; the
    official code tries all subsets.

    Coefficients: have no fixed sum. That of the primary loss is 1 where no condition is active.

    A loss may rise: the primary one where it opposes another by more than :math:`\tau` allows. No
    other one rises, except where the conditions exclude one another. None rises for
    :math:`\tau = 0`, which is a projection onto the dual cone.

    Args:
        primary: Name of the primary loss.
        tau: :math:`\tau \ge 0`, the share of the progress along its own normalised gradient that
            each other loss is granted; a number, or one for each of them by name, which is their
            order of preference. Default 0.02 (paper and code).
        beta: Weight of the past in the average of squared norms. Default 0.999 (paper and code).
        every: Solve, and move the averages, each n-th step only, and keep the coefficients in
            between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses; from
            ``backward``, when the Gramian is not positive semidefinite (K > 2).

    Source: *Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
    Multi-Objective Optimization* (TMLR 2026), arXiv 2606.29521, Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import PCD
        >>> from moo_balance.weighting import Statistics
        >>> weighting = PCD("a", tau=0.0)
        >>> state = weighting.init(("a", "b"), torch.device("cpu"))
        >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])  # gradients (1, 0) and (-1, 1)
        >>> weighting.weights(Statistics(("a", "b"), torch.ones(2), gramian), state).coefficients
        tensor([1.4142, 0.7071])
    """

    primary: str
    tau: FloatOrByName = 0.02
    beta: float = 0.999
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        if not isinstance(self.primary, str) or not self.primary:
            raise BalanceValueError(
                f"Parameter `primary` of PCD should be the name of a loss. Found {self.primary!r}."
            )
        check_range(self, "tau", 0.0, named=True)
        check_range(self, "beta", 0.0, below=1.0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("primary", {self.primary: 1.0}, names)
        others = [name for name in names if name != self.primary]
        check_names("tau", self.tau, others, complete=True)
        zeros = constant_state(0.0, len(names), device)
        return {**super().init(names, device), "squares": zeros, "mass": zeros.clone()}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        check_square(gramian)
        squares = gramian.diagonal().to("cpu", torch.float64).tolist()
        averages = self._follow(squares, state)
        # An average of the least squares may vanish: then the length is taken for the usual one.
        sizes = [
            math.sqrt(square * mass / average) if average > 0.0 else float(square > 0.0)
            for square, average, mass in zip(squares, *averages, strict=True)
        ]
        weights = self._solve(statistics.names, gramian, sizes)
        keys = "squares", "mass"
        return {
            "weights": weights.to(gramian.device, result_dtype(gramian)),
            **{k: state[k].new_tensor(v) for k, v in zip(keys, averages, strict=True)},
        }

    def _follow(self, squares: list[float], state: State) -> tuple[list[float], list[float]]:
        """The averages, and the weight of what they have seen, of losses with a gradient."""
        past, present = self.beta, 1.0 - self.beta
        averages, masses = state["squares"].tolist(), state["mass"].tolist()
        for k, square in enumerate(squares):
            if square > 0.0:
                averages[k] = past * averages[k] + present * square
                masses[k] = past * masses[k] + present
        return averages, masses

    def _solve(self, names: tuple[str, ...], gramian: Tensor, sizes: list[float]) -> Tensor:
        if len(names) == 1:
            return torch.ones(1, dtype=torch.float64, device="cpu")
        primary = names.index(self.primary) if self.primary in names else None
        if primary is not None and sizes[primary] == 0.0:
            primary = None
        shares = values_by_name(self.tau, names)
        if primary is None:  # relative shares
            largest = max(shares)
            shares = [share / largest if largest > 0.0 else 1.0 for share in shares]
        least = [share * size for share, size in zip(shares, sizes, strict=True)]
        if len(names) == 2 and primary is not None:
            pair, rounding = read_pair(gramian), precision(gramian)
            found = _solve_two(pair, primary, sizes[primary], least[1 - primary], rounding)
            return torch.tensor(found, dtype=torch.float64, device="cpu")
        import numpy as np

        from moo_balance.functional._directions import directions
        from moo_balance.functional._priority import follow_primary

        gradients, rounding = directions(gramian), precision(gramian)
        return torch.from_numpy(
            follow_primary(gradients, primary, np.array(sizes), np.array(least), rounding)
        )


def _solve_two(
    pair: Pair, primary: int, size: float, least: float, precision: float
) -> list[float]:
    """Coefficients where there is one other loss, in the order of the pair."""
    first, second, cosine = pair
    multiple = max(least - cosine * size, 0.0)
    square = size**2
    if multiple > 0.0:
        square = square * (1.0 - cosine) * (1.0 + cosine) + least**2
    if square <= 8 * precision * (size + multiple) ** 2:
        return [0.0, 0.0]
    own, other = (first, second) if primary == 0 else (second, first)
    length = math.sqrt(square)
    found = [size / length, multiple / length * (own / other) if other > 0.0 else 0.0]
    return found if primary == 0 else found[::-1]
