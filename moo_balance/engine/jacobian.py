"""The gradients of K losses, held in blocks that are multiplied and combined at once.

A block is what the same losses reach: one large parameter, or small ones side by side, where
copying them costs less than handling each on its own. There is no other product than those of a
block's own losses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from moo_balance.engine.products import (
    FEW_APART,
    assembled,
    cache_size,
    products_of,
    sparse_products,
    wide,
)
from moo_balance.engine.rows import Row, numbers, weighted_tensor

_SMALL = 2**15
"""Up to here, on the host, a copy costs less than products of single gradients."""


class Jacobian:
    """One row per loss, by parameter.

    Args:
        rows: The gradients. The lists are emptied.
        measured: Positions of the parameters over which inner products are taken; None for all.
    """

    def __init__(
        self, rows: Sequence[list[Tensor | None]], measured: Collection[int] | None = None
    ) -> None:
        self.count, self.width = len(rows), len(rows[0])
        self.blocks = list(_blocks(rows, measured))

    def gramian(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inner products of the rows, shape [K, K], accumulated in `dtype` or wider."""
        sums: dict[Any, tuple[tuple[int, ...], Tensor]] = {}
        for block in self.blocks:
            for products in block.products(dtype) if block.measured else ():
                key = block.reached, products.dtype, products.device
                if key in sums:
                    sums[key][1].add_(products)
                else:
                    sums[key] = block.reached, products
        return assembled(list(sums.values()), self.count, dtype, device)

    def combination(self, coefficients: Tensor) -> list[Tensor | None]:
        """The weighted sum of the rows, in memory that is nobody else's; uses them up."""
        factors = numbers(coefficients)
        total: list[Tensor | None] = [None] * self.width
        while self.blocks:
            # Each is let go as soon as it has been added up: its memory, still in the cache, serves
            # for the next.
            for column, gradient in self.blocks.pop().combination(factors):
                total[column] = gradient
        return total


def inner_products(
    rows: Sequence[Row], columns: Collection[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Gramian [K, K] of `rows` over the parameters at `columns`; leaves the rows alone."""
    kept = [[g if k in columns else None for k, g in enumerate(row)] for row in rows]
    return Jacobian(kept).gramian(dtype, device)


class Block(NamedTuple):
    """Gradients of one parameter, or of several of a kind.

    Args:
        reached: The losses.
        columns: The parameters.
        found: For each column the gradients of the losses, as many as are in `reached`.
        measured: Do they count in inner products?
    """

    reached: tuple[int, ...]
    columns: list[int]
    found: list[Sequence[Tensor]]
    measured: bool

    def products(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Inner products in summands, each of pieces that stay in the cache."""
        (gradients,) = self.found
        if any(gradient.is_sparse for gradient in gradients):
            yield sparse_products(gradients, dtype)
            return
        lying, _ = _in_memory_order(gradients)
        vectors = [wide(gradient.reshape(-1), dtype) for gradient in lying]
        # Dot products read two at a time. Longer ones are as fast, but lose digits.
        at_once = 2 if len(vectors) <= FEW_APART else len(vectors)
        length = max(cache_size(vectors[0]) // at_once, 1)
        for pieces in zip(*(torch.split(vector, length) for vector in vectors), strict=True):
            yield products_of(pieces)

    def combination(self, factors: Sequence[float | Tensor]) -> Iterable[tuple[int, Tensor]]:
        """The weighted sum, column by column."""
        scale = [factors[k] for k in self.reached]
        if len(self.columns) == 1:
            return ((self.columns[0], weighted_tensor(self.found[0], scale)),)
        rows = list(zip(*self.found, strict=True))
        total = list(torch._foreach_mul(rows[0], scale[0]))
        for row, factor in zip(rows[1:], scale[1:], strict=True):
            if isinstance(factor, float):
                torch._foreach_add_(total, row, alpha=factor)
            else:
                torch._foreach_add_(total, torch._foreach_mul(row, factor))
        return zip(self.columns, total, strict=True)


class Flat(NamedTuple):
    """A block whose gradients lie side by side, as a vector for each loss.

    Args:
        reached: The losses.
        columns: The parameters.
        vectors: One for each loss, and all of them as the rows of a matrix.
        matrix: The same.
        places: How each column lies in a vector.
    """

    reached: tuple[int, ...]
    columns: list[int]
    vectors: Sequence[Tensor]
    matrix: Tensor
    places: list[_Place]
    measured: bool = True

    @staticmethod
    def of(block: Block) -> Flat:
        """Copies the gradients, each in the order that it has in memory."""
        found, places = list[Sequence[Tensor]](), list[_Place]()
        for gradients in block.found:
            first = gradients[0]
            lying, strides = _in_memory_order(gradients)
            found.append(lying)
            places.append(_Place(first.numel(), first.shape, strides))
        parts = [gradient for row in zip(*found, strict=True) for gradient in row]
        if parts[0].is_complex():
            parts = [part.resolve_conj() for part in parts]
        matrix = _flatten_dense_tensors(parts).view(len(block.reached), -1)  # type: ignore[no-untyped-call]
        return Flat(block.reached, block.columns, matrix.unbind(), matrix, places)

    def products(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """As those of a block."""
        yield products_of([wide(vector, dtype) for vector in self.vectors], self.matrix)

    def combination(self, factors: Sequence[float | Tensor]) -> Iterator[tuple[int, Tensor]]:
        """As that of a block; the columns share memory."""
        total = weighted_tensor(self.vectors, [factors[k] for k in self.reached])
        pieces = torch.unsafe_split_with_sizes(total, [place.size for place in self.places])
        for column, piece, place in zip(self.columns, pieces, self.places, strict=True):
            yield column, place.taken(piece)


class _Place(NamedTuple):
    """Of a gradient that is part of a vector; no strides stand for the usual order of entries."""

    size: int
    shape: torch.Size
    strides: tuple[int, ...] | None

    def taken(self, piece: Tensor) -> Tensor:
        """The gradient in its shape; no view to autograd, which would refuse to edit it."""
        if self.strides is None:
            return piece.view(self.shape).detach()
        return piece.as_strided(self.shape, self.strides).detach()


def _blocks(
    rows: Sequence[list[Tensor | None]], measured: Collection[int] | None
) -> Iterator[Block | Flat]:
    """Every parameter that some loss reaches, in one block or another."""
    kinds: dict[tuple[type, ...], tuple[tuple[int, ...], bool]] = {}
    filling: dict[Any, tuple[Block, int]] = {}
    waiting: list[Any] = list(zip(*rows, strict=True))[::-1]
    for row in rows:
        row.clear()
    for column in range(len(waiting)):
        gradients = waiting.pop()
        kind = tuple(map(type, gradients))
        if kind not in kinds:
            kinds[kind] = _reached(gradients), set(kind) <= {Tensor, NoneType}
        reached, plain = kinds[kind]
        if not reached:
            continue
        found: list[Tensor] = [gradients[k] for k in reached]
        counts = measured is None or column in measured
        if not plain or not _is_small(found):
            yield Block(reached, [column], [found], counts)
            continue
        key = reached, counts, found[0].dtype, found[0].device
        size = found[0].numel() * len(found)
        block, room = filling.get(key, (None, 0))
        if block is None or size > room:
            if block is not None:
                yield _finished(block)
            block, room = Block(reached, [], [], counts), cache_size(found[0])
        block.columns.append(column)
        block.found.append(found)
        filling[key] = block, room - size
    for block, _ in filling.values():
        yield _finished(block)


def _finished(block: Block) -> Block | Flat:
    """Side by side, if there are several whose products are wanted."""
    return Flat.of(block) if block.measured and len(block.columns) > 1 else block


def _reached(gradients: Row) -> tuple[int, ...]:
    return tuple([k for k, gradient in enumerate(gradients) if gradient is not None])


def _is_small(found: Sequence[Tensor]) -> bool:
    """Can these be put side by side with others, at a price below that of handling them alone?"""
    first = found[0]
    limit = _SMALL if first.is_cpu else cache_size(first)
    return first.numel() <= limit and True not in [gradient.is_sparse for gradient in found]


def _in_memory_order(found: Sequence[Tensor]) -> tuple[Sequence[Tensor], tuple[int, ...] | None]:
    """Images that all lie with their channels last, as vectors and with their strides.

    So that nothing has to be put in another order; anything else stays as it is.
    """
    first = found[0]
    if first.ndim != 4 or first.is_contiguous():
        return found, None
    if not all(g.is_contiguous(memory_format=torch.channels_last) for g in found):
        return found, None
    size = first.numel()
    return [gradient.as_strided((size,), (1,)) for gradient in found], first.stride()
