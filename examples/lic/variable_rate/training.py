"""Post-training: one batch at every λ, their losses balanced by one optimizer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from examples.lic.training import Recipe, Trace, normalize_gradient
from examples.lic.variable_rate.model import VariableRateCodec, step_for
from moo_balance import BalancedOptimizer, StepMetrics
from moo_balance.weighting import Weighting

Choice = Callable[[Sequence[float], random.Random], Sequence[float]]
"""Which of the levels a step takes."""

NOISY_SHARE = 0.5
"""The part of post-training in which the decoder sees noise; after it, rounded symbols."""


def name_of(lmbda: float) -> str:
    """What a level's loss is called."""
    return f"λ={lmbda:g}"


def level_losses(
    model: VariableRateCodec, images: Tensor, lambdas: Sequence[float], *, noisy_decoder: bool
) -> dict[str, Tensor]:
    """R + λ · 255² · MSE of one batch at each λ; the images are analysed once."""
    y, z = model.base.analyze(images)
    losses = {}
    for lmbda in lambdas:
        step = step_for(lmbda, model.highest)
        output = model.code(y, z, step, noisy_decoder=noisy_decoder)
        mse = functional.mse_loss(output.images, images)
        losses[name_of(lmbda)] = output.bpp() + lmbda * 255**2 * mse
    return losses


def every_level(lambdas: Sequence[float], draw: random.Random) -> Sequence[float]:
    """All λ in each step."""
    return lambdas


def random_level(lambdas: Sequence[float], draw: random.Random) -> Sequence[float]:
    """One λ in each step, drawn afresh."""
    return [draw.choice(lambdas)]


def post_train(
    model: VariableRateCodec,
    crops: Iterator[Tensor],
    lambdas: Sequence[float],
    weighting: Weighting,
    recipe: Recipe,
    *,
    seed: int,
    choose: Choice = every_level,
    on_step: Callable[[StepMetrics], object] = lambda balance: None,
) -> Trace:
    """Train a codec that has learned its highest λ for the others too, in place.

    Args:
        model: The codec.
        crops: Batches of images, one of which each step takes.
        lambdas: The levels. All share all parameters: each pulls at every one of them.
        weighting: How the losses of a step's levels are put together.
        recipe: Steps, learning rate and when it falls. The decoder sees noise in the first half
            (the second stage of three) and rounded symbols in the other (the third).
        seed: For the quantisation noise, and for what is chosen.
        choose: The levels of each step: :func:`every_level` or :func:`random_level`.
        on_step: Called after each step with its losses and weights.
    """
    torch.manual_seed(seed)
    model.train()
    trace = Trace()
    draw = random.Random(seed)
    adam = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    optimizer = BalancedOptimizer(adam, weighting, loss_names=[name_of(lmbda) for lmbda in lambdas])
    schedule = recipe.schedule.begin(optimizer, recipe.steps)

    for index in range(recipe.steps):
        images, chosen = next(crops), choose(lambdas, draw)
        noisy = index < NOISY_SHARE * recipe.steps
        start = time.perf_counter()
        optimizer.zero_grad()
        optimizer.backward(level_losses(model, images, chosen, noisy_decoder=noisy))
        normalize_gradient(model.parameters())
        optimizer.step()
        trace.seconds.append(time.perf_counter() - start)
        schedule.step(sum(optimizer.metrics.losses.values()) / len(chosen))
        trace.history.append(optimizer.metrics)
        on_step(optimizer.metrics)
    return trace
