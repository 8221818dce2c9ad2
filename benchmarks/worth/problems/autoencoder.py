"""An autoencoder of digits with a perceptual and an adversarial loss, as the first stage of VQGAN.

The losses are those of VQGAN (Esser et al. 2021, arXiv 2012.09841): the mean absolute error of a
grey value, the mean squared difference of the features of a trained classifier, and the generator's
loss against a discriminator, which takes its own step for each batch. There, the adversarial weight
is the ratio of two gradient norms at the last layer. Here nothing is quantised, the networks are
perceptrons on 8 × 8 images, and the adversarial loss is the non-saturating one, which is positive.

The score is the Fréchet distance between the features of held-out digits and of their
reconstructions (rFID). The features are those of another classifier.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, mse_loss, softplus

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._digits import split_digits, train_classifier

NAMES = ("reconstruction", "perceptual", "adversarial")
LATENT = 6
HIDDEN = 64
BATCH = 64
DISCRIMINATOR_RATE = 2e-3


class Judges(NamedTuple):
    perceptual: nn.Sequential
    frechet: nn.Sequential


@functools.cache
def judges() -> Judges:
    """The features of two classifiers; global random numbers are left as they are."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        perceptual = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        frechet = nn.Sequential(
            nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 10)
        )
        return Judges(train_classifier(perceptual)[:4], train_classifier(frechet)[:4])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Fréchet distance of two Gaussians with the means and covariances of the rows."""
    means = first.mean(dim=0) - second.mean(dim=0)
    covariances = first.T.cov(), second.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float(means.square().sum() + traces - 2 * roots)


def start(seed: int) -> Training:
    training, validation, test = (part.images.flatten(1) / 16 for part in split_digits())
    features = judges()
    autoencoder = nn.Sequential(
        nn.Linear(64, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, LATENT),
        nn.Linear(LATENT, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 64),
        nn.Sigmoid(),
    )
    discriminator = nn.Sequential(nn.Linear(64, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))
    discriminator_optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=DISCRIMINATOR_RATE, betas=(0.5, 0.9), fused=True
    )
    is_real = torch.cat([torch.ones(BATCH, 1), torch.zeros(BATCH, 1)])

    def draw() -> Tensor:
        images = training[torch.randint(len(training), (BATCH,))]
        with torch.no_grad():
            both = torch.cat([images, autoencoder(images)])
        discriminator.requires_grad_(True)
        discriminator_optimizer.zero_grad()
        binary_cross_entropy_with_logits(discriminator(both), is_real).backward()
        discriminator_optimizer.step()
        discriminator.requires_grad_(False)
        return images

    def losses(images: Tensor) -> dict[str, Tensor]:
        rebuilt = autoencoder(images)
        with torch.no_grad():
            wanted = features.perceptual(images)
        return {
            "reconstruction": l1_loss(rebuilt, images),
            "perceptual": mse_loss(features.perceptual(rebuilt), wanted),
            "adversarial": softplus(-discriminator(rebuilt)).mean(),
        }

    @torch.no_grad()
    def distance(images: Tensor) -> float:
        real, rebuilt = features.frechet(images), features.frechet(autoencoder(images))
        return frechet_distance(real.double(), rebuilt.double())

    return Training(
        list(autoencoder.parameters()),
        draw,
        losses,
        validate=lambda: distance(validation),
        test=lambda: distance(test),
    )


PROBLEM = Problem(
    title="An autoencoder with a perceptual and an adversarial loss",
    score="Fréchet distance of the features of digits and of their reconstructions",
    start=start,
    loss_names=NAMES,
    primary="reconstruction",
    steps=300,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=10.0,
)
