r"""Weight gradients of linear layers, kept as two thin factors and multiplied out once, weighted.

The weight of :math:`Y = X W^T` has the gradient :math:`D_k^T X` under loss k, where :math:`D_k` is
the gradient at Y. With :math:`M = X X^T` an inner product of two of them is
:math:`\langle D_k, M D_l \rangle`, and a combination is :math:`(\sum_k c_k D_k)^T X`. So for few
samples and wide layers neither needs the K gradients themselves (the ghost products of Li et al.
2021 and Bu et al. 2022, between losses instead of within one).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from moo_balance.engine.autograd import (
    Edge,
    MatrixProduct,
    count_reaching_losses,
    count_uses,
    gradient_edge,
    matrix_products,
)
from moo_balance.engine.base import Problem, Row, remove_loss_scale
from moo_balance.engine.jacobian import Jacobian, as_scalars, weighted_tensor
from moo_balance.engine.products import (
    add_products,
    chunk_size,
    exact_for_products,
    is_all_zero,
    products_in_range,
    symmetrize,
)


@dataclass(eq=False, repr=False)
class LinearWeightGradient:
    """The K gradients of one linear layer's weight.

    Args:
        node: Where the layer's output was computed; its gradient there is ``D_k``.
        param_index: Which of the problem's parameters the weight is.
        inputs: The layer's input X, shape [N, inputs].
        transposed: The weight is stored as [outputs, inputs], as ``torch.nn.Linear`` does.
        output_gradients: ``D_k`` for each loss, shape [N, outputs]; None where it does not reach.
    """

    node: Node
    param_index: int
    inputs: Tensor
    transposed: bool
    output_gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def edge(self) -> Edge:
        """Where its output gradients arrive."""
        return self.node, 0

    @property
    def losses(self) -> tuple[int, ...]:
        """Positions of the losses that reach the layer."""
        return tuple(k for k, gradient in enumerate(self.output_gradients) if gradient is not None)

    def is_zero(self, loss: int) -> bool:
        """Whether the gradient of a loss is zero, as far as one of its factors tells."""
        gradient = self.output_gradients[loss]
        return gradient is None or is_all_zero(gradient) or is_all_zero(self.inputs)

    def products(self, dtype: torch.dtype) -> Tensor:
        """Inner products of the gradients that there are, in `dtype` or wider."""
        dtype = torch.promote_types(self.inputs.dtype, dtype)
        inputs = exact_for_products(self.inputs.to(dtype))
        matrix, total = inputs @ inputs.T, None
        for chunk in self._chunks(matrix):
            products = chunk.flatten(1) @ (matrix @ chunk).flatten(1).T
            total = products if total is None else total.add_(products)
        assert total is not None
        return symmetrize(total)

    def _chunks(self, matrix: Tensor) -> Iterator[Tensor]:
        """Output gradients stacked, [K, N, some outputs].

        A chunk leaves room in the cache for its product with the matrix, and for the matrix.
        """
        there = [gradient for gradient in self.output_gradients if gradient is not None]
        width = chunk_size(matrix) // (4 * len(there) * max(len(matrix), 1))
        width = max(width, _NARROWEST)
        for parts in zip(*(torch.split(each, width, dim=1) for each in there), strict=True):
            yield torch.stack(parts).to(matrix.dtype)

    def combine(self, coefficients: Tensor) -> Tensor | None:
        """The weighted sum of the gradients; None where no loss reaches the layer."""
        losses = self.losses
        if not losses:
            return None
        factors = as_scalars(coefficients)
        parts = [gradient for gradient in self.output_gradients if gradient is not None]
        total = weighted_tensor(parts, [factors[k] for k in losses])
        return total.T @ self.inputs if self.transposed else self.inputs.T @ total


_NARROWEST = 32
"""Fewer columns than these are slow to multiply."""


def find_linear_layers(
    problem: Problem, nodes: Collection[Node], reaching: Mapping[Node, int] | None = None
) -> list[LinearWeightGradient]:
    """The linear layers among these nodes for which factors are cheaper than gradients.

    The weight must be used there and nowhere else, and the layer's input must not be packed by a
    hook, as under an activation checkpoint.
    Averages over ranks are not products of factors: with several ranks there are none.

    Args:
        problem: The losses and the parameters.
        nodes: All that the losses reach.
        reaching: By how many losses each node is reached; None to count them if it is needed.
    """
    count = len(problem.losses)
    if problem.averager is not None or count < 2:
        return []
    candidates = [product for product in matrix_products(nodes) if _pays(product, count)]
    if not candidates:
        return []
    positions = {id(param): k for k, param in enumerate(problem.params) if _is_plain(param)}
    uses = count_uses(nodes)
    reaching = count_reaching_losses(problem.losses, nodes) if reaching is None else reaching
    layers = []
    for product in candidates:
        weight, transposed, path = product.right_leaf()
        index = positions.get(id(weight))
        used_once = all(uses[node] == 1 for node in path)
        pays = index is not None and used_once and _pays(product, reaching[product.node])
        if index is not None and pays and not product.is_packed():
            layers.append(LinearWeightGradient(product.node, index, product.left(), transposed))
    # The order of nodes is that of their addresses. Sums must not depend on it.
    return sorted(layers, key=lambda layer: layer.param_index)


def _pays(product: MatrixProduct, count: int) -> bool:
    """Whether factors take no more multiplications than the gradients of so many losses."""
    samples, inputs, outputs = product.samples, product.inputs, product.outputs
    weight = inputs * outputs
    with_factors = samples * (inputs + count * outputs) + count**2 * outputs + weight
    return with_factors <= count * weight


def _is_plain(param: Tensor) -> bool:
    """Whether no tensor subclass could observe this parameter's gradient, and it is real."""
    return type(param) in (Tensor, torch.nn.Parameter) and param.is_floating_point()


def add_linear_layers(
    gramian: Tensor,
    layers: Sequence[LinearWeightGradient],
    compared: Collection[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Add the inner products of factored gradients whose parameters are compared."""
    for layer in layers:
        losses = layer.losses
        if losses and (compared is None or layer.param_index in compared):
            gramian = add_products(gramian, layer.products(dtype), losses)
    return gramian


def gramian_in_range(
    jacobian: Jacobian,
    layers: Sequence[LinearWeightGradient],
    compared: Collection[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    scale: Tensor | None = None,
) -> Tensor:
    """Gramian [K, K] of rows without some gradients, which are factored; without the loss scale.

    It is in `dtype`, or in float64 if it leaves the range of that on the CPU.
    """
    layers = [layer for layer in layers if compared is None or layer.param_index in compared]

    def products(dtype: torch.dtype) -> Tensor:
        gramian = jacobian.gramian(dtype, device)
        if layers:
            gramian = add_linear_layers(gramian, layers, None, dtype)
        return gramian if scale is None else remove_loss_scale(gramian, scale)

    def is_zero(loss: int) -> bool:
        return jacobian.is_zero(loss) and all(layer.is_zero(loss) for layer in layers)

    return products_in_range(products, dtype, is_zero)


class OutputGradientRecorder:
    """Context manager that records the gradient at each layer's output.

    ``autograd.grad`` would return it as it was before the output's own hooks. A node's pre-hook
    runs after these.
    """

    def __init__(self, layers: Sequence[LinearWeightGradient]) -> None:
        self.layers = layers
        self.handles: list[Any] = []
        self.recorded: dict[Node, Tensor | None] = {}

    def __enter__(self) -> OutputGradientRecorder:
        self.handles = [
            layer.node.register_prehook(partial(self._record, layer.node)) for layer in self.layers
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.recorded.clear()

    def _record(self, node: Node, gradients: tuple[Tensor | None, ...]) -> None:
        self.recorded[node] = gradients[0]

    def append_to_layers(self, returned: Iterable[Tensor | None]) -> None:
        """Give each layer its output gradient under one loss: as recorded, else as returned."""
        for layer, gradient in zip(self.layers, returned, strict=True):
            layer.output_gradients.append(self.recorded.pop(layer.node, gradient))


class GradInputs:
    """What to differentiate losses with respect to: layers' outputs in place of their weights.

    Attributes:
        inputs: The other parameters, then the edges at the layers' outputs.
        recorder: To be entered while a loss is differentiated with respect to them.
    """

    def __init__(self, params: Sequence[Tensor], layers: Sequence[LinearWeightGradient]) -> None:
        weights = {layer.param_index for layer in layers}
        self.recorder, self.width = OutputGradientRecorder(layers), len(params)
        self.positions = [k for k in range(self.width) if k not in weights]
        self.inputs: list[Tensor | GradientEdge] = [params[k] for k in self.positions]
        self.inputs += [gradient_edge(layer.edge) for layer in layers]

    def split(self, gradients: Row) -> list[Tensor | None]:
        """Gradients of one loss at `inputs`: a row, and output gradients, which the layers get."""
        self.recorder.append_to_layers(gradients[len(self.positions) :])
        row: list[Tensor | None] = [None] * self.width
        for k, gradient in zip(self.positions, gradients, strict=False):
            row[k] = gradient
        return row
