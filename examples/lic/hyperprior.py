"""A small mean-scale hyperprior in plain PyTorch: transforms and entropy models.

The architecture follows Minnen, Ballé & Toderici (NeurIPS 2018) without the context model, with
GDN1 nonlinearities (Johnston et al. 2019) and, for the hyper-latent, one logistic distribution
per channel, so that no auxiliary loss is needed.

Images ``[B, 3, H, W]`` have values in [0, 1]; their latent ``y`` is ``[B, M, H/16, W/16]`` and
their hyper-latent ``z`` is ``[B, N, H/64, W/64]``. *Symbols* are the integers that are coded: ``y``
minus its predicted mean, ``z`` minus its median, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE_FLOOR = 0.11
"""Smallest standard deviation of the Gaussian model; below it every symbol is zero anyway."""

LIKELIHOOD_FLOOR = 1e-9
"""Smallest probability of a symbol; bounds its cost at 30 bits and keeps the logarithm finite."""


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.bound = bound
        return values.clamp(min=bound)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        return gradient * ((values >= ctx.bound) | (gradient < 0)), None


def lower_bound(values: Tensor, bound: float) -> Tensor:
    """Return ``max(values, bound)``; below it, only updates that would raise a value pass.

    :func:`torch.clamp` masks both, so a clipped parameter would stay clipped for ever.
    """
    return _LowerBound.apply(values, bound)


class GDN1(nn.Module):
    r"""Divisive normalisation :math:`y_i = x_i / (\beta_i + \sum_j \gamma_{ij} |x_j|)`.

    Args:
        channels: Number of channels `i`; both parameters start at the paper's values,
            :math:`\beta = 1` and :math:`\gamma = 0.1\,I`.
        inverse: Multiply instead of dividing, as the synthesis transform does.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(0.1 * torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution is the same sum over channels and keeps the memory layout.
        gamma = lower_bound(self.gamma, 0.0)[:, :, None, None]
        norm = functional.conv2d(x.abs(), gamma, lower_bound(self.beta, 1e-6))
        return x * norm if self.inverse else x / norm


def gaussian_likelihood(centered: Tensor, scale: Tensor) -> Tensor:
    """Probability of the unit interval around ``centered`` under a zero-mean Gaussian."""
    return _interval_likelihood(centered, lower_bound(scale, SCALE_FLOOR), torch.special.ndtr)


def logistic_likelihood(centered: Tensor, scale: Tensor) -> Tensor:
    """Probability of the unit interval around ``centered`` under a zero-median logistic."""
    return _interval_likelihood(centered, scale, torch.sigmoid)


def _interval_likelihood(
    centered: Tensor, scale: Tensor, cdf: Callable[[Tensor], Tensor]
) -> Tensor:
    # By symmetry both ends may be moved to the lower tail, where the difference keeps its digits.
    # The common trick of multiplying by a sign instead is wrong at 0, where the sign is 0.
    distance = centered.abs()
    mass = cdf((0.5 - distance) / scale) - cdf((-0.5 - distance) / scale)
    return lower_bound(mass, LIKELIHOOD_FLOOR)


def add_noise(values: Tensor, width: Tensor | float = 1.0) -> Tensor:
    """Add uniform noise from an interval of `width` around 0, the relaxation of rounding."""
    return values + width * (torch.rand_like(values) - 0.5)


def round_straight_through(values: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return values + (values.round() - values).detach()


class Reconstruction(NamedTuple):
    """The result of one pass through a codec."""

    images: Tensor
    """Decoded images ``[B, 3, H, W]``; not clamped."""
    bits: dict[str, Tensor]
    """Estimated bits of the whole batch by latent, ``"y"`` and ``"z"``; 0-d tensors."""

    def bpp(self) -> Tensor:
        """Estimated bits per pixel of the batch."""
        batch, _, height, width = self.images.shape
        return torch.stack(list(self.bits.values())).sum() / (batch * height * width)


_down = partial(nn.Conv2d, kernel_size=5, stride=2, padding=2)
_up = partial(nn.ConvTranspose2d, kernel_size=5, stride=2, padding=2, output_padding=1)


def _stack(
    layer: Callable[[int, int], nn.Module],
    widths: Sequence[int],
    between: Callable[[int], nn.Module],
) -> list[nn.Module]:
    """Layers from width to width, with a nonlinearity after each except the last."""
    modules = [m for pair in pairwise(widths) for m in (layer(*pair), between(pair[1]))]
    return modules[:-1]


def _leaky(_: int) -> nn.Module:
    return nn.LeakyReLU()


class MeanScaleHyperprior(nn.Module):
    """Image codec whose latent is Gaussian given a mean and scale sent as side information.

    Args:
        channels: Width `N` of the transforms and of the hyper-latent ``z``.
        latent_channels: Width `M` of the latent ``y``.

    In training mode the rate sees uniform noise and the distortion sees straight-through
    rounding; in evaluation mode both see rounded symbols. Image sides must be multiples of
    :attr:`stride`.
    """

    stride = 64

    def __init__(self, channels: int = 24, latent_channels: int = 32) -> None:
        super().__init__()
        n, m = channels, latent_channels
        self.analysis = nn.Sequential(*_stack(_down, (3, n, n, n, m), GDN1))
        self.synthesis = nn.Sequential(*_stack(_up, (m, n, n, n, 3), partial(GDN1, inverse=True)))
        self.hyper_analysis = nn.Sequential(
            nn.Conv2d(m, n, 3, padding=1), _leaky(n), *_stack(_down, (n, n, n), _leaky)
        )
        self.hyper_synthesis = nn.Sequential(
            *_stack(_up, (n, n, n), _leaky), _leaky(n), nn.Conv2d(n, 2 * m, 3, padding=1)
        )
        self.z_median = nn.Parameter(torch.zeros(n, 1, 1))
        self.z_log_scale = nn.Parameter(torch.zeros(n, 1, 1))
        self._initialize()
        # Convolutions on CPU run about a tenth faster in this layout.
        self.to(memory_format=torch.channels_last)

    def _initialize(self) -> None:
        """Keep the variance of signals from layer to layer, and start with a scale of 1.

        PyTorch's default leaves a latent far below the quantisation step, which rounds to zero.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                taps = layer.kernel_size[0] ** 2
                if isinstance(layer, nn.ConvTranspose2d):
                    taps /= layer.stride[0] ** 2
                nn.init.normal_(layer.weight, std=(layer.in_channels * taps) ** -0.5)
                nn.init.zeros_(layer.bias)
        nn.init.ones_(self.hyper_synthesis[-1].bias.chunk(2)[1])  # of the scales

    def analyze(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latent ``y`` and hyper-latent ``z`` of images ``[B, 3, H, W]`` in [0, 1], unrounded."""
        y = self.analysis(images - 0.5)
        return y, self.hyper_analysis(y)

    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of ``y`` given the ``z`` that was sent; the scale is not yet floored."""
        mean, scale = self.hyper_synthesis(z).chunk(2, dim=1)
        return mean, scale

    def synthesize(self, y: Tensor) -> Tensor:
        """Images of the ``y`` that was sent; not clamped."""
        return self.synthesis(y) + 0.5

    def bits(
        self, centered_y: Tensor, scale: Tensor, centered_z: Tensor, z_step: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        """Estimated bits of both latents, each given as its distance from mean or median.

        With a `z_step` the symbols of z are as wide: in units of the step, a unit interval.
        """
        likelihoods = {
            "y": gaussian_likelihood(centered_y, scale),
            "z": logistic_likelihood(centered_z / z_step, self.z_log_scale.exp() / z_step),
        }
        return {name: -likelihood.log2().sum() for name, likelihood in likelihoods.items()}

    def forward(self, images: Tensor) -> Reconstruction:
        y, z = self.analyze(images)
        z = z - self.z_median
        z = add_noise(z) if self.training else z.round()
        mean, scale = self.predict(z + self.z_median)

        centered = round_straight_through(y - mean)
        decoded = self.synthesize(mean + centered)
        symbols = add_noise(y - mean) if self.training else centered
        return Reconstruction(decoded, self.bits(symbols, scale, z))

    # What an entropy coder needs; see bitstream.py.

    def to_symbols(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The symbols of z and y, integers in the dtype of the images."""
        y, z = self.analyze(images)
        z = (z - self.z_median).round()
        mean, _ = self.predict(z + self.z_median)
        return z, (y - mean).round()

    def z_scale(self) -> Tensor:
        """Scale ``[N]`` of the logistic distribution of each channel's symbols."""
        return self.z_log_scale.exp().flatten()

    def y_scale(self, z_symbols: Tensor) -> Tensor:
        """Standard deviations of the symbols of y, in their shape; not floored."""
        return self.predict(z_symbols + self.z_median)[1]

    def from_symbols(self, z_symbols: Tensor, y_symbols: Tensor) -> Tensor:
        """Decoded images, not clamped."""
        mean, _ = self.predict(z_symbols + self.z_median)
        return self.synthesize(mean + y_symbols)
