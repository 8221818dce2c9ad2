"""Rate and distortion on whole images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Score(NamedTuple):
    """A point of the rate-distortion plane."""

    bpp: float
    """Estimated bits per pixel: information content of the rounded symbols under the model."""
    psnr: float
    """Peak signal-to-noise ratio of the decoded 8-bit image, in dB."""


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides of ``[B, C, H, W]`` are multiples."""
    height, width = images.shape[-2:]
    return functional.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def psnr(image: Tensor, reference: Tensor) -> float:
    """PSNR in dB between two uint8 images of one shape; infinite when they are equal."""
    mse = (image.to(torch.float64) - reference.to(torch.float64)).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def to_pixels(decoded: Tensor) -> Tensor:
    """A decoded image as it is shown: uint8, on the CPU."""
    return (decoded.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def reconstruct(model: nn.Module, image: Tensor) -> tuple[Tensor, float]:
    """What a codec in evaluation mode makes of one uint8 image ``[3, H, W]`` of any size.

    Returns:
        The decoded image, float and not clamped, and the estimated bits; the padding is coded too.
    """
    height, width = image.shape[-2:]
    device = next(model.parameters()).device
    padded = pad_to_multiple(image[None].to(device, torch.float32) / 255, model.stride)
    decoded, bits = model(padded)
    return decoded[0, :, :height, :width], sum(bits.values()).item()


def score(model: nn.Module, image: Tensor) -> Score:
    """Code one uint8 image; the padding is coded, and its pixels are not counted."""
    decoded, bits = reconstruct(model, image)
    return Score(bits / image[0].numel(), psnr(to_pixels(decoded), image))


def evaluate(model: nn.Module, images: Mapping[str, Tensor]) -> dict[str, Score]:
    """Score every image with rounded symbols, and leave the model in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        return {name: score(model, image) for name, image in images.items()}
    finally:
        model.train(was_training)


def mean_score(scores: Mapping[str, Score]) -> Score:
    """Plain mean over the images of bits per pixel and of dB."""
    return Score(fmean(s.bpp for s in scores.values()), fmean(s.psnr for s in scores.values()))
