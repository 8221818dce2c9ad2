"""The gradient of one loss as a row of tensors, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

Row: TypeAlias = Sequence[Tensor | None]
"""The gradient of one loss, parameter by parameter; None where the loss does not reach it."""


def add_rows(left: Row, right: Row) -> Row:
    """Sum of two gradients, parameter by parameter."""
    return [add(a, b) for a, b in zip(left, right, strict=True)]


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of the gradients of one parameter."""
    if left is None or right is None:
        return right if left is None else left
    return right + left if left.is_sparse else left + right


def add_to_grads(total: Row, params: Sequence[Tensor]) -> None:
    """Add a gradient to ``.grad`` of `params`; it is the caller's to give away."""
    for param, gradient in zip(params, total, strict=True):
        if gradient is not None:
            param.grad = gradient if param.grad is None else _add(param.grad, gradient, 1.0)


def weighted_tensor(gradients: Sequence[Tensor], factors: Sequence[float | Tensor]) -> Tensor:
    """A weighted sum, in memory of its own.

    Nothing is written into a gradient: autograd may hand out the same memory for two parameters,
    or memory that still belongs to somebody else.
    """
    total = gradients[0] * factors[0]
    for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
        total = _add(total, gradient, factor)
    return total


def _add(total: Tensor, gradient: Tensor, factor: float | Tensor) -> Tensor:
    """Add into `total`, or the other way round: a sparse tensor cannot take in a dense one."""
    if total.is_sparse and not gradient.is_sparse:
        return (gradient * factor).add_(total)
    if isinstance(factor, float):
        return total.add_(gradient, alpha=factor)
    return total.add_(gradient * factor)


def numbers(coefficients: Tensor) -> Sequence[float | Tensor]:
    """Plain numbers where reading them is free, 0-d tensors where it would synchronise."""
    if coefficients.is_cpu:
        return coefficients.tolist()
    return coefficients.float().unbind()
