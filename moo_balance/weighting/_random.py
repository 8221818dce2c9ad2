"""The random stream of methods that draw numbers: a new one in each step."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the host that depends on `seed` and `step` only.

    Draws from it disturb no other random stream, are the same on all ranks and on every kind of
    device, and a resumed run repeats them.
    """
    return torch.Generator("cpu").manual_seed(_mix(seed, step))


def draw_coordinates(
    seed: int, step: int, position: int, shape: torch.Size, like: Tensor
) -> Tensor:
    """A uniform random number in [0, 1) for each element of a parameter.

    As many numbers as a parameter has elements are drawn where it is stored: another kind of device
    draws other ones.

    Args:
        seed: As for :func:`step_generator`.
        step: Likewise.
        position: Which of the parameters it is.
        shape: Its shape.
        like: Says dtype and device.
    """
    number = _mix(_scramble(_mix(seed, step)), position)
    generator = torch.Generator(like.device).manual_seed(number)
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _mix(seed: int, number: int) -> int:
    # Multiples of an odd number are all different modulo 2^63, and consecutive ones lie far apart.
    return (seed + number * _GOLDEN_RATIO_64) % 2**63


def _scramble(number: int) -> int:
    """A one-to-one function on 64 bits without order.

    Two numbers that are mixed in one after another would only enter by their sum. These are the
    last steps of SplitMix64 (Steele, Lea & Flood 2014).
    """
    number = (number + _GOLDEN_RATIO_64) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)
