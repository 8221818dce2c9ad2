"""Generalized divisive normalization, and bounds that let gradients through."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BETA_FLOOR = 1e-6
"""Smallest β of :class:`GDN`."""

PEDESTAL = 2.0**-36
"""What :class:`NonNegative` adds under the square root, so that its slope at 0 is not infinite."""


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(values, bound)
        return torch.maximum(values, bound)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        values, bound = ctx.saved_tensors
        return gradient * ((values >= bound) | (gradient < 0)), None


class LowerBound(nn.Module):
    """``max(values, bound)``; below the bound, only updates that would raise a value pass.

    :func:`torch.clamp` masks both, so a clipped parameter would stay clipped for ever.

    Args:
        bound: A buffer ``[1]``, since CompressAI's state dicts contain it.
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor([bound]))

    def forward(self, values: Tensor) -> Tensor:
        return _LowerBound.apply(values, self.bound)


class NonNegative(nn.Module):
    r"""A value of at least `minimum` as :math:`\max(p, \sqrt{m + \varepsilon})^2 - \varepsilon`.

    `p` is the parameter that is trained, `m` the minimum and ε :data:`PEDESTAL`.
    """

    def __init__(self, minimum: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("pedestal", torch.tensor([PEDESTAL]))
        self.lower_bound = LowerBound((minimum + PEDESTAL) ** 0.5)

    def invert(self, values: Tensor) -> Tensor:
        """The parameter `p` of values that are not below the minimum."""
        return (values + self.pedestal).sqrt()

    def forward(self, parameter: Tensor) -> Tensor:
        return self.lower_bound(parameter).square() - self.pedestal


class GDN(nn.Module):
    r"""Divisive normalization :math:`y_i = x_i / \sqrt{\beta_i + \sum_j \gamma_{ij} x_j^2}`.

    After Ballé, Laparra & Simoncelli (ICLR 2016, arXiv 1511.06281), with β ≥ 1e-6 and γ ≥ 0.

    Args:
        channels: Number of channels `i`. Both parameters start at the published values,
            :math:`\beta = 1` and :math:`\gamma = 0.1\,I`; they are kept as :class:`NonNegative`'s.
        inverse: Multiply by the root instead of dividing, as the synthesis transform does.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta_reparam = NonNegative(BETA_FLOOR)
        self.beta = nn.Parameter(self.beta_reparam.invert(torch.ones(channels)))
        self.gamma_reparam = NonNegative()
        self.gamma = nn.Parameter(self.gamma_reparam.invert(0.1 * torch.eye(channels)))

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution is the same sum over channels and keeps the memory layout.
        gamma = self.gamma_reparam(self.gamma)[:, :, None, None]
        norm = functional.conv2d(x * x, gamma, self.beta_reparam(self.beta))
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())
