"""Per-loss gradients as rows of tensors: inner products and combinations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Row: TypeAlias = Sequence[Tensor | None]
"""The gradient of one loss, parameter by parameter; None where the loss does not reach it."""


def inner_products(rows: Sequence[Row], columns: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Gramian [K, K] of `rows` over the parameters at `columns`, accumulated in `dtype` or wider.

    A pair of losses costs nothing at a parameter that either does not reach.
    """
    count = len(rows)
    device = next((g.device for row in rows for g in row if g is not None), torch.device("cpu"))
    products: list[list[list[Tensor]]] = [[[] for _ in range(count)] for _ in range(count)]
    for column in columns:
        reached = [
            (k, _vector(g, dtype)) for k, row in enumerate(rows) if (g := row[column]) is not None
        ]
        for position, (j, left) in enumerate(reached):
            for k, right in reached[position:]:
                products[j][k].append(_dot(left, right))
    zero = torch.zeros((), dtype=dtype, device=device)
    upper = [
        torch.stack([d.to(device) for d in products[j][k]]).sum() if products[j][k] else zero
        for j in range(count)
        for k in range(j, count)
    ]
    values = torch.stack(upper)
    gramian = values.new_zeros(count, count)
    j, k = torch.triu_indices(count, count, device=device)
    return gramian.index_put((j, k), values).index_put((k, j), values)


def add_rows(left: Row, right: Row) -> Row:
    """Sum of two gradients, parameter by parameter."""
    return [
        b if a is None else a if b is None else _sum(a, b) for a, b in zip(left, right, strict=True)
    ]


def combination(rows: Sequence[Row], coefficients: Tensor, width: int) -> Row:
    """The gradient that is the weighted sum of `rows`, in memory of its own.

    The rows themselves stay untouched: autograd may hand out the same memory for two parameters,
    or memory that still belongs to somebody else.
    """
    factors = _factors(coefficients)
    totals: list[Tensor | None] = [None] * width
    for column in range(width):
        total = None
        for factor, row in zip(factors, rows, strict=True):
            gradient = row[column]
            if gradient is not None:
                total = gradient * factor if total is None else _add(total, gradient, factor)
        totals[column] = total
    return totals


def combine(rows: Sequence[Row], coefficients: Tensor, params: Sequence[Tensor]) -> None:
    """Add the weighted sum of `rows` to ``.grad`` of `params`."""
    totals = combination(rows, coefficients, len(params))
    for param, total in zip(params, totals, strict=True):
        if total is not None:
            param.grad = total if param.grad is None else _add(param.grad, total, 1.0)


def _sum(left: Tensor, right: Tensor) -> Tensor:
    return right + left if left.is_sparse else left + right


def _add(total: Tensor, gradient: Tensor, factor: float | Tensor) -> Tensor:
    """Add into `total`, or the other way round: a sparse tensor cannot take in a dense one."""
    if total.is_sparse and not gradient.is_sparse:
        return (gradient * factor).add_(total)
    if isinstance(factor, float):
        return total.add_(gradient, alpha=factor)
    return total.add_(gradient * factor)


def _factors(coefficients: Tensor) -> Sequence[float | Tensor]:
    """Plain numbers where reading them is free, 0-d tensors where it would synchronise."""
    if coefficients.device.type != "cpu":
        return coefficients.float().unbind()
    numbers: list[float] = coefficients.tolist()
    return numbers


def _vector(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient as a real vector of at least `dtype`."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    wide = gradient.to(torch.promote_types(gradient.dtype, dtype))
    return wide.coalesce() if wide.is_sparse else wide.reshape(-1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    if left.is_sparse or right.is_sparse:
        return (left * right).sum() if left.is_sparse and right.is_sparse else _mixed(left, right)
    return torch.dot(left, right)


def _mixed(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of a sparse gradient with a dense one."""
    sparse, dense = (left, right) if left.is_sparse else (right, left)
    return (sparse.to_dense().reshape(-1) * dense).sum()
