"""Refine the latents of one image while the network stays as it is (SGA, SGA+; see rounding.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from examples.lic.evaluation import Score, pad_to_multiple, psnr, to_pixels
from examples.lic.hyperprior import MeanScaleHyperprior
from examples.lic.rounding import PUBLISHED_STEPS, SGA_PLUS, Gumbel
from moo_balance import BalancedOptimizer, Sum
from moo_balance.weighting import Weighting

Relaxation: TypeAlias = Callable[[Tensor, int], Tensor]
"""A differentiable replacement of rounding at a given step."""


@dataclass(frozen=True)
class Refinement:
    """How to refine; the defaults are the paper's.

    Args:
        relaxation: What replaces rounding.
        steps: Iterations of Adam; 0 leaves the encoder's latents.
        lr: Adam's learning rate.
        weighting: How rate and λ · distortion are weighted.
        centered: Round y - μ, as SGA+ does and as the codec is trained; False rounds y itself, as
            the original SGA does.
    """

    relaxation: Relaxation = field(default_factory=lambda: Gumbel(SGA_PLUS))
    steps: int = PUBLISHED_STEPS
    lr: float = 5e-3
    weighting: Weighting = field(default_factory=Sum)
    centered: bool = True


class Latents(NamedTuple):
    """The latents of one image, not yet rounded."""

    y: Tensor
    z: Tensor


class Sent(NamedTuple):
    """What the receiver gets: the rounded latents, and what they cost."""

    y: Tensor
    z: Tensor
    bits: Tensor
    """Estimated bits of both together; 0-d."""


def quantize(
    model: MeanScaleHyperprior,
    latents: Latents,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    *,
    centered: bool = True,
) -> Sent:
    """Round the latents, softly or not; for the arguments see :class:`Refinement`."""
    symbols = rounding(latents.z - model.z_median)
    z = symbols + model.z_median
    mean, scale = model.predict(z)
    y = mean + rounding(latents.y - mean) if centered else rounding(latents.y)
    return Sent(y, z, torch.stack(list(model.bits(y - mean, scale, symbols).values())).sum())


@torch.no_grad()
def encode(model: MeanScaleHyperprior, image: Tensor) -> Latents:
    """The encoder's latents of a uint8 image ``[3, H, W]`` of any size."""
    return Latents(*model.analyze(pad_to_multiple(_in_unit_range(image), model.stride)))


@torch.no_grad()
def score(model: MeanScaleHyperprior, sent: Sent, image: Tensor) -> Score:
    """Rate and PSNR, as :func:`examples.lic.evaluation.evaluate` has them, of latents as sent."""
    decoded = to_pixels(_decode(model, sent, image)[0])
    return Score(sent.bits.item() / image[0].numel(), psnr(decoded, image))


def refine(
    model: MeanScaleHyperprior,
    image: Tensor,
    how: Refinement,
    *,
    lmbda: float,
    seed: int = 0,
    on_step: Callable[[int, Latents], object] = lambda step, latents: None,
) -> Sent:
    """Optimise the latents of `image` for R + λ · 255² · MSE, and round them.

    Args:
        model: A trained codec; its parameters, gradients and mode are not changed.
        image: uint8 ``[3, H, W]`` of any size; the padding is not scored.
        how: See :class:`Refinement`.
        lmbda: λ, not necessarily the one of training.
        seed: For the Gumbel noise: runs with equal seeds see equal noise.
        on_step: Called with number and unrounded latents before each step, and at the end.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(False)
    latents = Latents(*(latent.clone().requires_grad_() for latent in encode(model, image)))
    optimizer = BalancedOptimizer(torch.optim.Adam(latents, lr=how.lr), how.weighting)

    def losses(step: int) -> dict[str, Tensor]:
        sent = quantize(model, latents, partial(how.relaxation, step=step), centered=how.centered)
        mse = functional.mse_loss(_decode(model, sent, image), _in_unit_range(image))
        return {"rate": sent.bits / image[0].numel(), "distortion": lmbda * 255**2 * mse}

    for step in range(how.steps):
        on_step(step, latents)
        optimizer.zero_grad()
        # A closure, so that a method that observes the step can evaluate the losses after it.
        optimizer.backward(partial(losses, step))
        optimizer.step()
    on_step(how.steps, latents)
    with torch.no_grad():
        return quantize(model, latents, centered=how.centered)


def _decode(model: MeanScaleHyperprior, sent: Sent, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return model.synthesize(sent.y)[:, :, :height, :width]


def _in_unit_range(image: Tensor) -> Tensor:
    return image[None].to(torch.float32) / 255
