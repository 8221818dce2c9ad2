"""Validation: scores of whole images, and their rate against that of the crops in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from examples.lic.architectures import build
from examples.lic.evaluation import Score, evaluate, mean_score
from examples.lic.hyperprior import Reconstruction
from examples.lic.validation import Validation, split, validate


class PerImage(nn.Module):
    """Costs some bits a pixel, and some more for each pixel of an edge: down the left or inside."""

    stride = 64

    def __init__(self, inside):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.inside = inside

    def forward(self, images):
        batch, _, height, width = images.shape
        edges = batch * height * (width // 64 - 1) if self.inside else batch * height
        bits = torch.tensor(0.5 * batch * height * width + 8.0 * edges)
        return Reconstruction(images, {"y": bits})


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def test_an_image_is_split_into_the_crops_it_consists_of():
    image = torch.arange(2 * 3 * 5 * 7).reshape(6, 5, 7)
    tiles = split(image, 2)
    assert tiles.shape == (6, 6, 2, 2)
    assert torch.equal(tiles[0], image[:, :2, :2])
    assert torch.equal(tiles[5], image[:, 2:4, 4:6])


# A run whose validation met one of these could not go on.
SMALLER = {"narrow": noise(200, 63), "low": noise(1, 200)}


@pytest.mark.parametrize(
    ("inside", "excess"), [(True, 1 / 4), (False, (0.5 * 128 + 8) / (0.5 * 128 + 16) - 1)]
)
def test_the_excess_is_what_the_whole_costs_more_than_its_crops(inside, excess):
    """With 0.5 bits a pixel, edges between crops cost 8 bits of 64 more; or one of two is saved."""
    images = {"a": noise(70, 128), "b": noise(64, 70), **SMALLER}
    result = validate(PerImage(inside), images, crop=64)
    assert result.excess == pytest.approx(excess / 2 if inside else excess)
    warns = "Whole images cost 12% more bits than the crops they consist of" in str(result)
    assert warns == inside


def test_without_two_crops_there_is_no_excess():
    result = validate(PerImage(inside=True), {"a": noise(64, 70), **SMALLER}, crop=64)
    assert math.isnan(result.excess)
    assert "Whole images" not in str(result)
    assert str(Validation(Score(0.25, 30.0), 0.049)) == "0.250 bpp, 30.00 dB"


@pytest.mark.parametrize("arch", ["mbt2018-mean:8,8", "variable-rate:mbt2018-mean:8,8"])
def test_scores_are_those_of_evaluation_and_the_mode_is_kept(arch):
    codec, images = build(arch).train(), {"a": noise(70, 130), "b": noise(64, 64)}
    result = validate(codec, images, crop=64)
    assert codec.training
    fixed = codec.at(1.0) if arch.startswith("variable") else codec
    assert result.score == mean_score(evaluate(fixed.eval(), images))
    assert abs(result.excess) < 0.5
