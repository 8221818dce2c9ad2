"""Gradients of each loss on several batches, with which nothing is trained.

read_inputs       validate what the user passed
measure_batches   batch --losses_fn--> losses --autograd.grad--> K rows, for each batch
multiply          B batches of K rows --> inner products, by module
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from moo_balance._distributed import Ranks, find_ranks
from moo_balance._hints import add_note
from moo_balance._reevaluation import DryRuns
from moo_balance._validation import (
    check_initialized,
    check_process_group,
    read_batch_losses,
    read_named_params,
)
from moo_balance.engine.autograd import in_static_graph
from moo_balance.engine.base import Problem, Row
from moo_balance.engine.distributed import is_whole
from moo_balance.engine.per_loss import differentiate
from moo_balance.engine.products import as_real_vector, chunk_size
from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.functional._checks import constant_vector, widest_dtype

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
    # An array or a tensor is one batch, of which a loop would take the rows.
    is_one = isinstance(batches, (Mapping, str)) or hasattr(batches, "__array__")
    if is_one or not isinstance(batches, Iterable):
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
        torch.tensor(scale, dtype=torch.float32, device="cpu"),
        find_ranks(process_group, None),
    )


# ------------------------------------------------------------ gradients of each batch


class Measured(NamedTuple):
    """What was measured on B batches; those of all ranks, rank by rank.

    Args:
        names: The K losses.
        losses: Their values, shape [B, K].
        norms: Norms of their gradients, shape [B, K].
        rows: For each batch of this rank its K gradients, times the loss scale; may be left out.
    """

    names: tuple[str, ...]
    losses: Tensor
    norms: Tensor
    rows: list[list[Row]]


def measure_batches(inputs: Inputs, least: int, keep_rows: bool) -> Measured:
    """Differentiate the losses of each batch.

    On several ranks it is a collective: either all return or all raise.

    Args:
        inputs: What the user passed.
        least: Fewer batches over all ranks are refused.
        keep_rows: Whether to return the gradients.
    """
    names: tuple[str, ...] = ()
    losses: list[list[float]] = []
    norms: list[list[float]] = []
    kept: list[list[Row]] = []
    dry_runs = DryRuns(partial(inputs.losses_fn, inputs.source), inputs.params)
    check_initialized(dry_runs.modules)
    with dry_runs.restore_random_state():
        batches, fault = iter(inputs.batches), None
        while True:
            batch: Any = _END
            try:
                batch = next(batches, _END) if fault is None else _END
            except BaseException as error:
                fault = error
            _agree(inputs.ranks, batch is not _END, names, fault)
            if batch is _END:
                break
            try:
                with dry_runs.undo() as evaluate:
                    result = evaluate(partial(inputs.losses_fn, batch))
                    scalars = read_batch_losses(result, names, len(losses))
                    names = tuple(scalars)
                    rows = list(_differentiate(scalars, inputs))
                    norms.append([_norm(row) for row in rows])
                    losses.append([float(loss.detach()) for loss in scalars.values()])
                    if keep_rows:
                        kept.append(rows)
                    del result, scalars, rows
            except BaseException as error:
                if inputs.ranks is None:
                    raise
                fault = error  # raised once the other ranks know
    if inputs.ranks is not None:
        gathered = inputs.ranks.gather((losses, norms))
        losses = [batch for of_rank, _ in gathered for batch in of_rank]
        norms = [batch for _, of_rank in gathered for batch in of_rank]
    if len(losses) < least:
        raise BalanceValueError(
            f"Parameter `batches` should hold at least {least}. Found {len(losses)}. Divide a "
            "batch into several, or pass more; an iterator that is used up has none."
        )
    values = torch.tensor(losses, dtype=torch.float64, device="cpu")
    lengths = torch.tensor(norms, dtype=torch.float64, device="cpu") / inputs.scale
    _check_finite(names, values, lengths)
    return Measured(names, values, lengths, kept)


def _norm(row: Row) -> float:
    """The norm of a gradient; also where squares leave the range of float64."""
    norms = []
    for vector in (_flatten(gradient) for gradient in row if gradient is not None):
        norm = float(vector.abs().max()) if len(vector) else 0.0
        if 0.0 < norm < math.inf:
            norm *= float((vector.to(widest_dtype(vector.device)) / norm).norm())
        norms.append(norm)
    return math.hypot(*norms)


def _check_finite(names: Sequence[str], losses: Tensor, norms: Tensor) -> None:
    """Refuse losses and norms of gradients, each [B, K], that are not finite."""
    for batch, loss in (~losses.isfinite()).nonzero().tolist():
        raise NonFiniteError(
            f"Loss `{names[loss]}` should be finite. Found {losses[batch, loss]:g} in batch "
            f"{batch}. Check its inputs; look for a logarithm or a division of zero."
        )
    for batch, loss in (~norms.isfinite()).nonzero().tolist():
        raise NonFiniteError(
            f"The gradient of loss `{names[loss]}` should be finite. Found NaN or infinity in "
            f"batch {batch}. Check the loss; with float16, pass `grad_scaler=`, or wait until its "
            "scale has settled."
        )


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
    try:
        for gradients in differentiate(problem, sharded=False):
            row: list[Tensor | None] = [None] * len(inputs.params)
            for k, gradient in zip(positions, gradients, strict=True):
                is_sparse = gradient is not None and gradient.is_sparse
                row[k] = gradient.to_dense() if gradient is not None and is_sparse else gradient
            yield row
    except RuntimeError as error:
        if "graph a second time" in str(error):
            add_note(error, "Compute all losses inside `losses_fn`, and do not call `backward`.")
        raise


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


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of the gradients of B batches, over some of the parameters.

    Each gradient is divided by the unit of its loss, so that no square leaves the range of float64.

    Args:
        with_sums: Of the gradient of loss k in batch b with the sum of those of loss l over all
            batches, shape [B, K, K].
        within: Of the gradients of losses k and l in the same batch b, shape [B, K, K].
        units: Powers of two, shape [K].
    """

    with_sums: Tensor
    within: Tensor
    units: Tensor

    def __add__(self, other: Products) -> Products:
        """Over the parameters of both."""
        return Products(self.with_sums + other.with_sums, self.within + other.within, self.units)


def multiply(measured: Measured, labels: Sequence[str], inputs: Inputs) -> dict[str, Products]:
    """Inner products over the parameters of each label, in float64 (float32 on Apple's "mps").

    Of the ranks that have batches of their own, all batches count, rank by rank.

    Args:
        measured: Gradients, and their norms.
        labels: For each parameter the module that it counts for.
        inputs: What the user passed.
    """
    batches, losses = measured.rows, len(measured.names)
    largest = measured.norms.amax(0).tolist()
    units = [2.0 ** min(max(math.frexp(norm)[1], -1000), 1000) for norm in largest]
    factors = tuple(1.0 / unit / float(inputs.scale) for unit in units)
    zeros = torch.zeros(len(batches), losses, losses, dtype=torch.float64, device="cpu")
    products = {label: Products(zeros, zeros, zeros.new_tensor(units)) for label in labels}
    for position, (label, param) in enumerate(zip(labels, inputs.params, strict=True)):
        gradients = [[row[position] for row in rows] for rows in batches]
        for stacked in _stack(gradients, param):
            stacked *= constant_vector(factors, stacked.dtype, stacked.device)[:, None]
            sums = stacked.sum(0)
            if inputs.ranks is not None:
                dist.all_reduce(sums, group=inputs.ranks.group)
            own = products[label]
            products[label] = Products(
                own.with_sums + (stacked @ sums.T).to(zeros),
                own.within + (stacked @ stacked.mT).to(zeros),
                own.units,
            )
    if inputs.ranks is None:
        return products
    gathered = inputs.ranks.gather(products)
    return {
        label: Products(
            torch.cat([each[label].with_sums for each in gathered]),
            torch.cat([each[label].within for each in gathered]),
            own.units,
        )
        for label, own in products.items()
    }


def _stack(gradients: Sequence[Sequence[Tensor | None]], param: Tensor) -> Iterator[Tensor]:
    """Gradients [B, K, p] of one parameter as real numbers, in chunks of p, widened."""
    vectors = [[None if g is None else _flatten(g) for g in row] for row in gradients]
    size = param.numel() * (2 if param.is_complex() else 1)
    length = max(1, chunk_size(param) // (len(vectors) * len(vectors[0])))
    dtype = widest_dtype(param.device)
    for start in range(0, size, length):
        stop = min(start + length, size)
        zeros = torch.zeros(stop - start, dtype=dtype, device=param.device)
        chunks = [[zeros if v is None else v[start:stop].to(dtype) for v in row] for row in vectors]
        yield torch.stack([torch.stack(row) for row in chunks])


def _flatten(gradient: Tensor) -> Tensor:
    """The gradient as a real vector of its own precision."""
    return as_real_vector(gradient, gradient.dtype.to_real())
