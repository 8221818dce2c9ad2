"""A codec whose quantization step is chosen when it is used.

Variable-rate coding after Kamisli, Racapé & Choi (DCC 2024, arXiv 2402.18930): a gain that
scales the latent before rounding, offsets that move the reconstruction of a symbol away from
the middle of its interval, and a step of its own for the hyper-latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.lic.codec import (
    SCALE_FLOOR,
    MeanScaleHyperprior,
    Reconstruction,
    gaussian_likelihood,
    logistic_likelihood,
    lower_bound,
)

HYPER_STEP_FLOOR = 0.5
"""Smallest step of the hyper-latent."""


def step_for(lmbda: float, highest: float) -> float:
    r"""The step :math:`\Delta = \sqrt{\lambda_{\max} / \lambda}` that suits a price of distortion.

    At high rate a uniform quantizer's error is :math:`\Delta^2 / 12` and its rate falls by a bit
    per doubling, so that the best step for :math:`R + \lambda D` goes as
    :math:`1 / \sqrt{\lambda}`; the codec of the highest λ was trained with a step of 1.
    """
    if not 0 < lmbda < math.inf:
        raise ValueError(f"`lmbda` should be positive and finite. Found {lmbda}.")
    return math.sqrt(highest / lmbda)


def _perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them; the last starts at zero, and with it the output."""
    layers = [m for pair in pairwise(widths) for m in (nn.Linear(*pair), nn.ReLU())][:-1]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class ReconstructionOffset(nn.Module):
    r"""The quantization-reconstruction offset :math:`\delta = -f(\tilde\sigma, g)` of a symbol.

    The mean of a Gaussian over the interval of a symbol lies nearer to its peak than the middle
    does, the more so the wider the interval. A small network learns by how much, in units of the
    step: 205 parameters, and no offset at the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = _perceptron(2, 12, 12, 1)

    def forward(self, scale: Tensor, gain: float) -> Tensor:
        """Offsets away from zero, one for each of the floored scales of the gained latent."""
        inputs = torch.stack([scale, torch.full_like(scale, gain)], dim=-1)
        return -self.layers(inputs).squeeze(-1)


class HyperStep(nn.Module):
    r"""The hyper-latent's step :math:`\Delta_z = \max(0.5, \mathrm{softplus} f(\Delta))`.

    141 parameters; 1 at the start, so that training begins with the codec it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = _perceptron(1, 10, 10, 1)
        nn.init.constant_(self.layers[-1].bias, math.log(math.expm1(1)))

    def forward(self, step: float) -> Tensor:
        """The step of z, 0-d, that goes with a step of y."""
        bias = self.layers[-1].bias
        output = self.layers(torch.full((1,), step, dtype=bias.dtype, device=bias.device))
        return lower_bound(functional.softplus(output), HYPER_STEP_FLOOR).squeeze()


def no_offset(scale: Tensor, gain: float) -> Tensor:
    """Reconstruct in the middle."""
    return torch.zeros_like(scale)


def unit_step(step: float) -> Tensor:
    """Round z as ever."""
    return torch.ones(())


def reconstruct(symbols: Tensor, offset: Tensor) -> Tensor:
    """Move symbols away from zero by their offsets; a zero stays one."""
    return symbols + symbols.detach().sign() * offset


def _noisy(values: Tensor, width: Tensor | float = 1.0) -> Tensor:
    return values + width * (torch.rand_like(values) - 0.5)


def _round_straight_through(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


class VariableRateCodec(nn.Module):
    r"""A fixed-rate codec, used at any step :math:`\Delta = 1/g`.

    .. math::
        q = \mathrm{round}(g (y - \mu)), \qquad
        \hat y = \mu + \frac{q + \mathrm{sign}(q)\, \delta}{g}

    The gain is no parameter: it follows from the λ that is asked for (:func:`step_for`), those in
    between the trained ones included.

    Args:
        base: The codec, trained at `highest`.
        highest: The λ whose step is 1.
        offset: δ of floored scales and a gain; default none. :class:`ReconstructionOffset`
        hyper_step: :math:`\Delta_z` of a step; default 1. :class:`HyperStep`
    """

    def __init__(
        self,
        base: MeanScaleHyperprior,
        highest: float,
        *,
        offset: Callable[[Tensor, float], Tensor] = no_offset,
        hyper_step: Callable[[float], Tensor] = unit_step,
    ) -> None:
        super().__init__()
        self.base = base
        self.highest = highest
        self.offset = offset
        self.hyper_step = hyper_step

    def at(self, lmbda: float) -> FixedStep:
        """The codec at one price of distortion; any, whether it was trained or not."""
        return FixedStep(self, step_for(lmbda, self.highest))

    def forward(self, images: Tensor, step: float) -> Reconstruction:
        return self.code(*self.base.analyze(images), step)

    def code(
        self, y: Tensor, z: Tensor, step: float, *, noisy_decoder: bool = False
    ) -> Reconstruction:
        """Quantize latents that :meth:`MeanScaleHyperprior.analyze` gave, and decode them.

        Split off because training codes the latents of one batch at every step. In training mode
        the rate sees noise and the decoder rounded symbols, straight through; with
        `noisy_decoder` it sees the noise too, and no offset, which only symbols have.
        """
        mean, scale, bits_z = self._code_hyper_latent(z, step)
        gain = 1 / step
        centered, scale = gain * (y - mean), gain * scale
        noisy = _noisy(centered) if self.training else centered.round()
        bits = {"y": -gaussian_likelihood(noisy, scale).log2().sum(), "z": bits_z}
        if noisy_decoder:
            return Reconstruction(self.base.synthesize(mean + noisy * step), bits)
        offset = self.offset(lower_bound(scale, SCALE_FLOOR), gain)
        residual = reconstruct(_round_straight_through(centered), offset)
        return Reconstruction(self.base.synthesize(mean + residual * step), bits)

    def _code_hyper_latent(self, z: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and scale that the decoder knows from z, and the bits z took."""
        width = self.hyper_step(step)
        centered = z - self.base.z_median
        rounded = width * (centered / width).round()
        centered = _noisy(centered, width) if self.training else rounded
        mean, scale = self.base.predict(centered + self.base.z_median)
        # In units of the step, an interval of its width is a unit interval.
        likelihood = logistic_likelihood(centered / width, self.base.z_log_scale.exp() / width)
        return mean, scale, -likelihood.log2().sum()


class FixedStep(nn.Module):
    """A variable-rate codec held at one step: to evaluation a codec like any other."""

    def __init__(self, codec: VariableRateCodec, step: float) -> None:
        super().__init__()
        self.codec = codec
        self.step = step
        self.stride = codec.base.stride

    def forward(self, images: Tensor) -> Reconstruction:
        return self.codec(images, self.step)
