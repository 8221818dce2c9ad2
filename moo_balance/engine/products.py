"""Inner products of the gradients of K losses, and how they are put together into a Gramian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

_CPU_CHUNK, _DEVICE_CHUNK = 2**19, 2**25
"""Elements per chunk; on the CPU a chunk should fit into the cache."""

DOT_LIMIT_STACKED, DOT_LIMIT = 4, 8
"""Up to so many vectors, single dot products take less time than a matrix product: the first where
the vectors are rows of a matrix already, the second where it would have to be made of them."""


READABLE = ("cpu",)
"""Kinds of devices whose values the host reads without a synchronization. There it sees whether
squared norms leave the range of float32; elsewhere vectors are scaled before they are multiplied,
and their products are in float64."""

NARROW = ("mps",)
"""Kinds of devices without float64: the range of float32 is that of all products."""


def chunk_size(tensor: Tensor) -> int:
    """How many elements to work on at once where this tensor is stored."""
    return _CPU_CHUNK if tensor.is_cpu else _DEVICE_CHUNK


def as_real_vector(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient as a real vector of at least this precision."""
    vector = gradient.reshape(-1)
    if vector.is_complex():
        vector = torch.view_as_real(vector.resolve_conj()).reshape(-1)
    return vector if vector.dtype == dtype else vector.to(torch.promote_types(vector.dtype, dtype))


def vector_products(vectors: Sequence[Tensor], matrix: Tensor | None = None) -> Tensor:
    """Inner products of vectors, which may be the rows of a matrix; symmetric to the bit."""
    if len(vectors) <= (DOT_LIMIT if matrix is None else DOT_LIMIT_STACKED):
        if vectors[0].dtype == torch.float32 and vectors[0].device.type not in READABLE + NARROW:
            return scaled_products(vectors)
        return _pairwise(vectors, torch.dot)
    if matrix is None or matrix.dtype != vectors[0].dtype:
        matrix = torch.stack(list(vectors))
    matrix = exact_for_products(matrix)
    return symmetrize(matrix @ matrix.T)


def scaled_products(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products in float64 of float32 vectors of any length, at the price of float32.

    Each vector is multiplied by the power of two that makes its largest entry lie in [1, 2): no
    square overflows, and none that counts underflows. A product of powers of two is exact, so the
    result is as if float32 had no end. Nothing is read by the host.
    """
    if not vectors[0].numel():
        return vectors[0].new_zeros(len(vectors), len(vectors), dtype=torch.float64)
    largest = torch.stack([torch.linalg.vector_norm(vector, torch.inf) for vector in vectors])
    factors = _power_to_one(largest)
    scaled = [vector * factor for vector, factor in zip(vectors, factors.unbind(), strict=True)]
    exact = factors.double()
    return _pairwise(scaled, torch.dot).double() / exact[:, None] / exact


def _power_to_one(values: Tensor) -> Tensor:
    """Powers of two that bring positive float32 values into [1, 2); finite ones for any other."""
    # A float32 is (1 + fraction) * 2 ** (exponent - 127), with the exponent in bits 23 to 30. The
    # exponent 0 (a value below 2 ** -126, or zero) has the factor 2 ** 127.
    exponents = (values.view(torch.int32) >> 23) & 255
    return ((254 - exponents).clamp(min=1) << 23).view(torch.float32)


def sparse_products(gradients: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Inner products of gradients of one parameter of which some are sparse."""
    if gradients[0].device.type not in READABLE + NARROW:
        dtype = torch.float64
    dtype = torch.promote_types(gradients[0].dtype, dtype)
    vectors = [
        g.to(dtype).coalesce() if g.is_sparse else as_real_vector(g, dtype) for g in gradients
    ]
    return _pairwise(vectors, _sparse_dot)


def _sparse_dot(left: Tensor, right: Tensor) -> Tensor:
    if left.is_sparse and right.is_sparse:
        return (left * right).sum()
    if left.is_sparse or right.is_sparse:
        sparse, dense = (left, right) if left.is_sparse else (right, left)
        return (sparse.to_dense().reshape(-1) * dense).sum()
    return torch.dot(left, right)


def _pairwise(vectors: Sequence[Tensor], dot: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All inner products; each pair is multiplied once."""
    entries: list[list[Tensor]] = []
    for k, vector in enumerate(vectors):
        entries.append([dot(vector, other) for other in vectors[: k + 1]])
        for j in range(k):
            entries[j].append(entries[k][j])
    return torch.stack([entry for row in entries for entry in row]).view(len(entries), -1)


def symmetrize(products: Tensor) -> Tensor:
    """Make a matrix product of a matrix and its transpose symmetric to the bit."""
    return products.tril() + products.tril(-1).T


def exact_for_products(matrix: Tensor) -> Tensor:
    """The matrix in float64 where float32 products would be rounded to TF32 or the like.

    That would leave three digits. Apple's "mps" has neither TF32 nor float64.
    """
    if matrix.dtype == torch.float64 or matrix.device.type in NARROW:
        return matrix
    if matrix.device.type in READABLE and torch.get_float32_matmul_precision() == "highest":
        return matrix
    return matrix.double()


def products_in_range(
    products: Callable[[torch.dtype], Tensor],
    dtype: torch.dtype,
    is_zero: Callable[[int], bool] | None = None,
) -> Tensor:
    """A Gramian in `dtype`; on the CPU in float64 if its squared norms leave the range of `dtype`.

    Elsewhere reading the squared norms would synchronize, and :func:`vector_products` gives float64
    in any case.

    Args:
        products: Takes the inner products in a precision.
        dtype: The precision wanted.
        is_zero: Whether the gradient at a position is zero, as its squared norm is; without it, a
            squared norm of zero counts as an underflow.
    """
    gramian = products(dtype)
    if gramian.device.type not in READABLE or gramian.dtype == torch.float64:
        return gramian
    if _fits(gramian, gramian.dtype, is_zero):
        return gramian
    return narrow(products(torch.float64), gramian.dtype)


def narrow(gramian: Tensor, dtype: torch.dtype) -> Tensor:
    """A Gramian on the CPU in `dtype`, or as it is where that would lose it."""
    exact = gramian.to(dtype)
    return exact if _fits(gramian, dtype, lambda k: True) else gramian


def _fits(gramian: Tensor, dtype: torch.dtype, is_zero: Callable[[int], bool] | None) -> bool:
    """Whether squared norms are in the range of `dtype`, where sums of them keep their digits."""
    limits = torch.finfo(dtype)
    least = limits.tiny / limits.eps
    for k, square in enumerate(gramian.diagonal().tolist()):
        zero = square == 0.0 and is_zero is not None and is_zero(k)
        if not (zero or least <= square <= limits.max):
            return False
    return True


def is_all_zero(gradient: Tensor) -> bool:
    """Whether a gradient is zero, or has no elements."""
    return not (gradient.coalesce().values() if gradient.is_sparse else gradient).any()


def assemble_gramian(
    parts: Iterable[tuple[tuple[int, ...], Tensor]],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The Gramian [K, K], in `dtype` or wider, from products of some losses each.

    Args:
        parts: Positions of losses, and the inner products of their gradients.
        count: The number K of losses.
        dtype: Precision of a Gramian without parts.
        device: Where to put it.
    """
    parts = list(parts)
    if len(parts) > 1:
        parts.sort(key=lambda part: -len(part[0]))
    if parts and len(parts[0][0]) == count:
        (_, gramian), *parts = parts
        gramian = gramian.to(device)
    else:
        gramian = torch.zeros(count, count, dtype=dtype, device=device)
    for losses, products in parts:
        gramian = add_products(gramian, products, losses)
    return gramian


def add_products(gramian: Tensor, products: Tensor, losses: tuple[int, ...]) -> Tensor:
    """Add products of some losses at their rows and columns, in the wider precision.

    `gramian` itself may change.
    """
    gramian = gramian.to(torch.promote_types(gramian.dtype, products.dtype))
    products = products.to(gramian.device)
    first, last = losses[0], losses[-1] + 1
    if last - first == len(losses):
        gramian[first:last, first:last].add_(products)
        return gramian
    index = index_tensor(losses, gramian.device)
    return gramian.index_put((index[:, None], index), products.to(gramian), accumulate=True)


@lru_cache(maxsize=256)
def index_tensor(losses: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions as a tensor; cached, because copying it to a GPU synchronizes."""
    return torch.tensor(losses, device=device)
