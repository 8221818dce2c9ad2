r"""Weight gradients of linear layers, kept as two thin factors and multiplied out once, weighted.

The weight of :math:`Y = X W^T` has the gradient :math:`D_k^T X` under loss k, where :math:`D_k` is
the gradient at Y. With :math:`M = X X^T` an inner product of two of them is
:math:`\langle D_k, M D_l \rangle`, and a combination is :math:`(\sum_k c_k D_k)^T X`. So for few
samples and wide layers neither needs the K gradients themselves (the ghost products of Li et al.
2021 and Bu et al. 2022, between losses in place of within one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from moo_balance.engine.base import Problem
from moo_balance.engine.graph import Edge, gradient_edge, reach
from moo_balance.engine.products import cache_size, multiplies_exactly, symmetric
from moo_balance.engine.rows import Row, numbers, weighted_tensor


@dataclass(eq=False, repr=False)
class Factored:
    """The K gradients of one linear layer's weight.

    Args:
        node: Where the layer's output was computed; its gradient there is ``D_k``.
        column: Which of the problem's parameters the weight is.
        inputs: The layer's input X, shape [N, inputs].
        transposed: The weight is stored as [outputs, inputs], as ``torch.nn.Linear`` does.
    """

    node: Node
    column: int
    inputs: Tensor
    transposed: bool
    cotangents: list[Tensor | None] = field(default_factory=list)

    @property
    def edge(self) -> Edge:
        """Where its cotangents arrive."""
        return self.node, 0

    @property
    def reached(self) -> tuple[int, ...]:
        """The losses that reach the layer."""
        return tuple(k for k, cotangent in enumerate(self.cotangents) if cotangent is not None)

    def products(self, dtype: torch.dtype) -> Tensor:
        """Inner products of the gradients that are reached, in `dtype` or wider."""
        dtype = torch.promote_types(self.inputs.dtype, dtype)
        inputs = self.inputs.to(dtype)
        if not multiplies_exactly(inputs):
            inputs = inputs.double()
        matrix, total = inputs @ inputs.T, None
        for piece in self._pieces(matrix):
            products = piece.flatten(1) @ (matrix @ piece).flatten(1).T
            total = products if total is None else total.add_(products)
        assert total is not None
        return symmetric(total)

    def _pieces(self, like: Tensor) -> Iterator[Tensor]:
        """Cotangents side by side, [K, N, some outputs], of a size that stays in the cache.

        And of one that leaves room there for their product with the matrix, and for the matrix.
        """
        found = [cotangent for cotangent in self.cotangents if cotangent is not None]
        width = max(cache_size(like) // (4 * len(found) * max(len(like), 1)), _NARROWEST)
        for parts in zip(*(torch.split(each, width, dim=1) for each in found), strict=True):
            yield torch.stack(parts).to(like.dtype)

    def combination(self, coefficients: Tensor) -> Tensor | None:
        """The weighted sum of the gradients; None where no loss reaches the layer."""
        if not self.reached:
            return None
        factors = numbers(coefficients)
        parts = [cotangent for cotangent in self.cotangents if cotangent is not None]
        cotangent = weighted_tensor(parts, [factors[k] for k in self.reached])
        return cotangent.T @ self.inputs if self.transposed else self.inputs.T @ cotangent


def factorable(
    problem: Problem, nodes: Collection[Node], reaching: Mapping[Node, int] | None = None
) -> list[Factored]:
    """The linear layers among these nodes for which factors are cheaper than gradients.

    The weight must be used there and nowhere else, and no hook may want to see its gradient.
    Averages over ranks are not products of factors: with several ranks there are none. By how many
    losses each node is reached is found out, if it is needed and not given as `reaching`.
    """
    count = len(problem.losses)
    if problem.parallel is not None or count < 2:
        return []
    linear = {kind for kind in set(map(type, nodes)) if kind.__name__ in _LINEAR}
    candidates = [node for node in nodes if type(node) in linear and _pays(node, count)]
    if not candidates:
        return []
    columns = {id(param): k for k, param in enumerate(problem.params) if _is_plain(param)}
    found = [layer for node in candidates for layer in _layers_at(node, columns)]
    uses = Counter(after for node in nodes for after, _ in node.next_functions)
    reaching = reach(problem.losses, nodes) if reaching is None else reaching
    layers = [
        layer
        for layer, way in found
        if all(uses[node] == 1 for node in way) and _pays(layer.node, reaching[layer.node])
    ]
    # The order of nodes is that of their addresses. Sums must not depend on it.
    return sorted(layers, key=lambda layer: layer.column)


_NARROWEST = 32
"""Fewer columns than these are slow to multiply."""

_LINEAR = {"AddmmBackward0": ("_saved_mat1", 2), "MmBackward0": ("_saved_self", 1)}
"""Nodes of a product of two matrices: the name of the left one, and the edge to the right one."""


def _pays(node: Any, count: int) -> bool:
    """Fewer multiplications with factors than with gradients of so many losses?"""
    name, _ = _LINEAR[type(node).__name__]
    samples, inputs = getattr(node, name + "_sym_sizes")
    outputs = node._saved_mat2_sym_sizes[1]
    weight = inputs * outputs
    with_factors = samples * (inputs + count * outputs) + count**2 * outputs + weight
    return bool(with_factors <= count * weight)


def _layers_at(node: Node, columns: dict[int, int]) -> Iterator[tuple[Factored, list[Node]]]:
    """The layer at a node, if it is one, with the nodes on the way to its weight."""
    name, edge = _LINEAR[type(node).__name__]
    after, _ = node.next_functions[edge]
    if after is None or getattr(node, "_saved_alpha", 1) != 1:
        return
    way = [after]
    transposed = type(after).__name__ == "TBackward0"
    if transposed:
        way.append(after.next_functions[0][0])  # type: ignore[arg-type]
    column = columns.get(id(getattr(way[-1], "variable", None)))
    if column is not None:
        yield Factored(node, column, getattr(node, name).detach(), transposed), way


def _is_plain(param: Tensor) -> bool:
    """Can its gradient be multiplied out by us, unseen by anybody?"""
    return (
        type(param) in (Tensor, torch.nn.Parameter)
        and param.is_floating_point()
        and not param._backward_hooks
    )


class Arrivals:
    """What arrives at layers, as a context in which losses are differentiated.

    ``autograd.grad`` knows it as the gradient of an input, but as it was before the hooks of the
    layer's output, if the layer itself is passed, too. So it is taken down behind them.
    """

    def __init__(self, layers: Sequence[Factored]) -> None:
        self.layers = layers
        self.handles: list[Any] = []
        self.noted: dict[Node, Tensor | None] = {}

    def __enter__(self) -> Arrivals:
        self.handles = [
            layer.node.register_prehook(partial(self._note, layer.node)) for layer in self.layers
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.noted.clear()

    def _note(self, node: Node, gradients: tuple[Tensor | None, ...]) -> None:
        self.noted[node] = gradients[0]

    def hand_out(self, found: Iterable[Tensor | None]) -> None:
        """Give each layer the cotangent of one loss, as found for its edge if not taken down."""
        for layer, cotangent in zip(self.layers, found, strict=True):
            layer.cotangents.append(self.noted.pop(layer.node, cotangent))


class Inputs:
    """What to differentiate a loss with respect to: parameters, and layers in place of weights.

    Rows are to be differentiated while its `arrivals` are watched.
    """

    def __init__(self, params: Sequence[Tensor], layers: Sequence[Factored]) -> None:
        held = {layer.column for layer in layers}
        self.arrivals, self.width = Arrivals(layers), len(params)
        self.columns = [column for column in range(self.width) if column not in held]
        self.inputs: list[Tensor | GradientEdge] = [params[column] for column in self.columns]
        self.inputs += [gradient_edge(layer.edge) for layer in layers]

    def sorted(self, found: Row) -> list[Tensor | None]:
        """The row of what was found, once the layers have been handed their cotangents."""
        if len(self.columns) == self.width:
            return list(found)
        self.arrivals.hand_out(found[len(self.columns) :])
        row: list[Tensor | None] = [None] * self.width
        for column, gradient in zip(self.columns, found, strict=False):
            row[column] = gradient
        return row
