"""Sharded parameters (``torch.distributed.fsdp.fully_shard``): inner products over shards."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.jacobian import inner_products
from moo_balance.engine.rows import Row


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Is any of these a DTensor? Where nobody has imported them, none can be."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(param, module.DTensor) for param in params)


def is_flattened(params: Sequence[Tensor]) -> bool:
    """Is any of these cut out of FullyShardedDataParallel's (FSDP1's) flat parameters?"""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(getattr(param, "_fsdp_flattened", False) for param in params)


def is_whole(param: Tensor) -> bool:
    """Does each rank hold all of it?"""
    return not (is_sharded([param]) or is_flattened([param]))


def sharded_inner_products(
    rows: Sequence[Row], columns: Collection[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Gramian of rows whose tensors may be DTensors.

    Local products of equally sharded parameters are summed over the mesh dimensions they are
    sharded along; along the others every rank holds the same.
    """
    rows = [[_summed(gradient) for gradient in row] for row in rows]
    families: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for column in columns:
        gradient = next((row[column] for row in rows if row[column] is not None), None)
        if gradient is not None:
            families.setdefault(_family(gradient), []).append(column)
    local = [[_local(gradient) for gradient in row] for row in rows]
    total = torch.zeros(len(rows), len(rows), dtype=dtype, device=device)
    for (mesh, dims), members in families.items():
        products = inner_products(local, members, dtype, device)
        for dim in dims:
            dist.all_reduce(products, group=mesh.get_group(dim))
        total = total.to(products) + products
    return total


def _summed(gradient: Tensor | None) -> Tensor | None:
    """Carry out a sum over ranks that a tensor-parallel module has left open."""
    placements = getattr(gradient, "placements", ())
    if gradient is None or not any(placement.is_partial() for placement in placements):
        return gradient
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if p.is_partial() else p for p in placements]
    return gradient.redistribute(placements=whole)  # type: ignore[attr-defined, no-any-return]


def _family(gradient: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh, and its dimensions along which this gradient is cut up."""
    placements = getattr(gradient, "placements", None)
    if placements is None:
        return None, ()
    dims = tuple(dim for dim, placement in enumerate(placements) if placement.is_shard())
    return gradient.device_mesh, dims  # type: ignore[attr-defined]


def _local(gradient: Tensor | None) -> Tensor | None:
    return getattr(gradient, "to_local", lambda: gradient)()
