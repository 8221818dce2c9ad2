"""Gradients of each loss on several batches, with which nothing is trained.

read_inputs       validate what the user passed
measure_batches   batch --losses_fn--> losses --autograd.grad--> K rows, for each batch
multiply          B batches of K rows --> inner products, by module
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from moo_balance._distributed import Ranks, find_ranks
from moo_balance._reevaluation import Trials
from moo_balance._validation import check_process_group, read_batch_losses, read_named_params
from moo_balance.engine.autograd import in_static_graph
from moo_balance.engine.base import Problem, Row
from moo_balance.engine.distributed import is_whole
from moo_balance.engine.per_loss import differentiate
from moo_balance.engine.products import as_real_vector, chunk_size
from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.functional._checks import widest_dtype

T = TypeVar("T")

_END = object()


class Inputs(NamedTuple):
    """What the user passed, validated.

    Args:
        losses_fn: Computes the losses of a batch.
        source: The module or the parameters as they were passed.
        names: Names of the parameters; empty where they have none.
        params: The parameters that train.
        batches: The batches of this rank.
        scale: The loss scale, 0-d.
        ranks: The ranks that have batches of their own; None for one process.
    """

    losses_fn: Callable[[Any], Any]
    source: Any
    names: Sequence[str]
    params: Sequence[Tensor]
    batches: Iterable[Any]
    scale: Tensor
    ranks: Ranks | None


def read_inputs(
    losses_fn: Any, params: Any, batches: Any, grad_scaler: GradScaler | None, process_group: Any
) -> Inputs:
    """Validate what the user passed."""
    if not callable(losses_fn):
        raise BalanceValueError(
            "Parameter `losses_fn` should be a function that computes the losses of a batch. Found "
            f"{type(losses_fn).__name__}. Pass `lambda batch: {{...}}`."
        )
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise BalanceValueError(
            "Parameter `batches` should be an iterable of batches. Found "
            f"{type(batches).__name__}. Pass a list of them, or `itertools.islice(loader, 16)`."
        )
    if not (grad_scaler is None or isinstance(grad_scaler, GradScaler)):
        raise BalanceValueError(
            "Parameter `grad_scaler` should be a torch.amp.GradScaler, or None. Found "
            f"{type(grad_scaler).__name__}. Pass the scaler of the training loop."
        )
    check_process_group(process_group)
    source = params if isinstance(params, torch.nn.Module) else None
    names, tensors = zip(*read_named_params(params), strict=True)
    if not all(map(is_whole, tensors)):
        raise BalanceValueError(
            "Parameter `params` should hold parameters that are whole on each rank. Found sharded "
            "ones. Measure a copy of the model on one device, before it is sharded."
        )
    scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
    return Inputs(
        losses_fn,
        source,
        names,
        tensors,
        batches,
        torch.tensor(scale, device="cpu"),
        find_ranks(process_group, None),
    )


# ------------------------------------------------------------ gradients of each batch


def measure_batches(
    inputs: Inputs, keep: Callable[[Sequence[Row]], T]
) -> tuple[tuple[str, ...], list[list[float]], list[T]]:
    """Differentiate the losses of each batch of this rank.

    On several ranks it is a collective: either all return or all raise.

    Args:
        inputs: What the user passed.
        keep: What is kept of the K gradients of a batch.

    Returns:
        The names of the losses; for each batch the K losses, and what is kept.
    """
    names: tuple[str, ...] = ()
    losses: list[list[float]] = []
    kept: list[T] = []
    trials = Trials(partial(inputs.losses_fn, inputs.source), inputs.params)
    with trials.restore_random_state():
        batches, fault = iter(inputs.batches), None
        while True:
            batch: Any = _END
            try:
                batch = next(batches, _END) if fault is None else _END
            except BaseException as error:
                fault = error
            _agree(inputs.ranks, batch is not _END, names, fault)
            if batch is _END:
                return names, losses, kept
            try:
                with trials.undo() as evaluate:
                    result = evaluate(partial(inputs.losses_fn, batch))
                    scalars = read_batch_losses(result, names, len(losses))
                    names = tuple(scalars)
                    kept.append(keep(list(_differentiate(scalars, inputs))))
                    losses.append([float(loss.detach()) for loss in scalars.values()])
                    del result, scalars
            except BaseException as error:
                if inputs.ranks is None:
                    raise
                fault = error  # raised once the other ranks know


def _differentiate(losses: Mapping[str, Tensor], inputs: Inputs) -> Iterator[Row]:
    """The K gradients over all parameters, one backward pass each."""
    if in_static_graph(list(losses.values())):
        raise BalanceError(
            "Parameter `losses_fn` should not call a DistributedDataParallel model with "
            "`static_graph=True`: it records its hooks in the first step. Found one. Call the "
            "model inside of it, `model.module`."
        )
    positions = [k for k, param in enumerate(inputs.params) if param.requires_grad]
    params = [inputs.params[k] for k in positions]
    problem = Problem(tuple(losses), tuple(losses.values()), params, scale=inputs.scale)
    for gradients in differentiate(problem, sharded=False):
        row: list[Tensor | None] = [None] * len(inputs.params)
        for k, gradient in zip(positions, gradients, strict=True):
            is_sparse = gradient is not None and gradient.is_sparse
            row[k] = gradient.to_dense() if gradient is not None and is_sparse else gradient
        yield row


def _agree(
    ranks: Ranks | None, has_batch: bool, names: Sequence[str], fault: BaseException | None
) -> None:
    """Raise alike on all ranks if one could not go on, or goes on in another way."""
    if fault is not None and ranks is None:
        raise fault
    if ranks is None:
        return
    message = None if fault is None else f"{type(fault).__name__}: {fault}"
    reports = ranks.gather((has_batch, tuple(names), message))
    if fault is not None:
        raise fault
    for rank, (_, _, message) in enumerate(reports):
        if message is not None:
            raise BalanceError(f"Rank {rank} could not compute its losses: {message}")
    first_has_batch, first_names, _ = reports[0]
    for rank, (its_has_batch, its_names, _) in enumerate(reports):
        if its_has_batch != first_has_batch:
            raise BalanceError(
                f"All ranks should have equally many batches. Found other numbers on rank {rank} "
                "and rank 0. Take as many on each."
            )
        if its_names != first_names:
            raise BalanceError(
                "All ranks should have the same losses, in the same order. Found "
                f"{list(its_names)} on rank {rank} and {list(first_names)} on rank 0."
            )


# ------------------------------------------------------------ inner products


class Products(NamedTuple):
    """Inner products of the gradients of B batches, over some of the parameters.

    Args:
        with_sums: Of the gradient of loss k in batch b with the sum of those of loss l over all
            batches, shape [B, K, K].
        within: Of the gradients of losses k and l in the same batch b, shape [B, K, K].
    """

    with_sums: Tensor
    within: Tensor

    def __add__(self, other: object) -> Products:
        if not isinstance(other, Products):
            return NotImplemented
        return Products(self.with_sums + other.with_sums, self.within + other.within)


def multiply(
    batches: Sequence[Sequence[Row]], labels: Sequence[str], inputs: Inputs
) -> dict[str, Products]:
    """Inner products over the parameters of each label, in float64 (float32 on Apple's "mps").

    Of the ranks that have batches of their own, all batches count, rank by rank.

    Args:
        batches: For each batch of this rank its K rows.
        labels: For each parameter the module that it counts for.
        inputs: What the user passed.
    """
    count, losses = len(batches), len(batches[0])
    zeros = torch.zeros(count, losses, losses, dtype=torch.float64, device="cpu")
    products = {label: Products(zeros, zeros) for label in labels}
    for position, (label, param) in enumerate(zip(labels, inputs.params, strict=True)):
        gradients = [[row[position] for row in rows] for rows in batches]
        for stacked in _stack(gradients, param):
            sums = stacked.sum(0)
            if inputs.ranks is not None:
                dist.all_reduce(sums, group=inputs.ranks.group)
            with_sums, within = stacked @ sums.T, stacked @ stacked.mT
            products[label] += Products(with_sums.to(zeros), within.to(zeros))
    scale = float(inputs.scale) ** 2
    products = {k: Products(p.with_sums / scale, p.within / scale) for k, p in products.items()}
    if inputs.ranks is None:
        return products
    gathered = inputs.ranks.gather(products)
    return {
        label: Products(
            torch.cat([each[label].with_sums for each in gathered]),
            torch.cat([each[label].within for each in gathered]),
        )
        for label in products
    }


def _stack(gradients: Sequence[Sequence[Tensor | None]], param: Tensor) -> Iterator[Tensor]:
    """Gradients [B, K, p] of one parameter as real numbers, in chunks of p, widened."""
    vectors = [[None if g is None else flatten(g) for g in row] for row in gradients]
    size = param.numel() * (2 if param.is_complex() else 1)
    length = max(1, chunk_size(param) // (len(vectors) * len(vectors[0])))
    dtype = widest_dtype(param.device)
    for start in range(0, size, length):
        stop = min(start + length, size)
        zeros = torch.zeros(stop - start, dtype=dtype, device=param.device)
        chunks = [[zeros if v is None else v[start:stop].to(dtype) for v in row] for row in vectors]
        yield torch.stack([torch.stack(row) for row in chunks])


def flatten(gradient: Tensor) -> Tensor:
    """The gradient as a real vector of its own precision."""
    return as_real_vector(gradient, gradient.dtype.to_real())


def check_finite(names: Sequence[str], squares: Tensor) -> None:
    """Refuse gradients that are not finite, given their squared norms [B, K]."""
    faulty = (~squares.isfinite()).nonzero().tolist()
    if faulty:
        batch, loss = faulty[0]
        raise NonFiniteError(
            f"The gradient of loss `{names[loss]}` should be finite. Found NaN or infinity in "
            f"batch {batch}. Check the loss; with float16, pass `grad_scaler=`, or wait until its "
            "scale has settled."
        )
