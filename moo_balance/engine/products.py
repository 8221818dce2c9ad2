"""Inner products of the gradients of K losses, and how they come together in a Gramian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

_ON_HOST, _ON_DEVICE = 2**19, 2**25
"""Numbers that are handled at once: on the host they shall stay in its cache."""

FEW, FEW_APART = 4, 8
"""Up to so many vectors single dot products are faster than a matrix product; the more so where a
matrix would have to be made of them."""


def cache_size(tensor: Tensor) -> int:
    """How many numbers to handle at once where this tensor lies."""
    return _ON_HOST if tensor.is_cpu else _ON_DEVICE


def wide(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """As a real vector of at least this precision."""
    if vector.is_complex():
        vector = torch.view_as_real(vector.resolve_conj()).reshape(-1)
    return vector if vector.dtype == dtype else vector.to(torch.promote_types(vector.dtype, dtype))


def products_of(vectors: Sequence[Tensor], matrix: Tensor | None = None) -> Tensor:
    """Inner products of vectors, which may be the rows of a matrix; symmetric to the bit."""
    if len(vectors) <= (FEW_APART if matrix is None else FEW):
        return _table(vectors, torch.dot)
    if matrix is None or matrix.dtype != vectors[0].dtype:
        matrix = torch.stack(list(vectors))
    if not multiplies_exactly(matrix):
        matrix = matrix.double()
    return symmetric(matrix @ matrix.T)


def sparse_products(gradients: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Inner products of gradients of one parameter of which some are sparse."""
    dtype = torch.promote_types(gradients[0].dtype, dtype)
    vectors = [
        g.to(dtype).coalesce() if g.is_sparse else wide(g.reshape(-1), dtype) for g in gradients
    ]
    return _table(vectors, _sparse_dot)


def _sparse_dot(left: Tensor, right: Tensor) -> Tensor:
    if left.is_sparse and right.is_sparse:
        return (left * right).sum()
    if left.is_sparse or right.is_sparse:
        sparse, dense = (left, right) if left.is_sparse else (right, left)
        return (sparse.to_dense().reshape(-1) * dense).sum()
    return torch.dot(left, right)


def _table(vectors: Sequence[Tensor], dot: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All products, each of which is taken once."""
    lower = [[dot(a, b) for b in vectors[: k + 1]] for k, a in enumerate(vectors)]
    places = range(len(lower))
    entries = [lower[max(j, k)][min(j, k)] for j in places for k in places]
    return torch.stack(entries).view(len(lower), len(lower))


def symmetric(products: Tensor) -> Tensor:
    """Symmetric to the bit, which a matrix product is not."""
    return products.tril() + products.tril(-1).T


def multiplies_exactly(matrix: Tensor) -> bool:
    """Does a matrix product keep float32? TF32 and its like would leave three digits."""
    if matrix.device.type == "mps" or matrix.dtype == torch.float64:
        return True
    return matrix.is_cpu and torch.get_float32_matmul_precision() == "highest"


def assembled(
    parts: Sequence[tuple[tuple[int, ...], Tensor]],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """All products in one matrix [K, K], in `dtype` or wider."""
    parts = sorted(parts, key=lambda part: -len(part[0]))
    if parts and len(parts[0][0]) == count:
        (_, gramian), *parts = parts
        gramian = gramian.to(device)
    else:
        gramian = torch.zeros(count, count, dtype=dtype, device=device)
    for reached, products in parts:
        gramian = added(gramian, products, reached)
    return gramian


def added(gramian: Tensor, products: Tensor, reached: tuple[int, ...]) -> Tensor:
    """Add products of the losses in `reached` at their places, in the wider precision."""
    gramian = gramian.to(torch.promote_types(gramian.dtype, products.dtype))
    products = products.to(gramian.device)
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
