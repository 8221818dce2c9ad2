"""NashMTL and FairGrad: directions that divide the improvement fairly among the losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moo_balance.functional import fair_weights
from moo_balance.weighting._arguments import check_range
from moo_balance.weighting._preferred import PreferredWeighting


@dataclass(frozen=True)
class NashMTL(PreferredWeighting):
    r"""Nash bargaining: the direction with the largest product of improvements.

    .. math::
        d = \sum_i \alpha_i g_i, \qquad
        g_i^\top d = \frac{p_i}{\alpha_i} \;\text{ for all } i

    with :math:`p` the `preference`, scaled to a mean of 1. Every loss thus contributes
    :math:`\alpha_i\, g_i^\top d = p_i` to :math:`\lVert d \rVert^2 = K`. The units of the losses do
    not matter. For two losses :math:`\alpha_i = 1 / (\lVert g_i \rVert \sqrt{1 + \cos})`, the
    direction of :class:`ConFIG`.

    The length of a step is :math:`\sqrt K` times the learning rate, however small the gradients
    are, and :math:`\alpha_i` is about :math:`1 / \lVert g_i \rVert`: with plain SGD, lower the
    learning rate towards the end. Only next to a Pareto-stationary point, where no solution exists,
    do steps fade out (:func:`~moo_balance.functional.fair_weights`).

    The equation is solved exactly, by a damped Newton method in less than a millisecond. (The
    official code takes 20 convex programmes of CVXPY, and falls back to equal weights in silence
    where its solver is missing.) Its `max_norm` is what ``torch.nn.utils.clip_grad_norm_`` does.

    Coefficients: sum to nothing in particular; all are positive. Scaling a loss divides its
    coefficient.

    No loss rises, to first order.

    Args:
        preference: Positive numbers by name, the bargaining power of each loss. Default None,
            equal (paper).
        every: Solve each n-th step only, and keep the coefficients in between. Default 1 (paper and
            code, `update_weights_every`).

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name each
            loss.
        ConvergenceError: The solver missed its tolerance (it says by how much).

    Source: Navon et al., *Multi-Task Learning as a Bargaining Game* (ICML 2022), arXiv 2202.01017,
    Claim 3.1.

    Example:
        >>> import torch
        >>> from moo_balance import NashMTL
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[4.0, -3.0], [-3.0, 9.0]])
        >>> NashMTL().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([0.7071, 0.4714])
    """

    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def _weigh(self, gramian: Tensor, preference: Tensor | None) -> Tensor:
        return fair_weights(gramian, 1.0, preference)


@dataclass(frozen=True)
class FairGrad(PreferredWeighting):
    r"""Alpha-fair improvement: the larger alpha, the more the slowest loss counts.

    .. math::
        d = \sum_i w_i g_i, \qquad
        g_i^\top d = \left( \frac{p_i}{w_i} \right)^{1/\alpha} \;\text{ for all } i

    with :math:`p` the `preference`, scaled to a mean of 1. :math:`\alpha = 1` is :class:`NashMTL`;
    towards 0 the direction becomes that of :class:`DualProj` (of the plain sum where that conflicts
    with no gradient), towards infinity that of :class:`MGDA`, with the largest :math:`\min_i
    g_i^\top d`.

    The equation is solved exactly, by a damped Newton method. (Least squares from equal weights, as
    in the official code, stop before they solve it where norms differ by orders of magnitude.) The
    official code multiplies :math:`w` by K before it clips the gradient to length 1; here :math:`w`
    is the paper's. Unless :math:`\alpha = 1`, units matter: if all losses are multiplied by s,
    :math:`\lVert d \rVert` is multiplied by :math:`s^{(1 - \alpha) / (1 + \alpha)}`, which for
    :math:`\alpha > 1` grows as gradients shrink.

    Coefficients: sum to nothing in particular; all are positive.

    No loss rises, to first order.

    Args:
        alpha: :math:`\alpha > 0`. Default 2 (all run scripts of the official code; its class
            defaults to 1, which is :class:`NashMTL`).
        preference: Positive numbers by name. Default None, equal (paper).
        every: Solve each n-th step only, and keep the coefficients in between. Default 1 (paper).

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name each
            loss.
        ConvergenceError: The solver missed its tolerance (it says by how much).

    Source: Ban and Ji, *Fair Resource Allocation in Multi-Task Learning* (ICML 2024), arXiv
    2402.15638, equation 4.

    Example:
        >>> import torch
        >>> from moo_balance import FairGrad
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 64.0]])
        >>> FairGrad().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([1.0000, 0.0625])
    """

    alpha: float = 2.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", 0.0, open=True)

    def _weigh(self, gramian: Tensor, preference: Tensor | None) -> Tensor:
        return fair_weights(gramian, self.alpha, preference)
