"""PCGrad: gradients without their components against one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.functional._checks import check_square, result_dtype
from moo_balance.functional._pair import add_multiples, read_pair
from moo_balance.weighting._arguments import check_whole
from moo_balance.weighting._random import step_generator
from moo_balance.weighting._reduction import Reduction, ReductionWeighting
from moo_balance.weighting.base import State, Statistics


@dataclass(frozen=True)
class PCGrad(ReductionWeighting):
    r"""Projecting Conflicting Gradients: each gradient without its components against the others.

    Starting from :math:`v_i = g_i`, each gradient meets all others in a random order of its own,
    and

    .. math::
        v_i \leftarrow v_i - \frac{\min(v_i \cdot g_j, 0)}{\lVert g_j \rVert^2}\, g_j, \qquad
        d = \sum_i v_i

    The projection removes the component along the *original* :math:`g_j`, and a gradient never
    meets itself. Everything follows from the Gramian: the gradients are combined once, at the end.

    Coefficients: sum to at least K (1 for ``"mean"``), and to just that where no gradients
    conflict.

    A loss may rise if there are more than two: a later projection can undo an earlier one, and the
    sum of corrected gradients can oppose one of the gradients. For two it cannot.

    Args:
        reduction: Add the corrected gradients (``"sum"``) or average them (``"mean"``). Default
            ``"sum"`` (paper, Algorithm 1; LibMTL and TorchJD). The most used port of the code
            averages whatever it is asked for, and so do `pytorch_optimizer` and CAGrad's code.
        preference: Shares of the corrected gradients in the sum, by name. Default None, equal.
        seed: Chooses the orders. Each step draws new ones, the same on all ranks.
        every: Solve each n-th step only, and keep the coefficients in between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses.

    Source: Yu et al., *Gradient Surgery for Multi-Task Learning* (NeurIPS 2020), arXiv 2001.06782,
    Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import PCGrad
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])  # gradients (1, 0) and (-1, 1)
        >>> PCGrad().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([2.0000, 1.5000])
    """

    reduction: Reduction = "sum"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    seed: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "seed", 0)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        check_square(gramian)
        shares = self.shares(statistics.names)
        dtype = result_dtype(gramian)
        if len(shares) == 1:
            return {"weights": gramian.new_tensor(shares, dtype=dtype)}
        if len(shares) == 2:
            return {"weights": gramian.new_tensor(_project_two(gramian, shares), dtype=dtype)}
        from moo_balance.functional import _surgery  # loads NumPy
        from moo_balance.functional._directions import directions

        gradients = directions(gramian)
        order = _surgery.draw_order(len(shares), step_generator(self.seed, statistics.step))
        parts = _surgery.project_conflicts(gradients.cosines, order)
        added = _surgery.add_corrections(parts, gradients.norms, shares)
        return {"weights": torch.from_numpy(added).to(gramian.device, dtype)}


def _project_two(gramian: Tensor, shares: Sequence[float]) -> list[float]:
    pair = read_pair(gramian)
    multiple = max(-pair.cosine, 0.0)
    return add_multiples(pair, multiple, multiple, shares)
