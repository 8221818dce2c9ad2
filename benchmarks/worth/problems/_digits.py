"""scikit-learn's 8 × 8 digits in three parts, and classifiers trained on them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TRAINING, VALIDATION = 800, 400  # of 1,797


class LabelledImages(NamedTuple):
    images: Tensor  # 8 × 8 grey values from 0 to 16
    digit: Tensor


@functools.cache
def split_digits() -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Training, validation and test digits, the same for every seed."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()
    digit = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, validation, test = (
        LabelledImages(images[part], digit[part])
        for part in order.tensor_split((TRAINING, TRAINING + VALIDATION))
    )
    return training, validation, test


def train_classifier(model: nn.Sequential, steps: int = 300) -> nn.Sequential:
    """Train on the training digits, as rows of 64 numbers from 0 to 1, and freeze."""
    data = split_digits()[0]
    images = data.images.flatten(1) / 16
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[index]), data.digit[index]).backward()
        optimizer.step()
    return model.requires_grad_(False)
