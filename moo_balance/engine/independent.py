r"""The Gramian of expected gradients, from gradients of different batches.

A gradient of one batch is its expectation and noise. Its square is too long by the noise, and so is
its product with that of another loss by the noise that the two share. Products of different batches
are not. So with rows :math:`G_a` of n independent batches and their sum S,

.. math:: \frac{n}{n - 1} \Big( S S^\top - \sum_a G_a G_a^\top \Big)

has the expectation :math:`E[S]\, E[S]^\top`. Where losses are absent from some batches, let loss i
be in :math:`n_i` of them, and in :math:`n_{ij}` together with loss j: then
:math:`n_i n_j - n_{ij}` pairs of different batches stand for :math:`n_i n_j`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.base import Problem, Row, remove_loss_scale
from moo_balance.engine.distributed import RowAverager, sharded_gramian
from moo_balance.engine.jacobian import inner_products
from moo_balance.engine.products import index_tensor, is_all_zero, products_in_range
from moo_balance.errors import BalanceError
from moo_balance.functional._checks import widest, widest_dtype


class BatchProducts(NamedTuple):
    """Inner products within each of several batches.

    Args:
        total: Their sum over the batches, shape [K, K]; None without a batch.
        batches: The losses of each batch.
    """

    total: Tensor | None = None
    batches: tuple[tuple[str, ...], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The K losses, in order of appearance."""
        return tuple(dict.fromkeys(name for batch in self.batches for name in batch))

    def plus(self, names: Sequence[str], products: Tensor) -> BatchProducts:
        """Those of one more batch, too."""
        result = BatchProducts(None, (*self.batches, tuple(names)))
        if self.total is not None and result.names == tuple(names) == self.names:
            return result._replace(total=self.total + products)
        count, before = len(result.names), len(self.names)
        total = products.new_zeros(count, count)
        if self.total is not None:
            total[:before, :before] = self.total
        index = index_tensor(tuple(map(result.names.index, names)), total.device)
        total.index_put_((index[:, None], index), products, accumulate=True)
        return result._replace(total=total)


def products_of_batch(
    rows: Sequence[Row],
    compared: Collection[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    sharded: bool,
) -> Tensor:
    """Inner products [K, K] of the rows of one batch, in the widest dtype of the device."""
    if sharded:
        return widest(sharded_gramian(rows, compared, dtype, device))
    positions = range(len(rows[0])) if compared is None else compared

    def is_zero(loss: int) -> bool:
        return all(g is None or is_all_zero(g) for g in (rows[loss][k] for k in positions))

    take = partial(inner_products, rows, positions, device=device)
    return widest(products_in_range(lambda dtype: take(dtype=dtype), dtype, is_zero))


def expected_gramian(
    whole: Tensor, within: BatchProducts, scale: Tensor | None, averager: RowAverager | None
) -> Tensor:
    """The unbiased estimate [K, K], which need not be positive semidefinite.

    Args:
        whole: Inner products of the sums of the batches' gradients.
        within: Inner products within each of this rank's batches.
        scale: The loss scale, which `whole` is free of.
        averager: The ranks, if each has batches of its own.
    """
    total, size = within.total, 1
    assert total is not None
    if averager is not None:
        # The sum is that of gradients divided by the number of ranks.
        size = averager.size
        total = total / size**2
        dist.all_reduce(total, group=averager.group)
    total = remove_loss_scale(total, scale)
    factors = _pair_factors(within.batches, size)
    if len(set(factors)) == 1:
        return (whole.to(total) - total) * factors[0]
    return (whole.to(total) - total) * _constant_matrix(factors, total.device)


def _pair_factors(batches: Sequence[Sequence[str]], ranks: int) -> tuple[float, ...]:
    """All pairs of batches, as a multiple of those of different ones; K² entries, row by row."""
    names = dict.fromkeys(name for batch in batches for name in batch)
    counts = [
        [ranks * sum(j in batch and k in batch for batch in batches) for k in names] for j in names
    ]
    return tuple(
        (pairs := counts[j][j] * counts[k][k]) / (pairs - counts[j][k])
        for j in range(len(names))
        for k in range(len(names))
    )


@lru_cache(maxsize=64)
def _constant_matrix(entries: tuple[float, ...], device: torch.device) -> Tensor:
    """Cached, because copying it to a GPU synchronizes."""
    count = round(len(entries) ** 0.5)
    with torch.inference_mode(False):
        matrix = torch.tensor(entries, dtype=widest_dtype(device), device=device)
        return matrix.view(count, count)


def check_batches(
    problem: Problem,
    batches: Sequence[Sequence[str]],
    averager: RowAverager | None,
    sharded: bool,
) -> None:
    """Refuse a step in which a loss has a gradient of one batch only.

    Args:
        problem: The losses of the last batch.
        batches: The losses of each batch of this rank.
        averager: The ranks, if each has batches of its own.
        sharded: Gradients arrive averaged over the ranks.
    """
    if averager is not None:
        return
    names = dict.fromkeys(name for batch in batches for name in batch)
    single = [name for name in names if sum(name in batch for batch in batches) == 1]
    if not single:
        return
    what = problem.independent or "PerLoss(unbiased=True)"
    ranks = (
        "(ranks that share the parameters of `fully_shard` make one batch together)"
        if sharded
        else "or train on several ranks"
    )
    if len(batches) == 1:
        raise BalanceError(
            f"{what} should get gradients of at least two independent batches in each step. Found "
            "one. Divide the batch into micro-batches, and call `backward` for all but the last "
            f"within `accumulate()`, {ranks}."
        )
    raise BalanceError(
        f"{what} should get gradients of each loss from at least two independent batches. Found "
        f"`{single[0]}` in one micro-batch of {len(batches)}. Give it in another one, too, or "
        f"leave it out of this window."
    )


# ---------------------------------------------------------------------- projection


def project_semidefinite(estimate: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest positive semidefinite matrix, and how much had to be removed.

    Nearest in units in which the gradients that were measured have length 1, so that it does not
    depend on the units of the losses. Where that leaves nothing of a gradient, a millionth of its
    squared length stays, orthogonal to all others.

    Args:
        estimate: An estimate of a Gramian, shape [K, K], symmetric.
        squares: Squared lengths of the gradients that it was made of, shape [K].

    Returns:
        The projection, in the dtype of `estimate`; and the Frobenius norm of what was removed,
        compared with that of the estimate, both in these units, as a 0-d tensor.
    """
    lengths = squares.to(estimate).sqrt()
    norms = lengths.masked_fill(lengths == 0, 1.0)
    unit = estimate / norms[:, None] / norms
    if len(unit) == 1:
        nearest = unit.clamp(min=0.0)
    elif len(unit) == 2:
        nearest = _project_two(unit)
    else:
        nearest = _project_many(unit)
    size = unit.norm()
    removed = torch.where(size > 0, (unit - nearest).norm() / size, size)
    # A gradient of which nothing is left is not zero: it must not count as satisfied.
    squared = nearest.diagonal()
    nearest = nearest + torch.diag(torch.where(squared == 0, _LEFT, 0.0).to(squared))
    projected = nearest * lengths[:, None] * lengths
    projected = (projected + projected.T) / 2  # equal to the last bit
    # What is not finite must stay with its own loss, by whose name it is reported.
    finite = estimate.diagonal().isfinite().all()
    return torch.where(finite, projected, estimate), removed


def keep_nonzero(estimate: Tensor, squares: Tensor) -> Tensor:
    """The estimate, in which only zero gradients have a product of exactly zero with themselves.

    Those of different batches may be orthogonal, as rows of an embedding are. They are not zero:
    they must not count as satisfied.
    """
    diagonal = estimate.diagonal()
    least = squares.to(diagonal) * _LEFT**2
    return estimate + torch.diag(torch.where(diagonal == 0, least, 0.0))


_LEFT = 2.0**-20
"""The squared length that is left of a gradient at least, compared with what was measured."""


def _project_two(matrix: Tensor) -> Tensor:
    """In closed form, on the device."""
    mean = matrix.diagonal().mean()
    radius = torch.hypot((matrix[0, 0] - matrix[1, 1]) / 2, matrix[0, 1])
    least, largest = mean - radius, mean + radius
    identity = torch.eye(2, dtype=matrix.dtype, device=matrix.device)
    # Without the direction of the least eigenvalue.
    ratio = largest.clamp(min=0.0) / (2 * radius).masked_fill(radius == 0, 1.0)
    return torch.where(least >= 0, matrix, ratio * (matrix - least * identity))


def _project_many(matrix: Tensor) -> Tensor:
    """By its eigenvalues, on the host: an eigensolver of an accelerator synchronizes as well."""
    host = matrix.cpu()
    if not bool(host.isfinite().all()):
        return matrix
    values, vectors = torch.linalg.eigh(host)
    if float(values[0]) >= 0.0:
        return matrix
    nearest: Tensor = (vectors * values.clamp(min=0.0)) @ vectors.T
    return ((nearest + nearest.T) / 2).to(matrix.device)
