"""GradVac: gradients turned towards one another, up to a usual cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.functional._checks import check_square, precision, result_dtype
from moo_balance.functional._pair import add_multiples, read_pair
from moo_balance.functional.gramian import equality_tolerance
from moo_balance.weighting._arguments import check_range, check_whole
from moo_balance.weighting._random import step_generator
from moo_balance.weighting._reduction import Reduction, ReductionWeighting
from moo_balance.weighting.base import State, Statistics, state_dtype


@dataclass(frozen=True)
class GradVac(ReductionWeighting):
    r"""Gradient Vaccine: raises the cosine of two gradients to what it usually is.

    Starting from :math:`v_i = g_i`, each gradient meets all others in a random order of its own.
    With :math:`\varphi = \cos(v_i, g_j)` and a target :math:`\hat\varphi_{ij}`,

    .. math::
        v_i &\leftarrow v_i + \lVert v_i \rVert\,
        \frac{\hat\varphi_{ij} \sqrt{1 - \varphi^2} - \varphi \sqrt{1 - \hat\varphi_{ij}^2}}
             {\lVert g_j \rVert \sqrt{1 - \hat\varphi_{ij}^2}}\; g_j
        \qquad \text{if } \varphi < \hat\varphi_{ij} \\
        \hat\varphi_{ij} &\leftarrow \beta\,\hat\varphi_{ij} + (1 - \beta)\,\varphi, \qquad
        d = \sum_i v_i

    after which the cosine of :math:`v_i` with :math:`g_j` is the target. Targets start at 0, so
    the first step is that of :class:`PCGrad`; a target that is below zero tolerates a conflict. A
    pair of losses keeps its two targets while one of them is absent, or has a gradient of zero.

    The added multiple is :math:`\sin(\theta - \hat\theta) / \sin \hat\theta` in the angles. It is
    large where gradients part that were parallel for long.

    Coefficients: sum to at least K (1 for ``"mean"``).

    A loss may rise, for two losses only where their target is below zero.

    Args:
        beta: :math:`\beta \in [0, 1)`, the weight of the past. Default 0.99 (paper, which gives the
            present the weight 1e-2; LibMTL and TorchJD give it 0.5).
        reduction: Add the corrected gradients (``"sum"``) or average them (``"mean"``). Default
            ``"sum"`` (paper, Algorithm 1; LibMTL and TorchJD).
        preference: Shares of the corrected gradients in the sum, by name. Default None, equal.
        seed: Chooses the orders. Each step draws new ones, the same on all ranks.
        every: Solve, and move the targets, each n-th step only, and keep the coefficients in
            between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses.

    Source: Wang et al., *Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models* (ICLR 2021), arXiv 2010.05874, Algorithm 1 for the whole model.

    Example:
        >>> import torch
        >>> from moo_balance import GradVac
        >>> from moo_balance.weighting import Statistics
        >>> weighting = GradVac(beta=0.5)
        >>> state = weighting.init(("a", "b"), torch.device("cpu"))
        >>> for cosine in (0.8, 0.0):
        ...     gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]])
        ...     statistics = Statistics(("a", "b"), torch.ones(2), gramian)
        ...     _, coefficients, state = weighting.weights(statistics, state)
        >>> coefficients  # the target is 0.4
        tensor([1.4364, 1.4364])
    """

    beta: float = 0.99
    reduction: Reduction = "sum"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    seed: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", 0.0, below=1.0)
        check_whole(self, "seed", 0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        shape = (len(names), len(names))
        targets = torch.zeros(shape, dtype=state_dtype(device), device=device)
        return {**super().init(names, device), "cosines": targets}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        check_square(gramian)
        shares = self.shares(statistics.names)
        dtype = result_dtype(gramian)
        if len(shares) == 1:
            return {"weights": gramian.new_tensor(shares, dtype=dtype)}
        if len(shares) == 2:
            weights, targets = self._solve_two(gramian, shares, state["cosines"])
            return {"weights": gramian.new_tensor(weights, dtype=dtype), "cosines": targets}
        from moo_balance.functional import _surgery  # loads NumPy
        from moo_balance.functional._directions import directions

        gradients, targets = directions(gramian), state["cosines"].to("cpu", torch.float64)
        order = _surgery.draw_order(len(shares), step_generator(self.seed, statistics.step))
        found = _surgery.raise_cosines(gradients, targets.numpy(), order, precision(gramian))
        added = _surgery.add_corrections(found.parts, gradients.norms, shares)
        met = torch.from_numpy(found.cosines)
        targets = torch.where(met.isnan(), targets, targets.lerp(met, 1.0 - self.beta))
        return {
            "weights": torch.from_numpy(added).to(gramian.device, dtype),
            "cosines": targets.to(state["cosines"]),
        }

    def _solve_two(
        self, gramian: Tensor, shares: Sequence[float], targets: Tensor
    ) -> tuple[list[float], Tensor]:
        pair, rounding = read_pair(gramian), precision(gramian)
        (_, first), (second, _) = targets.tolist()
        one, other = (_multiple(pair.cosine, target, rounding) for target in (first, second))
        weights = add_multiples(pair, one, other, shares)
        if pair.first == 0.0 or pair.second == 0.0:
            return weights, targets
        past, met = self.beta, (1.0 - self.beta) * pair.cosine
        return weights, targets.new_tensor([[0.0, past * first + met], [past * second + met, 0.0]])


def _multiple(cosine: float, target: float, precision: float) -> float:
    """What one of two gradients gets of the other's direction, relative to its own norm."""
    tolerance = equality_tolerance(precision)
    if cosine >= target - tolerance:
        return 0.0
    aim = math.sqrt(max(1.0 - target**2, 2 * tolerance))
    return (target * math.sqrt(1.0 - cosine**2) - cosine * aim) / aim
