"""Scores of whole images during training, and whether crops have taught the codec to code them.

What crops do not show a codec does not learn: in one of 64 pixels the hyper-latent is a single
position, and the hyper-synthesis never sees a neighbour. Its rate in training is then right, and
that on whole images is several times higher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.lic.evaluation import Score, evaluate, mean_score
from examples.lic.variable_rate import VariableRateCodec

EXCESS = 0.05
"""From this on the excess of the rate of whole images over that of their crops is worth a word.

It is mostly below 0 in a trained codec: crops do without what lies around them."""


@dataclass(frozen=True)
class Validation:
    """Scores on whole images.

    Attributes:
        score: Mean over the images, by estimated rate; of a variable-rate codec at its highest λ.
        excess: The rate of images over that of all crops they consist of, minus 1; NaN if none has
            two crops.
    """

    score: Score
    excess: float

    def __str__(self) -> str:
        text = f"{self.score.bpp:.3f} bpp, {self.score.psnr:.2f} dB"
        if self.excess <= EXCESS or self.excess != self.excess:
            return text
        return (
            f"{text}. Whole images cost {self.excess:.0%} more bits than the crops they consist "
            "of: choose a larger --crop."
        )


def validate(model: nn.Module, images: Mapping[str, Tensor], crop: int) -> Validation:
    """Score uint8 images ``[3, H, W]``; the model is left in the mode it was in.

    Args:
        model: The codec.
        images: By name, at least one.
        crop: Side of the crops that it is trained on.
    """
    codec = model.at(model.highest.item()) if isinstance(model, VariableRateCodec) else model
    score = mean_score(evaluate(codec, images))
    was_training, whole, apart = codec.training, 0.0, 0.0
    codec.eval()
    for image in images.values():
        rows, columns = (side // crop for side in image.shape[-2:])
        if rows * columns > 1:
            whole += _bits(codec, image[None, :, : rows * crop, : columns * crop])
            apart += _bits(codec, split(image, crop))
    codec.train(was_training)
    return Validation(score, whole / apart - 1 if apart else float("nan"))


def split(image: Tensor, side: int) -> Tensor:
    """The squares ``[n, C, side, side]`` of ``[C, H, W]`` from its upper left corner on.

    There is at least one.
    """
    tiles = image.unfold(1, side, side).unfold(2, side, side)  # [C, rows, columns, side, side]
    return tiles.flatten(1, 2).transpose(0, 1)


@torch.no_grad()
def _bits(codec: nn.Module, images: Tensor) -> float:
    device = next(codec.parameters()).device
    pixels = images.to(device, torch.float32) / 255
    return sum(codec(pixels).bits.values()).item()
