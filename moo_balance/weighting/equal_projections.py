"""ConFIG and IMTL-G: one direction with equal projections on all unit gradients, in two lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.functional import equal_projections
from moo_balance.weighting._preferred import PreferredWeighting
from moo_balance.weighting.base import State, Statistics


@dataclass(frozen=True)
class ConFIG(PreferredWeighting):
    r"""Conflict-Free Inverse Gradients: the same projection on each unit gradient.

    With the unit gradients :math:`u_i = g_i / \lVert g_i \rVert`,

    .. math::
        u_i^\top x = p_i \text{ for all } i, \qquad
        \hat x = \frac{x}{\lVert x \rVert}, \qquad
        d = \Big( \sum_i g_i^\top \hat x \Big)\, \hat x

    :math:`p` is `preference`, ones without one: no loss, whatever its scale, gets more of the
    direction than another. :class:`IMTLG` takes the same direction, shorter, and for two losses
    :class:`NashMTL` does, too. Solved exactly on cosines, also on an accelerator, where the
    published least squares assume gradients that are linearly independent.

    The direction is as long as the projections on it sum to. For orthogonal gradients of equal
    length it is their sum. Where lengths differ, that of the longest sets it, and a short
    gradient gets a coefficient as large as the ratio: with plain SGD a learning rate that suits the
    sum may be much too large then. The paper uses Adam; :class:`IMTLG` is shorter.

    Coefficients: sum to nothing in particular; at least to 1 if none is negative. Scaling one loss
    leaves the direction as it is.

    No loss rises, to first order, while the gradients are linearly independent. If they depend on
    each other, as with more losses than parameters or with one loss that is the sum of two others,
    least squares stand for the equation, and a loss may rise.

    Args:
        preference: Positive numbers by name: the projection on each unit gradient is proportional
            to its loss's. Default None, equal (paper).
        every: Solve each n-th step only, and keep the coefficients in between. Default 1 (paper;
            its momentum variant replaces one gradient per step instead, and keeps all of them).

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name each
            loss.

    Source: Liu, Chu and Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks* (ICLR 2025), arXiv 2408.11104.

    Example:
        >>> import torch
        >>> from moo_balance import ConFIG
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> ConFIG().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([1.5000, 0.7500])
    """

    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def _weigh(self, gramian: Tensor, preference: Tensor | None) -> Tensor:
        return equal_projections(gramian, preference, "config")


@dataclass(frozen=True)
class IMTLG(PreferredWeighting):
    r"""Impartial Multi-Task Learning, gradients: equal projections, by weights that sum to 1.

    .. math::
        u_i^\top d = u_j^\top d \text{ for all } i, j, \qquad
        d = \sum_i \alpha_i g_i, \qquad \sum_i \alpha_i = 1

    with the unit gradients :math:`u_i = g_i / \lVert g_i \rVert`. With a `preference` the
    projections are proportional to it. The direction is that of :class:`ConFIG`. For two losses
    :math:`\alpha_1 = \lVert g_2 \rVert / (\lVert g_1 \rVert + \lVert g_2 \rVert)`. Dependent
    gradients are solved by a pseudo-inverse (TorchJD).

    Weights may be negative where gradients conflict. Before they are made to sum to 1, their sum
    may be close to zero, which makes the published step as long as one likes, or negative, which
    turns it against every loss. Here the direction never turns, and is never longer than the
    longest gradient (:func:`~moo_balance.functional.equal_projections`).

    Coefficients: sum to 1, or to less where the direction would be too long. Scaling one loss
    leaves the direction as it is.

    No loss rises, to first order, where none does for :class:`ConFIG`.

    Args:
        preference: Positive numbers by name: the projection on each unit gradient is proportional
            to its loss's. Default None, equal (paper).
        every: Solve each n-th step only, and keep the coefficients in between. Default 1 (paper).

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name each
            loss.

    Source: Liu et al., *Towards Impartial Multi-task Learning* (ICLR 2021), IMTL-G.

    Example:
        >>> import torch
        >>> from moo_balance import IMTLG
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> IMTLG().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([0.6667, 0.3333])
    """

    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def _weigh(self, gramian: Tensor, preference: Tensor | None) -> Tensor:
        return equal_projections(gramian, preference, "imtl_g")

    def keep(self, statistics: Statistics, state: State) -> State:
        weights = state["weights"]
        total = weights.sum()
        # As in a solution: negative weights may hold the sum below 1.
        least = torch.where(weights.amin() < 0, 1.0, 0.0)
        return {"weights": torch.where(total > least, weights / total, weights)}
