"""Rate and distortion on whole images: estimated, and by the sizes of real files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor, nn
from torch.nn import functional

MS_SSIM_SIDE = 161
"""Least side of an image that still has pixels for the window at the coarsest of five scales."""


class Score(NamedTuple):
    """A point of the rate-distortion plane."""

    bpp: float
    """Bits per pixel."""
    psnr: float
    """Peak signal-to-noise ratio of the decoded 8-bit image, in dB."""


def psnr(image: Tensor, reference: Tensor) -> float:
    """PSNR in dB between two uint8 images of one shape; infinite when they are equal."""
    mse = (image.to(torch.float64) - reference.to(torch.float64)).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def mean_score(scores: Mapping[str, Score]) -> Score:
    """Plain mean over the images of bits per pixel and of dB."""
    return Score(*(fmean(axis) for axis in zip(*scores.values(), strict=True)))


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides of ``[B, C, H, W]`` are multiples."""
    height, width = images.shape[-2:]
    return functional.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def to_pixels(decoded: Tensor) -> Tensor:
    """A decoded image in 8 bits: uint8, on the CPU."""
    return (decoded.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def reconstruct(model: nn.Module, image: Tensor) -> tuple[Tensor, float]:
    """Pass one uint8 image ``[3, H, W]`` of any size through a codec in evaluation mode.

    Returns:
        The decoded image, float and not clamped, and the estimated bits; the padding is coded too.
    """
    height, width = image.shape[-2:]
    device = next(model.parameters()).device
    padded = pad_to_multiple(image[None].to(device, torch.float32) / 255, model.stride)
    decoded, bits = model(padded)
    return decoded[0, :, :height, :width], sum(bits.values()).item()


def evaluate(model: nn.Module, images: Mapping[str, Tensor]) -> dict[str, Score]:
    """Score uint8 images by estimated rate; the model is left in the mode it was in.

    The rate is the information content of the rounded symbols under the model. Padding is coded,
    and its pixels are not counted.
    """
    was_training, scores = model.training, {}
    model.eval()
    for name, image in images.items():
        decoded, bits = reconstruct(model, image)
        scores[name] = Score(bits / image[0].numel(), psnr(to_pixels(decoded), image))
    model.train(was_training)
    return scores


@dataclass(frozen=True)
class Measurement:
    """The result of coding one image to a file.

    Attributes:
        size: Bytes of the file, header included.
        bpp: Bits of the file per pixel.
        estimated_bpp: The same by the information content of the symbols under the model; None of
            a format that is no codec here.
        psnr: In dB.
        ms_ssim: In [0, 1]; None for an image too small for it.
        exact: Whether the decoded image, not yet rounded to 8 bits, equals the codec's own
            reconstruction. CompressAI's autoregressive codecs decode by symbols and may differ.
            None of a format that is no codec here.
    """

    size: int
    bpp: float
    estimated_bpp: float | None
    psnr: float
    ms_ssim: float | None
    exact: bool | None


def measure(model: nn.Module, coder: Any, image: Callable[[], Tensor], file: Path) -> Measurement:
    """Code one image to a file, read it back, decode it and compare.

    Args:
        model: The codec, in evaluation mode.
        coder: Its coder, from ``architectures.coder_for``.
        image: Loads a uint8 image ``[3, H, W]``.
        file: Receives the bytes.
    """
    reference = image()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(coder.encode(reference))
    data = file.read_bytes()
    decoded = coder.decode_exactly(data)
    own, bits = reconstruct(model, reference)
    pixels, count = to_pixels(decoded), reference[0].numel()
    return Measurement(
        size=len(data),
        bpp=8 * len(data) / count,
        estimated_bpp=bits / count,
        psnr=psnr(pixels, reference),
        ms_ssim=structural_similarity(pixels, reference),
        exact=torch.equal(decoded.clamp(0, 1), own.clamp(0, 1)),
    )


def structural_similarity(image: Tensor, reference: Tensor) -> float | None:
    """MS-SSIM of two uint8 images ``[3, H, W]``; None where a side is below 161 pixels."""
    if min(image.shape[-2:]) < MS_SSIM_SIDE:
        return None
    pair = (x[None].to(torch.float32) for x in (image, reference))
    return ms_ssim(*pair, data_range=255).item()
