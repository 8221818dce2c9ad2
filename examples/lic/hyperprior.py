"""The scale and mean-scale hyperprior in plain PyTorch, compatible with CompressAI.

Parameters and state dict keys are those of CompressAI 1.2.8's ``bmshj2018-hyperprior`` (Ballé et
al., ICLR 2018, arXiv 1802.01436) and ``mbt2018-mean`` (Minnen, Ballé & Toderici, NeurIPS 2018,
arXiv 1809.02736, without the context model), so either side loads what the other one saved.

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

from examples.lic.entropy_bottleneck import EntropyBottleneck, GaussianConditional
from examples.lic.gdn import GDN


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
_same = partial(nn.Conv2d, kernel_size=3, padding=1)


def _stack(
    layer: Callable[[int, int], nn.Module],
    widths: Sequence[int],
    between: Callable[[int], nn.Module],
) -> nn.Sequential:
    """Layers from width to width, with a nonlinearity after each except the last."""
    modules = [m for pair in pairwise(widths) for m in (layer(*pair), between(pair[1]))]
    return nn.Sequential(*modules[:-1])


class Codec(nn.Module):
    """What entropy coding and refinement use of a codec.

    Subclasses have ``medians``, ``analyze``, ``predict``, ``decode``, ``bits`` and
    ``z_probabilities``, see :class:`ScaleHyperprior`.
    """

    stride = 64
    """What image sides must be multiples of."""

    y_step = 1.0
    """Distance between two values of ``y`` that can be sent."""

    z_step: Tensor | float = 1.0
    """The same of ``z``; a float, or a 0-d tensor if it is learned."""

    def z_from_symbols(self, symbols: Tensor) -> Tensor:
        """The z that was sent as `symbols`."""
        return self.medians + self.z_step * symbols

    def to_symbols(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The symbols of z and y, integers in the dtype of the images."""
        y, z = self.analyze(images)
        z = ((z - self.medians) / self.z_step).round()
        mean, _ = self.predict(self.z_from_symbols(z))
        return z, ((y - mean) / self.y_step).round()

    def y_scale(self, z_symbols: Tensor) -> Tensor:
        """Standard deviations of the symbols of y, in their shape; not floored."""
        return self.predict(self.z_from_symbols(z_symbols))[1] / self.y_step

    def from_symbols(self, z_symbols: Tensor, y_symbols: Tensor) -> Tensor:
        """Decoded images, not clamped."""
        return self.decode(y_symbols, *self.predict(self.z_from_symbols(z_symbols)))


class ScaleHyperprior(Codec):
    """Image codec whose latent is Gaussian with mean 0 and a scale sent as side information.

    In training mode rate and decoder see the same uniform noise on ``y``, as in CompressAI, and
    the rate sees noise on ``z``; in evaluation mode both see rounded symbols. Transforms may run
    under :class:`torch.autocast`; latents, probabilities and images are float32 all the same.

    Args:
        channels: Width `N` of the transforms and of the hyper-latent ``z``.
        latent_channels: Width `M` of the latent ``y``.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        n, m = channels, latent_channels
        self.entropy_bottleneck = EntropyBottleneck(n)
        self.g_a = _stack(_down, (3, n, n, n, m), GDN)
        self.g_s = _stack(_up, (m, n, n, n, 3), partial(GDN, inverse=True))
        self.h_a, self.h_s = self._hyper_transforms(n, m)
        self.gaussian_conditional = GaussianConditional()
        # Convolutions on CPU are faster in this layout.
        self.to(memory_format=torch.channels_last)

    def _hyper_transforms(self, n: int, m: int) -> tuple[nn.Sequential, nn.Sequential]:
        analysis = (_same(m, n), nn.ReLU(), _down(n, n), nn.ReLU(), _down(n, n))
        synthesis = (_up(n, n), nn.ReLU(), _up(n, n), nn.ReLU(), _same(n, m), nn.ReLU())
        return nn.Sequential(*analysis), nn.Sequential(*synthesis)

    @property
    def medians(self) -> Tensor:
        """Medians ``[N, 1, 1]`` of z, around which it is rounded."""
        return self.entropy_bottleneck.medians

    def analyze(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latent ``y`` and hyper-latent ``z`` of images ``[B, 3, H, W]`` in [0, 1], unrounded."""
        y = self.g_a(images)
        return _full_precision(y), _full_precision(self.h_a(y.abs()))

    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of ``y`` given the ``z`` that was sent; the scale is not yet floored."""
        scale = _full_precision(self.h_s(z))
        return torch.zeros_like(scale), scale

    def synthesize(self, y: Tensor) -> Tensor:
        """Images of the ``y`` that was sent; not clamped."""
        return _full_precision(self.g_s(y))

    def decode(self, symbols: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Images, not clamped, of symbols of y that were coded with this mean and scale."""
        return self.synthesize(mean + symbols)

    def bits(
        self, symbols: Tensor, scale: Tensor, z: Tensor, z_step: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        """Estimated bits of the symbols of y, noisy or not, and of ``z`` as it was sent.

        `scale` is that of the symbols; `z_step` the distance between two values of z.
        """
        likelihoods = {
            "y": self.gaussian_conditional(symbols, scale),
            "z": self.entropy_bottleneck(z, z_step),
        }
        return {name: -likelihood.log2().sum() for name, likelihood in likelihoods.items()}

    def forward(self, images: Tensor) -> Reconstruction:
        y, z = self.analyze(images)
        if self.training:
            y, z = add_noise(y), add_noise(z)
            mean, scale = self.predict(z)
            return Reconstruction(self.synthesize(y), self.bits(y - mean, scale, z))
        z = self.z_from_symbols((z - self.medians).round())
        mean, scale = self.predict(z)
        symbols = (y - mean).round()
        return Reconstruction(self.decode(symbols, mean, scale), self.bits(symbols, scale, z))

    def aux_loss(self) -> Tensor:
        """The loss of the quantiles, which rate and distortion do not reach; 0-d."""
        return self.entropy_bottleneck.loss()

    def z_probabilities(self, largest: int) -> Tensor:
        """Probabilities ``[N, 2 · largest + 1]`` of the symbols −`largest` … `largest` of z."""
        return self.entropy_bottleneck.probabilities(largest)


class MeanScaleHyperprior(ScaleHyperprior):
    """:class:`ScaleHyperprior` with means that are sent as side information, too."""

    def _hyper_transforms(self, n: int, m: int) -> tuple[nn.Sequential, nn.Sequential]:
        wide, leaky = m * 3 // 2, nn.LeakyReLU
        analysis = (_same(m, n), leaky(), _down(n, n), leaky(), _down(n, n))
        synthesis = (_up(n, m), leaky(), _up(m, wide), leaky(), _same(wide, 2 * m))
        return nn.Sequential(*analysis), nn.Sequential(*synthesis)

    def analyze(self, images: Tensor) -> tuple[Tensor, Tensor]:
        y = self.g_a(images)
        return _full_precision(y), _full_precision(self.h_a(y))

    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        scale, mean = _full_precision(self.h_s(z)).chunk(2, dim=1)
        return mean, scale


def _full_precision(values: Tensor) -> Tensor:
    """The values in float32, if they come from a transform under autocast."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
