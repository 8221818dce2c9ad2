"""Random sets of gradients for property tests, from harmless to degenerate; and a count."""

from __future__ import annotations

import torch
from hypothesis import settings, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

property_test = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def jacobians(draw, counts=(2, 8), decades=0.0, degenerate=False) -> Tensor:
    """K gradients as rows, norms spread over ``10 ** [-decades, decades]``.

    They are in general position, with at least as many parameters as gradients, unless
    ``degenerate``: then there may be fewer parameters, rows that repeat or oppose one another, and
    a row of zeros.
    """
    count = draw(st.integers(*counts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(1, 2 * count)) if degenerate else 2 * count
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if degenerate:
        source = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
        signs = draw(st.lists(st.sampled_from([1, 1, -1]), min_size=count, max_size=count))
        rows = rows[source] * torch.tensor(signs, dtype=torch.float64)[:, None]
        rows[0] *= draw(st.sampled_from([1, 1, 1, 0]))
    exponents = decades * (2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
    return rows * 10**exponents


class Operations(TorchDispatchMode):
    """Writes down the tensor operations that are dispatched within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def gramian_of(rows: Tensor) -> Tensor:
    """Inner products of the rows."""
    return rows @ rows.T


def relative_products(rows: Tensor, weights: Tensor) -> Tensor:
    """Product of each gradient with the combined direction, relative to the sizes involved."""
    norms = rows.norm(dim=1)
    scale = norms * (weights.abs() * norms).sum()
    return (gramian_of(rows) @ weights / scale).nan_to_num(nan=0.0)
