"""The gradients of K losses, held in blocks that are multiplied and combined at once.

A *row* has the gradient of one loss for every parameter, or None where the loss does not reach it.
Parameters that the same losses reach form a block: one large parameter (`Block`), or several small
ones that are copied into one vector for each loss (`FlatBlock`), where a copy costs less time than
an operation for every parameter:

              param 0   param 1   param 2   param 3       Block      losses (0, 1), param 0
    loss 0    [ large ] [ a0 ]    [ b0 ]    None          FlatBlock  losses (0, 1), params 1, 2:
    loss 1    [ large ] [ a1 ]    [ b1 ]    [ c1 ]                   matrix = | a0 b0 |
                                                                              | a1 b1 |
                                                          Block      losses (1,), param 3

Products are taken block by block, among the losses of a block, and added into the Gramian.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import NoneType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from moo_balance.engine.autograd import flatten
from moo_balance.engine.base import Row
from moo_balance.engine.products import (
    DOT_LIMIT,
    READABLE,
    as_real_vector,
    assemble_gramian,
    chunk_size,
    is_all_zero,
    sparse_products,
    vector_products,
)
from moo_balance.errors import NonFiniteError

_LARGEST = torch.finfo(torch.float32).max

_SMALL = 2**15
"""Elements up to which, on the CPU, a copy costs less than products of single gradients."""


class Jacobian:
    """One row per loss, by parameter.

    Args:
        rows: The gradients. The lists are emptied.
        compared: Positions of the parameters over which inner products are taken; None for all.
    """

    def __init__(
        self, rows: Sequence[list[Tensor | None]], compared: Collection[int] | None = None
    ) -> None:
        self.count, self.width = len(rows), len(rows[0])
        self.blocks = _build_blocks(rows, compared)

    def gramian(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inner products of the rows, shape [K, K], accumulated in `dtype` or wider."""
        sums: dict[Any, tuple[tuple[int, ...], Tensor]] = {}
        for block in self.blocks:
            for products in block.products(dtype) if block.compared else ():
                key = block.losses, products.dtype, products.device
                if key in sums:
                    sums[key][1].add_(products)
                else:
                    sums[key] = block.losses, products
        return assemble_gramian(sums.values(), self.count, dtype, device)

    def is_zero(self, loss: int) -> bool:
        """Whether the row of a loss is zero in all compared parameters."""
        return all(
            is_all_zero(gradient)
            for block in self.blocks
            if block.compared and loss in block.losses
            for gradient in block.gradients_of(loss)
        )

    def combine(self, coefficients: Tensor) -> list[Tensor | None]:
        """The weighted sum of the rows, as newly allocated tensors; consumes the blocks."""
        factors = as_scalars(coefficients)
        if coefficients.is_cpu and max(map(abs, cast(list[float], factors))) > _LARGEST:
            self._check_range(factors)
        total: list[Tensor | None] = [None] * self.width
        while self.blocks:
            # Each block is freed as soon as it has been added up: its memory, still in the cache,
            # serves for the next.
            for param_index, gradient in self.blocks.pop().combine(factors):
                total[param_index] = gradient
        return total

    def _check_range(self, factors: Sequence[Any]) -> None:
        """Refuse to multiply gradients by numbers that their precision does not have."""
        for block in self.blocks:
            (first, *_) = block.gradients_of(block.losses[0])
            largest = max((factors[k] for k in block.losses), key=abs)
            if abs(largest) > torch.finfo(first.dtype).max:
                raise NonFiniteError(
                    f"Coefficients should be in the range of {first.dtype}. Found {largest:.3g}: "
                    "gradients differ in length by more than 38 orders of magnitude, or are too "
                    "short for this method, or a constant is too large. Divide the losses by "
                    "constants that bring their gradients closer together, or train in float64."
                )


def inner_products(
    rows: Sequence[Row],
    compared: Collection[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Gramian [K, K] of `rows` over the compared parameters; does not change the rows.

    Small gradients are copied, but not all of them at once.
    """
    total = torch.zeros(len(rows), len(rows), dtype=dtype, device=device)
    for group in _groups(rows, compared):
        products = Jacobian([[row[k] for k in group] for row in rows]).gramian(dtype, device)
        total = total.to(products) + products
    return total


def _groups(rows: Sequence[Row], compared: Collection[int]) -> Iterable[list[int]]:
    """The compared parameters in groups of so many elements as are worked on at once."""
    group, size = list[int](), 0
    for k in compared:
        there = [gradient for row in rows if (gradient := row[k]) is not None]
        if not there:
            continue
        size += sum(gradient.numel() for gradient in there)
        group.append(k)
        if size >= chunk_size(there[0]):
            yield group
            group, size = [], 0
    if group:
        yield group


class Block(NamedTuple):
    """Gradients of one parameter, or of several that are combined at once.

    Args:
        losses: Positions of the losses that reach them.
        param_indices: Positions of the parameters.
        gradients: For each parameter its gradients, one for each of the losses.
        compared: Whether they count in inner products.
    """

    losses: tuple[int, ...]
    param_indices: list[int]
    gradients: list[Sequence[Tensor]]
    compared: bool

    def gradients_of(self, loss: int) -> Sequence[Tensor]:
        """The gradients of one of the losses."""
        return [gradients[self.losses.index(loss)] for gradients in self.gradients]

    def products(self, dtype: torch.dtype) -> Iterable[Tensor]:
        """Inner products as summands, each of chunks that fit into the cache."""
        (gradients,) = self.gradients
        if any(gradient.is_sparse for gradient in gradients):
            yield sparse_products(gradients, dtype)
            return
        ordered, _ = _in_memory_order(gradients)
        vectors = [as_real_vector(gradient, dtype) for gradient in ordered]
        # Dot products read two at a time, but copy all where they scale them. Longer chunks take
        # the same time, but lose digits.
        copies = gradients[0].device.type not in READABLE or len(vectors) > DOT_LIMIT
        at_once = len(vectors) if copies else 2
        length = max(chunk_size(vectors[0]) // at_once, 1)
        for chunks in zip(*(torch.split(vector, length) for vector in vectors), strict=True):
            yield vector_products(chunks)

    def combine(self, factors: Sequence[float | Tensor]) -> Iterable[tuple[int, Tensor]]:
        """The weighted sum, parameter by parameter."""
        scale = [factors[k] for k in self.losses]
        if len(self.param_indices) == 1:
            return ((self.param_indices[0], weighted_tensor(self.gradients[0], scale)),)
        rows = list(zip(*self.gradients, strict=True))
        total = list(torch._foreach_mul(rows[0], scale[0]))
        for row, factor in zip(rows[1:], scale[1:], strict=True):
            # A float16 takes no `alpha` above 65504, whatever the product is.
            if isinstance(factor, float) and total[0].dtype != torch.float16:
                torch._foreach_add_(total, row, alpha=factor)
            else:
                torch._foreach_add_(total, torch._foreach_mul(row, factor))
        return zip(self.param_indices, total, strict=True)


class FlatBlock(NamedTuple):
    """A block with one vector for each loss, in which gradients follow one another.

    Args:
        losses: Positions of the losses.
        param_indices: Positions of the parameters.
        matrix: The vectors as its rows.
        vectors: The same, one by one.
        slices: Where in a vector each gradient is, in the order of the parameters.
        compared: Whether they count in inner products.
    """

    losses: tuple[int, ...]
    param_indices: list[int]
    matrix: Tensor
    vectors: Sequence[Tensor]
    slices: list[Slice]
    compared: bool = True

    @staticmethod
    def of(block: Block) -> FlatBlock:
        """Copy the gradients, each in the order of its elements in memory."""
        gradients, slices = list[Sequence[Tensor]](), list[Slice]()
        for unordered in block.gradients:
            ordered, strides = _in_memory_order(unordered)
            gradients.append(ordered)
            slices.append(Slice(unordered[0].numel(), unordered[0].shape, strides))
        parts = [gradient for row in zip(*gradients, strict=True) for gradient in row]
        if parts[0].is_complex():
            parts = [part.resolve_conj() for part in parts]
        matrix = flatten(parts).view(len(block.losses), -1)
        return FlatBlock(block.losses, block.param_indices, matrix, matrix.unbind(), slices)

    def gradients_of(self, loss: int) -> Sequence[Tensor]:
        """As those of a block, in one vector."""
        return [self.vectors[self.losses.index(loss)]]

    def products(self, dtype: torch.dtype) -> Iterable[Tensor]:
        """As those of a block."""
        vectors = self.vectors
        if self.matrix.dtype != dtype:
            vectors = [as_real_vector(vector, dtype) for vector in vectors]
        return (vector_products(vectors, self.matrix),)

    def combine(self, factors: Sequence[float | Tensor]) -> Iterable[tuple[int, Tensor]]:
        """As that of a block; the gradients share memory."""
        total = weighted_tensor(self.vectors, [factors[k] for k in self.losses])
        pieces = torch.split(total, [piece.size for piece in self.slices])
        # `.data` has a version counter of its own: editing one gradient in place does not look to
        # autograd like an edit of all of them.
        shaped = [
            piece.view(shape).data if strides is None else piece.as_strided(shape, strides).data
            for piece, (_, shape, strides) in zip(pieces, self.slices, strict=True)
        ]
        return zip(self.param_indices, shaped, strict=True)


class Slice(NamedTuple):
    """Size, shape and strides of one gradient inside a flat vector; None means contiguous."""

    size: int
    shape: torch.Size
    strides: tuple[int, ...] | None


def _build_blocks(
    rows: Sequence[list[Tensor | None]], compared: Collection[int] | None
) -> list[Block | FlatBlock]:
    """Every parameter that a loss reaches, each in one block."""
    blocks: list[Block | FlatBlock] = []
    kinds: dict[tuple[type, ...], tuple[tuple[int, ...], bool]] = {}
    open_blocks: dict[Any, tuple[Block, int]] = {}  # with the room that is left in them
    waiting: list[Any] = list(zip(*rows, strict=True))[::-1]
    for row in rows:
        row.clear()
    for param_index in range(len(waiting)):
        column = waiting.pop()  # so that gradients are freed once they have been copied
        kind = tuple(map(type, column))
        if kind not in kinds:
            losses = tuple([k for k, entry in enumerate(kind) if entry is not NoneType])
            kinds[kind] = losses, set(kind) <= {Tensor, NoneType}
        losses, plain = kinds[kind]
        if not losses:
            continue
        gradients: list[Tensor] = [column[k] for k in losses]
        counts = compared is None or param_index in compared
        if not plain or not _is_small(gradients):
            blocks.append(Block(losses, [param_index], [gradients], counts))
            continue
        first = gradients[0]
        key = losses, counts, first.dtype, first.device
        size = first.numel() * len(gradients)
        block, room = open_blocks.get(key, (None, 0))
        if block is None or size > room:
            if block is not None:
                blocks.append(_close(block))
            block, room = Block(losses, [], [], counts), chunk_size(first)
        block.param_indices.append(param_index)
        block.gradients.append(gradients)
        open_blocks[key] = block, room - size
    return blocks + [_close(block) for block, _ in open_blocks.values()]


def _close(block: Block) -> Block | FlatBlock:
    """Copy the gradients together if there are several whose products are wanted."""
    return FlatBlock.of(block) if block.compared and len(block.param_indices) > 1 else block


def _is_small(gradients: Sequence[Tensor]) -> bool:
    """Whether copying these together with others costs less time than handling them singly."""
    first = gradients[0]
    limit = _SMALL if first.is_cpu else chunk_size(first)
    return first.numel() <= limit and True not in [gradient.is_sparse for gradient in gradients]


def _in_memory_order(
    gradients: Sequence[Tensor],
) -> tuple[Sequence[Tensor], tuple[int, ...] | None]:
    """If all gradients are channels-last, return them flattened in memory order, and the strides.

    So they need no reordering copy. Anything else is returned as it is, without strides.
    """
    first = gradients[0]
    if first.ndim != 4 or first.is_contiguous():
        return gradients, None
    if not all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients):
        return gradients, None
    size = first.numel()
    return [gradient.as_strided((size,), (1,)) for gradient in gradients], first.stride()


def weighted_tensor(gradients: Sequence[Tensor], factors: Sequence[float | Tensor]) -> Tensor:
    """A weighted sum, in memory of its own.

    Nothing is written into a gradient: autograd may return the same memory for two parameters, or
    memory that an operation of the model still uses.
    """
    total = gradients[0] * factors[0]
    for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
        total = _add(total, gradient, factor)
    return total


def _add(total: Tensor, gradient: Tensor, factor: float | Tensor) -> Tensor:
    """Add into `total`, or the other way round: a sparse tensor cannot take in a dense one."""
    if total.is_sparse and not gradient.is_sparse:
        return (gradient * factor).add_(total)
    if isinstance(factor, float) and total.dtype != torch.float16:  # as in `Block.combine`
        return total.add_(gradient, alpha=factor)
    return total.add_(gradient * factor)


def as_scalars(coefficients: Tensor) -> Sequence[float | Tensor]:
    """Python floats where reading them is free, 0-d tensors where it would synchronize."""
    if coefficients.is_cpu:
        return coefficients.tolist()
    return coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)).unbind()
