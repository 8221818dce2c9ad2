"""True sizes: every image is coded to a file, read back, decoded and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor, nn

from examples.lic.bitstream import Coder
from examples.lic.codec import MeanScaleHyperprior
from examples.lic.compressai_codecs import CompressAICodec, CompressAICoder
from examples.lic.evaluation import Score, psnr, reconstruct, to_pixels

MS_SSIM_SIDE = 161
"""Least side of an image that still has pixels for the window at the coarsest of five scales."""


class ImageCoder(Protocol):
    """From images to bytes and back."""

    def encode(self, image: Tensor) -> bytes: ...

    def decode_exactly(self, data: bytes) -> Tensor: ...


CODERS: dict[type[nn.Module], Callable[..., ImageCoder]] = {
    MeanScaleHyperprior: Coder,
    CompressAICodec: CompressAICoder,
}


@dataclass(frozen=True)
class Measurement:
    """What coding one image showed."""

    pixels: int
    size: int
    """Bytes of the file, header included."""
    estimated_bits: float
    """Information content of the symbols under the model."""
    psnr: float
    ms_ssim: float | None
    """None for an image too small for it."""
    exact: bool
    """Is what was decoded bit by bit what the codec itself reconstructs, before it is rounded to
    8 bits? CompressAI's autoregressive codecs decode symbol by symbol and need not."""

    @property
    def bpp(self) -> float:
        """Bits of the file for each pixel."""
        return 8 * self.size / self.pixels

    @property
    def estimated_bpp(self) -> float:
        """The same by the estimate."""
        return self.estimated_bits / self.pixels

    @property
    def score(self) -> Score:
        """As a point of the rate-distortion plane, by true size."""
        return Score(self.bpp, self.psnr)


def measure(
    model: nn.Module, images: Mapping[str, Callable[[], Tensor]], folder: Path
) -> dict[str, Measurement]:
    """Code every image with a codec in evaluation mode.

    Args:
        model: The codec.
        images: By name, uint8 ``[3, H, W]`` each, loaded when their turn comes.
        folder: Receives the files.

    Raises:
        BitstreamError: An image cannot be coded.
    """
    coder = CODERS[type(model)](model)
    return {
        name: _measure(model, coder, load(), folder / f"{name}.bin")
        for name, load in images.items()
    }


def _measure(model: nn.Module, coder: ImageCoder, image: Tensor, file: Path) -> Measurement:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(coder.encode(image))
    data = file.read_bytes()
    decoded = coder.decode_exactly(data)
    own, bits = reconstruct(model, image)
    pixels = to_pixels(decoded)
    return Measurement(
        pixels=image[0].numel(),
        size=len(data),
        estimated_bits=bits,
        psnr=psnr(pixels, image),
        ms_ssim=structural_similarity(pixels, image),
        exact=torch.equal(decoded.clamp(0, 1), own.clamp(0, 1)),
    )


def structural_similarity(image: Tensor, reference: Tensor) -> float | None:
    """MS-SSIM of two uint8 images ``[3, H, W]``; None where a side is below 161 pixels."""
    if min(image.shape[-2:]) < MS_SSIM_SIDE:
        return None
    pair = (x[None].to(torch.float32) for x in (image, reference))
    return ms_ssim(*pair, data_range=255).item()


@dataclass(frozen=True)
class Means:
    """Plain means over images."""

    bpp: float
    estimated_bpp: float
    psnr: float
    ms_ssim: float | None
    """Over the images that are large enough; None if none is."""


def means(measurements: Mapping[str, Measurement]) -> Means:
    """Average over the images."""
    rows = list(measurements.values())
    similar = [row.ms_ssim for row in rows if row.ms_ssim is not None]
    return Means(
        fmean(row.bpp for row in rows),
        fmean(row.estimated_bpp for row in rows),
        fmean(row.psnr for row in rows),
        fmean(similar) if similar else None,
    )
