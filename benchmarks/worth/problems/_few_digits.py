"""Few of scikit-learn's digits to train on, and many to test on."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor

VALIDATION, TEST = 500, 797  # of 1,797 digits; 500 remain for training


@functools.cache
def images_and_digits() -> tuple[Tensor, Tensor]:
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float()[order] / 16, torch.from_numpy(digits)[order]


def test_set() -> tuple[Tensor, Tensor]:
    images, digits = images_and_digits()
    return images[:TEST], digits[:TEST]


def validation_set() -> tuple[Tensor, Tensor]:
    images, digits = images_and_digits()
    return images[TEST : TEST + VALIDATION], digits[TEST : TEST + VALIDATION]


def draw_training_set(count: int) -> tuple[Tensor, Tensor]:
    """Some of the remaining digits, which the global random numbers choose."""
    images, digits = images_and_digits()
    chosen = TEST + VALIDATION + torch.randperm(len(images) - TEST - VALIDATION)[:count]
    return images[chosen], digits[chosen]


def error_rate(logits: Tensor, digits: Tensor) -> float:
    return float((logits.argmax(1) != digits).float().mean())
