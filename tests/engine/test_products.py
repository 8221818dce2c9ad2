"""Inner products of vectors, and Gramians that are put together from parts."""

from __future__ import annotations

import pytest
import torch

from moo_balance.engine.products import (
    DOT_LIMIT,
    add_products,
    assemble_gramian,
    exact_for_products,
    vector_products,
)
from tests.support.engine_graphs import drawn

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 4, 5, DOT_LIMIT, DOT_LIMIT + 1])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_any_number_of_vectors(count: int, stacked: bool, dtype: torch.dtype) -> None:
    matrix = drawn(count, 50).to(dtype)
    found = vector_products(matrix.unbind(), matrix if stacked else None)
    assert torch.equal(found, found.T)
    exact = matrix.double() @ matrix.double().T
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_matrix_product_is_exact_where_tf32_would_not_be() -> None:
    matrix = drawn(3, 4).float()
    assert exact_for_products(matrix) is matrix
    assert exact_for_products(matrix.double()).dtype == torch.float64
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert exact_for_products(matrix).dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact_for_products(matrix.to("meta")).dtype == torch.float64


@pytest.mark.parametrize("losses", [(0, 1, 2, 3), (1, 2), (0, 3), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_added_at_the_rows_and_columns_of_their_losses(
    losses: tuple[int, ...], dtype: torch.dtype
) -> None:
    products = drawn(len(losses), len(losses), seed=1).to(dtype)
    expected = torch.ones(4, 4).double()
    for j, row in enumerate(losses):
        for k, column in enumerate(losses):
            expected[row, column] += products[j, k]
    found = add_products(torch.ones(4, 4), products, losses)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected)


def test_a_gramian_is_assembled_from_parts() -> None:
    whole, part = drawn(3, 3), drawn(2, 2, seed=1).float()
    found = assemble_gramian([((0, 2), part), ((0, 1, 2), whole.clone())], 3, torch.float32, CPU)
    expected = whole.clone()
    expected[[0, 0, 2, 2], [0, 2, 0, 2]] += part.double().reshape(-1)
    torch.testing.assert_close(found, expected)
    assert assemble_gramian([], 2, torch.float32, CPU).tolist() == [[0, 0], [0, 0]]
    single = assemble_gramian([((1,), part[:1, :1])], 2, torch.float32, CPU)
    assert single.tolist() == [[0, 0], [0, part[0, 0].item()]]
