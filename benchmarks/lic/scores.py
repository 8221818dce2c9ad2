"""Scores as one figure, and the parts of images that are scored."""

from __future__ import annotations

from torch import Tensor

from examples.lic.evaluation import Score


def rate_distortion_loss(score: Score, lmbda: float) -> float:
    """R + λ · 255² · MSE of a score, with the MSE that its PSNR stands for."""
    bpp, decibels = score
    return bpp + lmbda * 255**2 * 10 ** (-decibels / 10)


def crop_center(image: Tensor, side: int) -> Tensor:
    """The central square of ``[C, H, W]``, or as much of it as there is."""
    height, width = image.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return image[:, top : top + side, left : left + side]
