"""Rate and distortion on whole images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from examples.lic.codec import MeanScaleHyperprior


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


@torch.no_grad()
def score(model: MeanScaleHyperprior, image: Tensor) -> Score:
    """Code one uint8 image ``[3, H, W]`` of any size; the padding is coded but not counted."""
    height, width = image.shape[-2:]
    padded = pad_to_multiple(image[None].to(torch.float32) / 255, model.stride)
    decoded, bits = model(padded)
    decoded = (decoded[0, :, :height, :width].clamp(0, 1) * 255).round().to(torch.uint8)
    return Score(sum(bits.values()).item() / (height * width), psnr(decoded, image))


def evaluate(model: MeanScaleHyperprior, images: Mapping[str, Tensor]) -> dict[str, Score]:
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
