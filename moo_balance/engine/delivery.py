"""A scalar that carries gradients which are known already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moo_balance.engine.rows import Row


def delivered(value: Tensor, gradients: Row, params: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose backward pass hands `gradients` to `params`.

    They arrive as any gradient does: scaled by what the backward pass starts from, added to
    ``.grad``, seen by hooks. So whoever calls ``backward`` on it need not know.
    """
    reached = [(g, p) for g, p in zip(gradients, params, strict=True) if g is not None]
    return _Delivery.apply(value, [g for g, _ in reached], *(p for _, p in reached))  # type: ignore[no-any-return, no-untyped-call]


class _Delivery(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> Any:
        return None, None, *(g * seed.to(g.device, g.dtype) for g in ctx.gradients)
