"""The reference engine: one ``autograd.grad`` per loss, and the K gradients kept until combined.

    gramian():      loss_k --autograd.grad--> row_k = [gradient of param_0, None, ...]   k = 1 ... K
                    (on several ranks each row is averaged while the next is differentiated)
                    K rows --> Jacobian --> [K, K]
    add_to_grad(c): Jacobian --> c_1 row_1 + ... + c_K row_K --> .grad

Without a call of ``gramian`` the weighted sum of the losses takes one ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_

import torch
from torch import Tensor

from moo_balance.engine.autograd import has_reentrant_checkpoint, nodes_above, silence_hooks
from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    Row,
    Window,
    add_rows,
    deliver,
    gradients_of,
    gradients_through_hooks,
    is_distributed,
    node_hooks_error,
    precomputed_gradient,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.distributed import (
    add_weighted_sum,
    average_over_ranks,
    combined_sum,
    is_flattened,
    is_sharded,
    sharded_gramian,
)
from moo_balance.engine.features import FeatureGramian
from moo_balance.engine.independent import (
    BatchProducts,
    check_batches,
    expected_gramian,
    keep_nonzero,
    products_of_batch,
    project_semidefinite,
)
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.linear import (
    GradInputs,
    LinearWeightGradient,
    find_linear_layers,
    gramian_in_range,
)
from moo_balance.engine.rows import WholeRows
from moo_balance.errors import BalanceError


@dataclass(frozen=True)
class PerLoss(Engine):
    r"""Differentiate each loss once and keep the K gradients until they are combined.

    Time: K backward passes, each through the part of the graph its loss reaches. Memory: the
    gradients themselves, at most K·P elements; a parameter that a loss does not reach takes none.
    A method that needs no Gramian costs one ordinary backward pass. A backward function that all
    losses share runs K times, and an activation checkpoint is computed again K times (batch norms
    within count that), as by K calls of ``autograd.grad``; with ``features=``, the trunk's once.
    A backward function must neither edit the gradient that it is given, nor, if losses share it,
    what it has saved.

    The weight of a linear layer has a gradient of two thin factors, the layer's input and the
    gradient at its output. Where inner products and the weighted sum take fewer multiplications
    from the factors, the K gradients of that weight are never formed.

    On several ranks each row is averaged over them while the next one is differentiated, so that
    the Gramian is that of the averaged gradients. Rows of sharded parameters (``fully_shard``)
    stay sharded, and their inner products are summed over the shards.

    With a Gramian, gradients are written to the wrapped optimizer's parameters only; without one,
    to every leaf of the graph, as in a plain backward pass. Hooks of parameters see the balanced
    gradient, once, when it is written. What ``retain_grad`` keeps at an activation is, with a
    Gramian, not the balanced gradient but an unweighted sum over the passes of single losses.

    The Gramian of one batch is too long by the noise of its gradients, on the diagonal and wherever
    losses share it: :math:`E[g_i^\top g_j]` is not :math:`E[g_i]^\top E[g_j]`. With `unbiased`,
    only gradients of different batches are multiplied with each other: those of the n micro-batches
    of a window (``accumulate()``), of the n ranks of a data-parallel run, or of both,

    .. math:: \frac{n}{n - 1} \Big( S S^\top - \sum_a G_a G_a^\top \Big), \qquad S = \sum_a G_a ,

    which has the expectation :math:`E[S]\,E[S]^\top` of the gradient that is applied. Where losses
    are absent from some micro-batches, each entry counts the pairs that it has. The estimate may
    have negative eigenvalues, so the nearest positive semidefinite matrix takes its place, nearest
    where each gradient has the length that was measured; ``optimizer.metrics.projected`` (the key
    ``gramian/projected``) says how much was removed, from 0 to 1: more than a little means that
    these batches do not tell the gradients from noise. It takes n more products [K, K], the memory
    that a window takes anyway, and for more than two losses on an accelerator one read of the host.

    Args:
        dtype: Precision of inner products, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own. Gradients may be of any length that their
            own precision holds. On the CPU a Gramian that leaves the range of float32 comes in
            float64. On an accelerator, where the host does not read it, gradients are multiplied by
            powers of two before their products, and the Gramian always comes in float64; on Apple's
            "mps", which has none, their norms should lie between 1e-15 and 1e19.
        unbiased: Estimate the Gramian of the expected gradients. Default False. A step with one
            batch is refused, and so is ``features=``. Ranks of ``fully_shard`` make one batch
            together, as their gradients arrive averaged.
    """

    dtype: torch.dtype = torch.float32
    unbiased: bool = False

    @property
    def separates_batches(self) -> bool:
        return True

    def linearize(self, problem: Problem) -> Linearization:
        if problem.features:
            _check_no_features(problem, self.unbiased)
            return FeatureGramian(problem, self.dtype)
        linearization = PerLossLinearization(problem, self.dtype, self.unbiased)
        return WholeRows(linearization) if problem.whole_rows else linearization

    def window(self) -> Window:
        return PerLossWindow(self.dtype, self.unbiased)


class PerLossLinearization(Linearization):
    """One batch: it is differentiated loss by loss once its Gramian is requested.

    Attributes:
        jacobian: The rows, once they are there.
        layers: What they lack: gradients of linear layers, in factors.
        within: Inner products within single batches, if they are not to count.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, unbiased: bool = False) -> None:
        self.problem = problem
        self.dtype = dtype
        self.unbiased = unbiased
        self.jacobian: Jacobian | None = None
        self.layers: list[LinearWeightGradient] = []
        self.within: BatchProducts | None = None
        if problem.measured and (unbiased or problem.independent):
            self.within = BatchProducts()

    @cached_property
    def has_shards(self) -> bool:
        """Whether a parameter is sharded; not asked where no gradient per loss is taken."""
        return _has_shards(self.problem)

    def gramian(self) -> Tensor:
        problem, dtype = self.problem, self.dtype
        device, scale = problem.losses[0].device, problem.scale
        compared = None if problem.compared is None else frozenset(problem.compared)
        rows = self.take_rows()
        if self.has_shards:
            gramian = sharded_gramian(rows, compared, dtype, device, scale)
            self.jacobian = Jacobian(rows, ())
        else:
            self.jacobian = Jacobian(rows, compared)
            gramian = gramian_in_range(self.jacobian, self.layers, compared, dtype, device, scale)
        return gramian if self.within is None else self.correct(gramian)

    def take_rows(self) -> list[list[Tensor | None]]:
        """The K rows, of as many batches as are needed."""
        if self.within is not None:
            self._check_batches(self.within)
        return self._rows()

    def correct(self, gramian: Tensor) -> Tensor:
        """The Gramian of the rows, without bias if that is wanted.

        It is projected, unless a method wants it as it is.
        """
        if self.within is None:
            return gramian
        problem = self.problem
        averager = None if self.has_shards else problem.averager
        estimate = expected_gramian(gramian, self.within, problem.scale, averager)
        if problem.independent:
            estimate = keep_nonzero(estimate, gramian.diagonal())
        else:
            estimate, self.projected = project_semidefinite(estimate, gramian.diagonal())
        return estimate.to(gramian.dtype)

    def add_to_grad(self, coefficients: Tensor) -> None:
        if self.jacobian is None:
            add = weighted_backward if self.problem.averager is None else add_weighted_sum
            add(self.problem, coefficients)
        else:
            deliver(self._combine(self.jacobian, coefficients), self.problem)

    def combined(self, coefficients: Tensor) -> Tensor:
        problem = self.problem
        if self.jacobian is None:
            combine = weighted_sum if problem.averager is None else combined_sum
            return combine(problem, coefficients)
        unscaled = coefficients if problem.scale is None else coefficients / problem.scale
        gradients = self._combine(self.jacobian, unscaled)
        value = weighted_sum(problem, coefficients).detach()
        return precomputed_gradient(value, gradients, problem)

    def _check_batches(self, within: BatchProducts) -> None:
        problem, sharded = self.problem, self.has_shards
        batches = [*within.batches, tuple(problem.names)]
        check_batches(problem, batches, None if sharded else problem.averager, sharded)

    def _rows(self) -> list[list[Tensor | None]]:
        """The K rows, averaged if there are ranks to average over."""
        problem, sharded = self.problem, self.has_shards
        if self.within is None:
            layers = None if problem.whole_rows else self.layers
            rows = differentiate(problem, sharded, layers)
            return _average(zip(problem.names, rows, strict=True), problem, sharded)
        own = list[Row]()
        named = _keep(zip(problem.names, differentiate(problem, sharded), strict=True), own)
        averages = _average(named, problem, sharded)
        self.within = _add_products(self.within, own, problem, self.dtype, sharded)
        return averages

    def _combine(self, jacobian: Jacobian, coefficients: Tensor) -> Row:
        """The weighted gradient; consumes the rows."""
        total = jacobian.combine(coefficients)
        for layer in self.layers:
            total[layer.param_index] = layer.combine(coefficients)
        return total


class PerLossWindow(Window):
    """Several micro-batches: each loss has one row, to which every micro-batch adds.

    A row belongs to parameters: which of them train may change from one micro-batch to the next.

    Attributes:
        params: All that have trained so far; those of the last micro-batch first.
        compared: The ``id`` of each that has been compared.
        rows: By loss, a gradient for each parameter.
        within: Inner products within the micro-batches, if they are not to count.
    """

    def __init__(self, dtype: torch.dtype, unbiased: bool = False) -> None:
        self.dtype = dtype
        self.unbiased = unbiased
        self.params: Sequence[Tensor] = []
        self.compared: set[int] = set()
        self.rows: dict[str, Row] = {}
        self.within = BatchProducts()

    def add(self, problem: Problem) -> None:
        params, sharded = self.params_with(problem), _has_shards(problem)
        self.rows, self.within = self.rows_with(problem, params, sharded)
        self.params = params
        self.compared.update(id(problem.params[k]) for k in problem.compared or ())

    def close(self, problem: Problem) -> Linearization:
        closed = _ClosedWindow(self, problem)
        return WholeRows(closed) if problem.whole_rows else closed

    def params_with(self, problem: Problem) -> Sequence[Tensor]:
        """The parameters of one more micro-batch, then those that no longer train."""
        current = problem.params
        if len(current) == len(self.params) and all(map(is_, current, self.params)):
            return self.params
        ids = set(map(id, current))
        return [*current, *(param for param in self.params if id(param) not in ids)]

    def rows_with(
        self, problem: Problem, params: Sequence[Tensor], sharded: bool
    ) -> tuple[dict[str, Row], BatchProducts]:
        """This rank's rows so far plus those of one more micro-batch, over `params`.

        And its inner products within them, if they are wanted.
        """
        rows, within = dict(self.rows), self.within
        if params is not self.params:
            for name, row in self.rows.items():
                gradients = dict(zip(map(id, self.params), row, strict=True))
                rows[name] = [gradients.get(id(param)) for param in params]
        frozen = [None] * (len(params) - len(problem.params))
        new = differentiate(problem, sharded)
        if problem.measured and (self.unbiased or problem.independent):
            together = list(new)
            within = _add_products(within, together, problem, self.dtype, sharded)
            new = _hand_out(together)
        for name, row in zip(problem.names, new, strict=True):
            row = [*row, *frozen] if frozen else row
            rows[name] = add_rows(rows[name], row) if name in rows else row
        return rows, within


class _ClosedWindow(PerLossLinearization):
    """A window and its last micro-batch."""

    def __init__(self, window: PerLossWindow, problem: Problem) -> None:
        params, compared = window.params_with(problem), problem.compared
        if compared is not None:
            ids = window.compared.union(id(problem.params[k]) for k in compared)
            compared = [k for k, param in enumerate(params) if id(param) in ids]
        whole = problem._replace(params=params, compared=compared)
        super().__init__(whole, window.dtype, window.unbiased)
        self.window, self.last = window, problem
        if self.within is not None:
            self.within = window.within

    def add_to_grad(self, coefficients: Tensor) -> None:
        if self.jacobian is None:
            self.jacobian = Jacobian(self._rows(), ())
        super().add_to_grad(coefficients)

    def _rows(self) -> list[list[Tensor | None]]:
        sharded = self.has_shards
        rows, within = self.window.rows_with(self.last, self.problem.params, sharded)
        if self.within is not None:
            self.within = within
        return _average(rows.items(), self.problem, sharded)


def differentiate(
    problem: Problem, sharded: bool, layers: list[LinearWeightGradient] | None = None
) -> Iterator[Row]:
    """This rank's K rows, one after the other. The last pass frees the graph unless it is retained.

    Args:
        problem: The losses and the parameters.
        sharded: Some of the parameters are DTensors.
        layers: A list to be filled with the linear layers whose weights' gradients stay factored;
            their places in the rows are None then. None to have whole rows.
    """
    params, count = problem.params, len(problem.losses)
    nodes = nodes_above(problem.losses)
    reentrant = has_reentrant_checkpoint(nodes)
    if (sharded or reentrant) and problem.node_hooks:
        raise node_hooks_error("sharded parameters" if sharded else "a reentrant checkpoint")
    if reentrant and problem.averager is not None and not sharded:
        raise _reentrant_on_ranks()
    inputs = None
    if layers is not None and problem.averager is None and not (sharded or reentrant):
        layers += find_linear_layers(problem, nodes)
        inputs = GradInputs(params, layers) if layers else None
    silenced = silence_hooks(params)
    for k, (loss, output) in enumerate(zip(problem.losses, problem.grad_outputs(), strict=True)):
        retain_graph = problem.retain_graph or k < count - 1
        if sharded or reentrant:
            with silenced:
                row = gradients_through_hooks([loss], [output], params, retain_graph)
        elif inputs is None:
            with silenced:
                row = gradients_of([loss], [output], params, retain_graph)
        else:
            with silenced, inputs.recorder:
                row = gradients_of([loss], [output], inputs.inputs, retain_graph)
            row = inputs.split(row)
        if sharded and all(gradient is None for gradient in row):
            raise _no_gradient_of_shards(problem.names[k])
        yield row


def _keep(named: Iterable[tuple[str, Row]], rows: list[Row]) -> Iterator[tuple[str, Row]]:
    """Pass rows on, and keep them."""
    for name, row in named:
        rows.append(row)
        yield name, row


def _hand_out(rows: list[Row]) -> Iterator[Row]:
    """Pass rows on one by one, and keep none of those that are passed on."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _add_products(
    within: BatchProducts, rows: Sequence[Row], problem: Problem, dtype: torch.dtype, sharded: bool
) -> BatchProducts:
    """Take note of one more batch, and of the inner products of its rows."""
    device = problem.losses[0].device
    products = products_of_batch(rows, problem.compared, dtype, device, sharded)
    return within.plus(problem.names, products)


def _average(
    named: Iterable[tuple[str, Row]], problem: Problem, sharded: bool
) -> list[list[Tensor | None]]:
    """Rows averaged over the ranks; those of sharded parameters arrive averaged already."""
    if problem.averager is None or sharded:
        return [list(row) for _, row in named]
    return average_over_ranks(named, problem.averager, problem.params)


def _has_shards(problem: Problem) -> bool:
    """Whether a parameter is sharded by ``fully_shard``; those of FSDP1 are refused."""
    if not is_distributed():
        return False
    if is_flattened(problem.params):
        raise BalanceError(
            "One gradient per loss can be taken of a model in `fully_shard` (FSDP2). Found "
            "parameters of FullyShardedDataParallel (FSDP1), which frees them after one backward "
            "pass. Use `fully_shard`, or a method without a Gramian and no `accumulate`."
        )
    return is_sharded(problem.params)


def _check_no_features(problem: Problem, unbiased: bool) -> None:
    """Refuse a Gramian at the features where batches must be told apart."""
    what = problem.independent or ("PerLoss(unbiased=True)" if unbiased else "")
    if what and problem.measured:
        raise BalanceError(
            f"Parameter `features` should be left out here. Found {what}, which multiplies "
            "gradients of different batches: those at features belong to one batch each."
        )


def _no_gradient_of_shards(name: str) -> BalanceError:
    return BalanceError(
        f"The gradient of loss `{name}` should reach a sharded parameter. Found none. Leave "
        "`set_requires_gradient_sync(True)`, and call `backward` for micro-batches within "
        "`accumulate()`, which sums the shards."
    )


def _reentrant_on_ranks() -> BalanceError:
    return BalanceError(
        "Activation checkpointing should be `use_reentrant=False` where ranks average one gradient "
        "per loss. Found a reentrant checkpoint, whose backward passes would each start those of "
        "DistributedDataParallel."
    )
