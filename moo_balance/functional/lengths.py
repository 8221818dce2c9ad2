"""Coefficients whose direction has a chosen length."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import check_square, widest

Length: TypeAlias = Literal["one", "count", "sum", "mean"]
"""What :func:`rescale` reaches: a sum of coefficients, or the length of a direction."""

# A squared length is a difference of inner products, which float32 knows to so many parts.
_PRECISION = torch.finfo(torch.float32).eps


def rescale(
    coefficients: Tensor,
    length: Length,
    gramian: Tensor | None = None,
    combined: Tensor | None = None,
) -> Tensor:
    r"""Multiply coefficients by the number that makes their direction as long as wanted.

    With :math:`d = \sum_i c_i g_i` the result is :math:`\alpha c`, where

    * ``"one"``, ``"count"``: :math:`\alpha \sum_i |c_i| = 1`, or :math:`K`;
    * ``"sum"``: :math:`\alpha \lVert d \rVert = \lVert \sum_i g_i \rVert`, the length of the plain
      sum's gradient;
    * ``"mean"``: :math:`\alpha \lVert d \rVert` is the mean of the :math:`\lVert g_i \rVert`.

    A gradient that is zero, or whose squared norm is NaN because it is not known, counts in neither
    length. Where the gradients cancel in :math:`d`, its length counts as at least
    :math:`\sqrt{K \varepsilon} \sum_i |c_i| \lVert g_i \rVert` with float32's
    :math:`\varepsilon`: what is shorter is rounding error, which must not be magnified.

    Args:
        coefficients: :math:`c`, shape ``[K]``.
        length: One of the above.
        gramian: :math:`G_{ij} = g_i^\top g_j`, shape ``[K, K]``; for ``"sum"`` and ``"mean"``.
        combined: The Gramian of what :math:`d` combines, if that is not the gradients themselves
            but averages of them, for example; shape ``[K, K]``.

    Returns:
        :math:`\alpha c`, shape ``[K]``, in the dtype of ``coefficients``. They are returned as they
        are where :math:`d` is zero by its coefficients or gradients, or no gradient is known.

    Raises:
        BalanceValueError: ``gramian`` is missing or not square.

    Example:
        >>> import torch
        >>> gramian = torch.diag(torch.tensor([1.0, 9.0]))
        >>> rescale(torch.tensor([0.5, 0.5]), "mean", gramian)
        tensor([0.6325, 0.6325])
    """
    factor = _factor(widest(coefficients), length, gramian, combined)
    valid = factor.isfinite() & (factor > 0)
    return (coefficients * torch.where(valid, factor, 1.0)).to(coefficients.dtype)


def _factor(
    coefficients: Tensor, length: Length, gramian: Tensor | None, combined: Tensor | None
) -> Tensor:
    if length in ("one", "count"):
        return (1.0 if length == "one" else len(coefficients)) / coefficients.abs().sum()
    if gramian is None:
        raise BalanceValueError(
            f"Parameter `gramian` should be given with length {length!r}. Found None. "
            "Pass the inner products of the gradients."
        )
    check_square(gramian)
    if len(coefficients) == 1:
        return 1.0 / coefficients.abs().squeeze()
    norms = _known(gramian).diagonal().clamp(min=0.0).sqrt()
    if length == "sum":
        wanted = _length(torch.ones_like(coefficients), gramian)
    else:
        wanted = norms.sum() / (norms > 0).sum()
    return wanted / _length(coefficients, gramian if combined is None else combined)


def _known(gramian: Tensor) -> Tensor:
    """Zeros for the products that are not known."""
    gramian = widest(gramian)
    unknown = gramian.diagonal().isnan()
    return gramian.masked_fill(unknown.unsqueeze(1) | unknown | gramian.isnan(), 0.0)


def _length(coefficients: Tensor, gramian: Tensor) -> Tensor:
    """The length of a combination, or the least that float32's rounding leaves of it."""
    gramian = _known(gramian)
    norms, size = gramian.diagonal().clamp(min=0.0).sqrt(), coefficients.abs().amax()
    largest = norms.amax()
    # Relative to the longest gradient and the largest coefficient, so that no square overflows.
    gramian, norms = gramian / largest / largest, norms / largest
    coefficients = coefficients / size
    square = coefficients @ gramian @ coefficients
    least = len(norms) * _PRECISION * (coefficients.abs() @ norms).square()
    return torch.maximum(square, least).sqrt() * size * largest
