"""The random stream of methods that draw numbers: a new one in each step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the host that depends on `seed` and `step` only.

    Draws from it disturb no other random stream, are the same on all ranks and on every kind of
    device, and a resumed run repeats them.
    """
    return torch.Generator("cpu").manual_seed(_mix(seed, step))


def coordinate_generator(
    seed: int, step: int, position: Sequence[int], device: torch.device
) -> torch.Generator:
    """A generator on `device` for the coordinates of one parameter, or of one shard of it.

    As many numbers as a parameter has elements are drawn where it is stored: another kind of
    device draws other ones.
    """
    return torch.Generator(device).manual_seed(reduce(_mix, position, _mix(seed, step)))


def _mix(seed: int, number: int) -> int:
    # Multiples of an odd number are all different modulo 2^63, and consecutive ones lie far apart.
    return (seed + number * _GOLDEN_RATIO_64) % 2**63
