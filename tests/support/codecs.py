"""Small image codecs that behave like trained ones."""

from __future__ import annotations

import torch

from examples.lic.hyperprior import MeanScaleHyperprior


def random_codec(
    channels: int = 8, latent_channels: int = 8, *, spread: float = 1.0, seed: int = 0
) -> MeanScaleHyperprior:
    """A codec with random weights, whose symbols are not all 0 as those of a fresh one are.

    Those of y are `spread` times as wide as a few units, and the scales of y are near that.
    """
    torch.manual_seed(seed)
    model = MeanScaleHyperprior(channels, latent_channels)
    with torch.no_grad():
        model.g_a[-1].weight *= 20 * spread
        model.g_s[-1].weight *= 10
        model.g_s[-1].bias.fill_(0.5)
        model.h_a[-1].weight *= 30
        model.h_s[-1].weight *= 3
        model.h_s[-1].bias[:latent_channels] += 2 * spread**0.5
        model.entropy_bottleneck.quantiles[:, 0, 1].uniform_(-1, 1)
    return model
