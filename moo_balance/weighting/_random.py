"""The random stream of methods that draw numbers: a new one in each step."""

from __future__ import annotations

import torch

_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the host that depends on `seed` and `step` only.

    Draws from it disturb no other random stream, are the same on all ranks and on every kind of
    device, and a resumed run repeats them.
    """
    # Multiples of an odd number are all different modulo 2^63, and consecutive ones lie far apart.
    mixed = (seed + step * _GOLDEN_RATIO_64) % 2**63
    return torch.Generator("cpu").manual_seed(mixed)
