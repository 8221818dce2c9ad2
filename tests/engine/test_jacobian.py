"""Rows of gradients: inner products and combinations, block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moo_balance.engine import autograd, jacobian
from moo_balance.engine.base import Row
from moo_balance.engine.jacobian import Jacobian, inner_products
from moo_balance.errors import NonFiniteError
from tests.support.engine_graphs import drawn

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]


def dense(row: Row, like: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).to_dense().reshape(-1)
            for g, p in zip(row, like, strict=True)
        ]
    )


def combination(rows: list[Row], coefficients: Tensor) -> Row:
    return Jacobian([list(row) for row in rows]).combine(coefficients)


def some_rows() -> tuple[list[Row], list[Tensor]]:
    """Three rows over three parameters: dense, sparse, missing, strided, all mixed."""
    like = [torch.zeros(4, 3).double(), torch.zeros(2).double(), torch.zeros(3, 3).double()]
    values = drawn(3, 3, seed=1)
    with torch.sparse.check_sparse_tensor_invariants(True):
        sparse = torch.sparse_coo_tensor([[1, 3, 1]], values, (4, 3))
    rows: list[Row] = [
        [drawn(4, 3), None, drawn(3, 3, seed=2).T],
        [sparse, drawn(1, seed=3).expand(2), None],
        [sparse * 2, drawn(2, seed=4), torch.ones(3, 3).double()],
    ]
    return rows, like


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compared", [[0, 1, 2], [0], [1, 2], []])
def test_inner_products_over_compared_parameters(compared: list[int], dtype: torch.dtype) -> None:
    rows, like = some_rows()
    kept = [[row[c] for c in compared] for row in rows]
    parts = [like[c] for c in compared]
    chosen = [dense(row, parts) if compared else torch.zeros(1) for row in kept]
    jacobian = torch.stack(chosen).double()
    found = inner_products(rows, compared, dtype, CPU)
    torch.testing.assert_close(found.double(), jacobian @ jacobian.T, rtol=1e-14, atol=1e-14)
    assert found.dtype == (torch.float64 if compared else dtype)


def test_rows_that_reach_nothing_have_inner_products_of_zero() -> None:
    assert inner_products([[None], [None]], [0], torch.float32, CPU).tolist() == [[0.0, 0.0]] * 2


def test_a_lazily_conjugated_gradient_is_resolved() -> None:
    z, w = drawn(3, dtype=torch.complex128), drawn(3, seed=1, dtype=torch.complex128)
    found = inner_products([[z.conj()], [w]], [0], torch.float64, CPU)
    cross = (z.real * w.real - z.imag * w.imag).sum()
    torch.testing.assert_close(found[0, 1], cross)
    torch.testing.assert_close(found[0, 0], z.abs().square().sum())


def test_products_of_half_precision_are_summed_in_float32() -> None:
    row = torch.full((1000,), 300.0, dtype=torch.float16)
    assert inner_products([[row]], [0], torch.float32, CPU).item() == 9e7


@pytest.mark.parametrize("on_host", [True, False], ids=["floats", "tensors"])
def test_a_combination_is_new_memory_and_does_not_change_the_rows(
    on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_host:  # as on an accelerator, where reading a coefficient would wait
        monkeypatch.setattr("moo_balance.engine.jacobian.as_scalars", Tensor.unbind)
    rows, like = some_rows()
    before = [dense(row, like).clone() for row in rows]
    factors = drawn(3, seed=5)
    total = combination(rows, factors)
    expected = factors @ torch.stack(before)
    torch.testing.assert_close(dense(total, like), expected, rtol=1e-14, atol=1e-14)
    for gradient in total:
        gradient.zero_()
    for row, copy in zip(rows, before, strict=True):
        assert torch.equal(dense(row, like), copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_coefficients_as_tensors_combine_gradients_of_any_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moo_balance.engine.jacobian.as_scalars", lambda c: c.float().unbind())
    rows = [[drawn(3, seed=k).to(dtype), drawn(2, seed=9 + k).to(dtype)] for k in range(3)]
    factors = drawn(3, seed=5)
    expected = factors @ torch.stack([torch.cat(row).double() for row in rows])
    total = torch.cat(combination(rows, factors))
    assert total.dtype == dtype
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=8 * precision)


@pytest.mark.parametrize("count", [2, 6])
def test_long_gradients_are_multiplied_in_chunks(count: int) -> None:
    rows = [[drawn(700_001, seed=k).float(), drawn(5, seed=k).float()] for k in range(count)]
    jacobian = torch.stack([torch.cat(row).double() for row in rows])
    exact = jacobian @ jacobian.T
    found = inner_products(rows, [0, 1], torch.float32, CPU)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1.0)
    assert torch.equal(found, found.T)
    wide = inner_products(rows, [0, 1], torch.float64, CPU)
    torch.testing.assert_close(wide, exact, rtol=1e-13, atol=1e-7)


def test_a_parameter_that_no_row_reaches_has_no_combination() -> None:
    assert combination([[None, torch.ones(1)], [None, None]], torch.ones(2))[0] is None


def test_rows_and_blocks_are_consumed() -> None:
    rows = [list(row) for row in some_rows()[0]]
    jacobian = Jacobian(rows)
    assert rows == [[]] * 3
    jacobian.combine(torch.ones(3))
    assert jacobian.blocks == []


LAYOUTS = {
    "usual": lambda image: image,
    "channels last": lambda image: image.to(memory_format=torch.channels_last),
    "another": lambda image: image.transpose(0, 3).contiguous().transpose(0, 3),
}


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("first", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("size", [3, 300], ids=["small", "large"])
def test_gradients_of_any_memory_layout_are_multiplied_entry_by_entry(
    first, last, size: int
) -> None:
    rows: list[Row] = [
        [drawn(5, seed=k), lay(drawn(size, 4, 5, 6, seed=k)), drawn(2, 3, seed=k)]
        for k, lay in enumerate((first, last))
    ]
    like = [torch.zeros_like(gradient) for gradient in rows[0]]
    jacobian = torch.stack([dense(row, like) for row in rows])
    torch.testing.assert_close(
        inner_products(rows, [0, 1, 2], torch.float64, CPU), jacobian @ jacobian.T
    )
    factors = drawn(2, seed=7)
    total = combination(rows, factors)
    torch.testing.assert_close(dense(total, like), factors @ jacobian)
    if first is last and first is not LAYOUTS["another"]:
        assert total[1].stride() == rows[0][1].stride()  # as an optimizer likes it best


def test_a_block_holds_what_fits_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moo_balance.engine.products._CPU_CHUNK", 30)
    rows: list[Row] = [[drawn(5, seed=5 * k + j) for j in range(8)] for k in range(2)]
    blocks = Jacobian([list(row) for row in rows]).blocks
    assert [len(block.param_indices) for block in blocks] == [3, 3, 2]
    jacobian = torch.stack([torch.cat(list(row)) for row in rows])
    torch.testing.assert_close(
        inner_products(rows, range(8), torch.float64, CPU), jacobian @ jacobian.T
    )
    torch.testing.assert_close(torch.cat(combination(rows, torch.ones(2))), jacobian.sum(0))


def test_blocks_are_the_same_without_the_private_function_that_copies_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [[drawn(2, 3, seed=k), drawn(4, seed=k + 5)] for k in range(3)]
    expected = Jacobian([list(row) for row in rows]).gramian(torch.float64, CPU)
    monkeypatch.setattr(jacobian, "flatten", autograd._concatenate)
    assert torch.equal(Jacobian([list(row) for row in rows]).gramian(torch.float64, CPU), expected)


def test_coefficients_that_float32_does_not_hold_are_refused_and_float64_takes_them() -> None:
    for dtype in (torch.float32, torch.float64):
        rows = [[torch.full((3,), 1e-30, dtype=dtype)], [torch.ones(3, dtype=dtype)]]
        jacobian = Jacobian(rows)
        coefficients = torch.tensor([1e40, 1.0], dtype=torch.float64)
        if dtype == torch.float32:
            with pytest.raises(NonFiniteError, match=r"range of torch.float32. Found 1e\+40"):
                jacobian.combine(coefficients)
        else:
            (total,) = jacobian.combine(coefficients)
            assert torch.allclose(total, torch.full((3,), 1e10, dtype=dtype))


@pytest.mark.parametrize("compared", [(0, 1, 2), ()])
def test_coefficients_that_float16_does_not_hold_multiply_its_short_gradients(compared) -> None:
    parts = [torch.ones(2), torch.ones(3), torch.ones(70_000)]
    rows = [[(size * part).half() for part in parts] for size in (2.0, 1e-4)]
    for row in Jacobian(rows, compared).combine(torch.tensor([0.5, 1e5])):
        torch.testing.assert_close(row, torch.full_like(row, 11.0), rtol=1e-2, atol=0)
