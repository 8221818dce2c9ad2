"""The problem of all these examples: a codec that codes sixteen values by four."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Codec(nn.Module):
    """Returns two losses by name, which differ by three orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, signal: Tensor) -> dict[str, Tensor]:
        code = self.encoder(signal)
        error = self.decoder(code) - signal
        return {
            "rate": torch.log2(1 + code.abs()).sum(1).mean(),
            "distortion": 1000 * error.square().mean(),
        }


def codec(seed: int = 0) -> Codec:
    """A new codec; equal seeds give equal parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Codec()


def signals(count: int = 64) -> Tensor:
    """Random mixtures of four causes, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    causes, mixture, rest = (
        torch.randn(shape, generator=generator) for shape in ((count, 4), (4, 16), (count, 16))
    )
    return causes @ mixture + 0.1 * rest


def batches(size: int = 16) -> DataLoader[Tensor]:
    """The signals in order: four batches, always the same."""
    return DataLoader(signals(), batch_size=size)  # type: ignore[arg-type]
