"""What needs no second process: predicates, and products of rows without shards."""

from __future__ import annotations

import torch

from moo_balance.engine.distributed import is_sharded, is_whole, sharded_inner_products
from moo_balance.engine.jacobian import inner_products
from tests.support.engine_graphs import drawn, parameter

CPU = torch.device("cpu")


def test_ordinary_parameters_are_whole() -> None:
    assert not is_sharded([parameter(3), parameter(2)])
    assert is_whole(parameter(3))


def test_rows_without_shards_have_the_products_of_any_rows() -> None:
    rows = [[drawn(3), None, drawn(2, seed=1)], [drawn(3, seed=2), drawn(4, seed=3), None]]
    for compared in (None, [0, 1, 2], {0}, [1], []):
        found = sharded_inner_products(rows, compared, torch.float32, CPU)
        positions = range(3) if compared is None else compared
        torch.testing.assert_close(found, inner_products(rows, positions, torch.float32, CPU))
    assert rows[0][1] is None
