r"""A codec whose quantization step is chosen when it is used.

Variable-rate coding after Kamisli, Racapé & Choi (DCC 2024, arXiv 2402.18930): a gain that
scales the latent before rounding, offsets that move the reconstruction of a symbol away from
the middle of its interval, and a step of its own for the hyper-latent. It is trained at several
λ at once (:class:`examples.lic.losses.Levels`); the paper balances their losses with MGDA.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.lic.gdn import LowerBound
from examples.lic.hyperprior import (
    Codec,
    Reconstruction,
    ScaleHyperprior,
    add_noise,
    round_straight_through,
)

HYPER_STEP_FLOOR = 0.5
"""Smallest step of the hyper-latent."""


def step_for(lmbda: float, highest: float) -> float:
    r"""The step :math:`\Delta = \sqrt{\lambda_{\max} / \lambda}` that suits a λ.

    At high rate a uniform quantizer's error is :math:`\Delta^2 / 12` and its rate falls by a bit
    per doubling; the codec of the highest λ was trained with a step of 1.
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
    does. A network of 205 parameters learns by how much, in steps; no offset at the start. Only
    symbols have offsets, so it is trained where the decoder sees symbols, see
    :data:`examples.lic.losses.NOISY_SHARE`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = _perceptron(2, 12, 12, 1)

    def forward(self, scale: Tensor, gain: float) -> Tensor:
        """Offsets away from zero, in the shape of the floored scales of the gained latent."""
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
        self.floor = LowerBound(HYPER_STEP_FLOOR)

    def forward(self, step: float) -> Tensor:
        """The step of z, 0-d, that belongs to a step of y."""
        bias = self.layers[-1].bias
        with torch.autocast(bias.device.type, enabled=False):
            output = self.layers(torch.full((1,), step, dtype=bias.dtype, device=bias.device))
            return self.floor(functional.softplus(output)).squeeze()


def apply_offset(symbols: Tensor, offset: Tensor) -> Tensor:
    """Move symbols away from zero by their offsets; a zero stays zero."""
    return symbols + symbols.detach().sign() * offset


class VariableRateCodec(nn.Module):
    r"""A fixed-rate codec, used at any step :math:`\Delta = 1/g`.

    .. math::
        q = \mathrm{round}(g (y - \mu)), \qquad
        \hat y = \mu + \frac{q + \mathrm{sign}(q)\, \delta}{g}

    The gain is no parameter: it follows from any λ that is asked for (:func:`step_for`).

    Args:
        base: The codec, trained at `highest`.
        highest: The λ whose step is 1.
        offsets: Reconstruct with :class:`ReconstructionOffset`; else in the middle, δ = 0.
        hyper_step: Round z with the step of :class:`HyperStep`; else with a step of 1.
    """

    def __init__(
        self, base: ScaleHyperprior, highest: float, *, offsets: bool, hyper_step: bool
    ) -> None:
        super().__init__()
        self.base = base
        self.stride = base.stride
        # In the state dict, since a decoder needs it; float64 keeps λ exactly.
        self.register_buffer("highest", torch.tensor(highest, dtype=torch.float64))
        self.offset = ReconstructionOffset() if offsets else None
        self.hyper_step = HyperStep() if hyper_step else None

    def at(self, lmbda: float) -> FixedStep:
        """The codec at one λ; any, whether it was trained or not."""
        return FixedStep(self, step_for(lmbda, self.highest.item()))

    def forward(self, images: Tensor, step: float) -> Reconstruction:
        return self.code(*self.base.analyze(images), step)

    def code(
        self, y: Tensor, z: Tensor, step: float, *, noisy_decoder: bool = False
    ) -> Reconstruction:
        """Quantize latents that :meth:`ScaleHyperprior.analyze` gave, and decode them.

        Separate because training codes the latents of one batch at every step. In training mode
        the rate sees noise and the decoder rounded symbols, straight through; with
        `noisy_decoder` it sees the noise too, and no offset, which only symbols have.
        """
        width, medians = self.z_step(step), self.base.medians
        if self.training:
            z = add_noise(z, width)
        else:
            z = medians + width * ((z - medians) / width).round()
        mean, scale = self.base.predict(z)
        centered, scale = (y - mean) / step, scale / step
        noisy = add_noise(centered) if self.training else centered.round()
        bits = self.base.bits(noisy, scale, z, width)
        residual = noisy
        if not noisy_decoder:
            residual = self.reconstruct(round_straight_through(centered), scale, step)
        return Reconstruction(self.base.synthesize(mean + residual * step), bits)

    def z_step(self, step: float) -> Tensor | float:
        """The step of z, a float or 0-d, that belongs to a step of y."""
        return 1.0 if self.hyper_step is None else self.hyper_step(step)

    def aux_loss(self) -> Tensor:
        """See :meth:`ScaleHyperprior.aux_loss`."""
        return self.base.aux_loss()

    def reconstruct(self, symbols: Tensor, scale: Tensor, step: float) -> Tensor:
        """Symbols of y with their offsets, in units of the step; `scale` in the same units."""
        if self.offset is None:
            return symbols
        scale = self.base.gaussian_conditional.lower_bound_scale(scale)
        return apply_offset(symbols, self.offset(scale, 1 / step))


class FixedStep(Codec):
    """A variable-rate codec at one step: a codec like any other for evaluation and bitstreams."""

    def __init__(self, codec: VariableRateCodec, step: float) -> None:
        super().__init__()
        self.codec = codec
        # In the state dict, so that files of one step are not decoded at another.
        self.register_buffer("step", torch.tensor(step, dtype=torch.float64))
        self.train(codec.training)

    @property
    def y_step(self) -> float:
        return self.step.item()

    @property
    def z_step(self) -> Tensor | float:
        return self.codec.z_step(self.y_step)

    @property
    def medians(self) -> Tensor:
        return self.codec.base.medians

    def forward(self, images: Tensor) -> Reconstruction:
        return self.codec(images, self.y_step)

    def analyze(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`ScaleHyperprior`, as for the methods below."""
        return self.codec.base.analyze(images)

    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.codec.base.predict(z)

    def decode(self, symbols: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        residual = self.codec.reconstruct(symbols, scale / self.y_step, self.y_step)
        return self.codec.base.synthesize(mean + residual * self.y_step)

    def bits(self, symbols: Tensor, scale: Tensor, z: Tensor) -> dict[str, Tensor]:
        return self.codec.base.bits(symbols, scale, z, self.z_step)

    def z_probabilities(self, largest: int) -> Tensor:
        return self.codec.base.entropy_bottleneck.probabilities(largest, self.z_step)
