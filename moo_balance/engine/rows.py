"""Per-loss gradients as rows of tensors: inner products and combinations.

Both work family by family. A family is the parameters that the same losses reach: there is no
other product than those of its losses, and its small tensors are handled together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

Row: TypeAlias = Sequence[Tensor | None]
"""The gradient of one loss, parameter by parameter; None where the loss does not reach it."""

_ON_HOST, _ON_DEVICE = 2**19, 2**25
"""Numbers that are handled at once: on the host they shall stay in its cache."""

_SMALL = 2**15
"""Up to here, on the host, a copy costs less than products of single gradients."""

_UNNOTICED = 2**11
"""Up to here a copy in another order costs less than a look at the layout."""

_FEW = 4
"""Up to here single dot products are faster than a matrix product, and need no copy."""


def cache_size(tensor: Tensor) -> int:
    """How many numbers to handle at once where this tensor lies."""
    return _ON_HOST if tensor.device.type == "cpu" else _ON_DEVICE


class Family(NamedTuple):
    """Parameters that the same losses reach, with gradients of one kind."""

    reached: tuple[int, ...]
    columns: list[int]


def families(rows: Sequence[Row]) -> list[Family]:
    """Sort parameters by the losses that reach them; one that none reaches is in no family."""
    found: dict[Any, Family] = {}
    for column, gradients in enumerate(zip(*rows, strict=True)):
        reaches = tuple([gradient is not None for gradient in gradients])
        if True not in reaches:
            continue
        key = reaches, _kind(gradients, gradients[reaches.index(True)], column)
        if key not in found:
            found[key] = Family(tuple(k for k, there in enumerate(reaches) if there), [])
        found[key].columns.append(column)
    return list(found.values())


def _kind(gradients: Row, first: Tensor | None, column: int) -> Any:
    """What gradients must agree in to be handled together; sparse and sharded ones stay alone."""
    assert first is not None
    if type(first) is not Tensor or True in [g is not None and g.is_sparse for g in gradients]:
        return column
    return first.dtype, first.device


def inner_products(
    rows: Sequence[Row],
    columns: Collection[int],
    dtype: torch.dtype,
    found: Sequence[Family] | None = None,
) -> Tensor:
    """Gramian [K, K] of `rows` over the parameters at `columns`, accumulated in `dtype` or wider.

    A pair of losses costs nothing at a parameter that either does not reach. Whoever has sorted
    the rows into families already passes them as `found`.
    """
    count = len(rows)
    device = next((g.device for row in rows for g in row if g is not None), torch.device("cpu"))
    gramian: Tensor | None = None
    for family in sorted(_within(found or families(rows), columns), key=_fewer_losses):
        products = _family_products(rows, family, dtype).to(device)
        if gramian is None and len(family.reached) == count:
            gramian = products
            continue
        if gramian is None:
            gramian = products.new_zeros(count, count)
        gramian = added(gramian, products, family.reached)
    return torch.zeros(count, count, dtype=dtype, device=device) if gramian is None else gramian


def _within(found: Sequence[Family], columns: Collection[int]) -> Iterator[Family]:
    for family in found:
        chosen = [column for column in family.columns if column in columns]
        if chosen:
            yield Family(family.reached, chosen)


def _fewer_losses(family: Family) -> int:
    return -len(family.reached)


def added(gramian: Tensor, products: Tensor, reached: tuple[int, ...]) -> Tensor:
    """Add products of the losses in `reached` at their places, in the wider precision."""
    gramian = gramian.to(torch.promote_types(gramian.dtype, products.dtype))
    first, last = reached[0], reached[-1] + 1
    if last - first == len(reached):
        gramian[first:last, first:last].add_(products)
        return gramian
    places = _places(reached, gramian.device)
    return gramian.index_put((places[:, None], places), products.to(gramian), accumulate=True)


@lru_cache(maxsize=256)
def _places(reached: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices, kept: to bring them to a device is to wait for it."""
    return torch.tensor(reached, device=device)


def _family_products(rows: Sequence[Row], family: Family, dtype: torch.dtype) -> Tensor:
    total: Tensor | None = None
    for pieces in _pieces(rows, family, dtype):
        products = products_of(pieces)
        total = products if total is None else total.add_(products)
    assert total is not None
    return total


def _pieces(
    rows: Sequence[Row], family: Family, dtype: torch.dtype
) -> Iterator[Tensor | Sequence[Tensor]]:
    """Vectors, one per loss, of a size that stays in the cache; or a matrix of them.

    A large gradient is cut up; small ones are put side by side, where copying them costs less than
    multiplying each on its own.
    """
    first, count = rows[family.reached[0]], len(family.reached)
    small, large = _parted(first, family.columns)
    for column in large:
        vectors = _vectors([rows[k][column] for k in family.reached], dtype)
        length = max(cache_size(vectors[0]) // count, 1)
        if vectors[0].numel() <= length or any(vector.is_sparse for vector in vectors):
            yield vectors
        else:
            yield from zip(*(torch.split(vector, length) for vector in vectors), strict=True)
    for columns in _together(first, small, count):
        parts = [_aligned([rows[k][column] for k in family.reached]) for column in columns]
        yield _flat([part for row in zip(*parts, strict=True) for part in row], dtype).view(
            count, -1
        )


def _parted(row: Row, columns: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Small gradients and large ones; sparse ones, alone in their family, count as large."""
    if len(columns) == 1:
        return (), columns
    parts: tuple[list[int], list[int]] = [], []
    for column in columns:
        gradient = row[column]
        assert gradient is not None
        limit = _SMALL if gradient.device.type == "cpu" else _ON_DEVICE
        parts[gradient.numel() > limit].append(column)
    return parts


def products_of(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """Inner products of vectors, or of the rows of a matrix, symmetric to the bit."""
    if len(vectors) <= _FEW or any(vector.is_sparse for vector in vectors):
        lower = [[_dot(a, b) for b in vectors[: k + 1]] for k, a in enumerate(vectors)]
        places = range(len(vectors))
        entries = [lower[max(j, k)][min(j, k)] for j in places for k in places]
        return torch.stack(entries).reshape(len(vectors), len(vectors))
    matrix = vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))
    if not multiplies_exactly(matrix):
        matrix = matrix.double()
    return symmetric(matrix @ matrix.T)


def symmetric(products: Tensor) -> Tensor:
    """Symmetric to the bit, which a matrix product is not."""
    return products.tril() + products.tril(-1).T


def multiplies_exactly(matrix: Tensor) -> bool:
    """Does a matrix product keep float32? TF32 and its like would leave three digits."""
    if matrix.device.type == "mps" or matrix.dtype == torch.float64:
        return True
    return matrix.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"


def _together(row: Row, columns: Iterable[int], width: int) -> Iterator[list[int]]:
    """As many parameters at a time as fit into the cache, each with gradients of `width` losses."""
    portion: list[int] = []
    room = 0
    for column in columns:
        gradient = row[column]
        assert gradient is not None
        size = gradient.numel() * width
        if portion and size > room:
            yield portion
            portion = []
        if not portion:
            room = cache_size(gradient)
        portion.append(column)
        room -= size
    if portion:
        yield portion


def _vectors(gradients: Row, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of one parameter as real vectors of at least `dtype`."""
    found = _aligned(gradients)
    if not any(gradient.is_sparse for gradient in found):
        return [_flat([gradient], dtype) for gradient in found]
    wide = torch.promote_types(found[0].dtype, dtype)
    return [g.to(wide).coalesce() if g.is_sparse else _flat([g], dtype) for g in found]


def _aligned(gradients: Row) -> list[Tensor]:
    """Gradients of one parameter with their entries in one order.

    That of the memory where it is the layout of images, so that nothing needs to be copied.
    """
    found = [gradient for gradient in gradients if gradient is not None]
    if (
        found[0].ndim == 4
        and found[0].numel() > _UNNOTICED
        and all(g.is_contiguous(memory_format=torch.channels_last) for g in found)
    ):
        return [gradient.permute(0, 2, 3, 1) for gradient in found]
    return found


def _flat(gradients: Row, dtype: torch.dtype) -> Tensor:
    """Dense gradients of one kind as a real vector of at least `dtype`."""
    parts = [gradient for gradient in gradients if gradient is not None]
    if parts[0].is_complex():
        parts = [torch.view_as_real(part.resolve_conj()) for part in parts]
    whole: Tensor = parts[0].reshape(-1)
    if len(parts) > 1:
        whole = _flatten_dense_tensors(parts)  # type: ignore[no-untyped-call]
    return whole.to(torch.promote_types(whole.dtype, dtype))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    if left.is_sparse and right.is_sparse:
        return (left * right).sum()
    if left.is_sparse or right.is_sparse:
        sparse, dense = (left, right) if left.is_sparse else (right, left)
        return (sparse.to_dense().reshape(-1) * dense).sum()
    return torch.dot(left, right)


def add_rows(left: Row, right: Row) -> Row:
    """Sum of two gradients, parameter by parameter."""
    return [add(a, b) for a, b in zip(left, right, strict=True)]


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of the gradients of one parameter."""
    if left is None or right is None:
        return right if left is None else left
    return right + left if left.is_sparse else left + right


def combination(
    rows: Sequence[list[Tensor | None]],
    coefficients: Tensor,
    found: Sequence[Family] | None = None,
) -> list[Tensor | None]:
    """The gradient that is the weighted sum of `rows`, in memory of its own; uses the rows up.

    Nothing is written into a row: autograd may hand out the same memory for two parameters, or
    memory that still belongs to somebody else. But each piece is let go as soon as it has been
    added, so that its memory, still in the cache, serves for the next.
    """
    factors = numbers(coefficients)
    totals: list[Tensor | None] = [None] * len(rows[0])
    for family in found or families(rows):
        for batch in _together(rows[family.reached[0]], family.columns, 1):
            parts = [[_taken(rows[k], column) for column in batch] for k in family.reached]
            scale = [factors[k] for k in family.reached]
            for column, total in zip(batch, _weighted(parts, scale), strict=True):
                totals[column] = total
    return totals


def add_to_grads(total: Row, params: Sequence[Tensor]) -> None:
    """Add a gradient to ``.grad`` of `params`; it is the caller's to give away."""
    for param, gradient in zip(params, total, strict=True):
        if gradient is not None:
            param.grad = gradient if param.grad is None else _add(param.grad, gradient, 1.0)


def _taken(row: list[Tensor | None], column: int) -> Tensor:
    gradient, row[column] = row[column], None
    assert gradient is not None
    return gradient


def _weighted(parts: list[list[Tensor]], factors: Sequence[float | Tensor]) -> list[Tensor]:
    """Weighted sums over the losses, parameter by parameter."""
    if len(parts[0]) == 1:
        return [weighted_tensor([part[0] for part in parts], factors)]
    totals = list(torch._foreach_mul(parts[0], factors[0]))
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        if isinstance(factor, Tensor):
            torch._foreach_add_(totals, torch._foreach_mul(part, factor))
        else:
            torch._foreach_add_(totals, part, alpha=factor)
    return totals


def weighted_tensor(gradients: Sequence[Tensor], factors: Sequence[float | Tensor]) -> Tensor:
    """A weighted sum, in memory of its own."""
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
    if coefficients.device.type != "cpu":
        return coefficients.float().unbind()
    return coefficients.tolist()
