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
from examples.lic.hyperprior import Codec
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
        lr: Adam's learning rate, for latents in units of the step between two symbols.
        weighting: How rate and λ · distortion are weighted.
        centered: Round y - μ, as SGA+ and the codec do; False rounds y itself, as the original SGA
            does. Its symbols are not integers, and a codec of several steps does not have it.
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
    """What the receiver gets, how it was coded, and what it costs."""

    z: Tensor
    """Symbols of z."""
    y: Tensor
    """Symbols of y: the rounded distance from `mean`, in steps of the codec."""
    mean: Tensor
    scale: Tensor
    bits: Tensor
    """Estimated bits of both together; 0-d."""

    @property
    def symbols(self) -> tuple[Tensor, Tensor]:
        """What :meth:`examples.lic.bitstream.Coder.encode` takes."""
        return self.z, self.y


def quantize(
    model: Codec,
    latents: Latents,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    *,
    centered: bool = True,
) -> Sent:
    """Round the latents, softly or not; for the arguments see :class:`Refinement`."""
    z = rounding((latents.z - model.medians) / model.z_step)
    mean, scale = model.predict(sent_z := model.z_from_symbols(z))
    y = rounding((latents.y - mean) / model.y_step) if centered else rounding(latents.y) - mean
    bits = model.bits(y, scale / model.y_step, sent_z)
    return Sent(z, y, mean, scale, torch.stack(list(bits.values())).sum())


@torch.no_grad()
def encode(model: Codec, image: Tensor) -> Latents:
    """The encoder's latents of a uint8 image ``[3, H, W]`` of any size."""
    return Latents(*model.analyze(pad_to_multiple(_in_unit_range(image), model.stride)))


@torch.no_grad()
def score(model: Codec, sent: Sent, image: Tensor) -> Score:
    """Rate and PSNR, as :func:`examples.lic.evaluation.evaluate` has them, of latents as sent."""
    decoded = to_pixels(_decode(model, sent, image)[0])
    return Score(sent.bits.item() / image[0].numel(), psnr(decoded, image))


def refine(
    model: Codec,
    image: Tensor,
    how: Refinement,
    *,
    lmbda: float,
    seed: int = 0,
    on_step: Callable[[int, Latents], object] = lambda step, latents: None,
) -> Sent:
    """Optimise the latents of `image` for R + λ · 255² · MSE, and round them.

    Args:
        model: A trained codec, for example one step of a variable-rate one; its parameters,
            gradients and mode are not changed.
        image: uint8 ``[3, H, W]`` of any size; the padding is not scored.
        how: See :class:`Refinement`.
        lmbda: λ, not necessarily the one of training.
        seed: For the Gumbel noise: runs with equal seeds see equal noise.
        on_step: Called with number and unrounded latents before each step, and at the end.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(False)
    latents = Latents(*(latent.clone().requires_grad_() for latent in encode(model, image)))
    # Learning rates in units of symbols, which are as far apart as the codec's steps.
    steps = Latents(model.y_step, float(model.z_step))
    groups = [
        {"params": [latent], "lr": how.lr * step}
        for latent, step in zip(latents, steps, strict=True)
    ]
    optimizer = BalancedOptimizer(torch.optim.Adam(groups), how.weighting)

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


def _decode(model: Codec, sent: Sent, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return model.decode(sent.y, sent.mean, sent.scale)[:, :, :height, :width]


def _in_unit_range(image: Tensor) -> Tensor:
    return image[None].to(torch.float32) / 255
