"""The codecs by name, as the command line and checkpoints have them."""

from __future__ import annotations

import re

from torch import nn

from examples.lic import compressai_adapter
from examples.lic.bitstream import Coder
from examples.lic.compressai_adapter import (
    PREFIX,
    ArchitectureError,
    CompressAICodec,
    CompressAICoder,
)
from examples.lic.hyperprior import MeanScaleHyperprior
from examples.lic.variable_rate import VariableRateCodec

WIDTHS = {"small": (24, 32), "base": (32, 48), "large": (64, 96), "full": (128, 192)}
"""Channels of the transforms and of the latent; other widths are written like ``24,32``."""

VARIABLE_RATE = {
    "gains": (False, False),
    "gains+offsets": (True, False),
    "variable-rate": (True, True),
}
"""Whether a variable-rate codec has reconstruction offsets, and a step of its own for z."""

NAMES = f"{', '.join(WIDTHS)}, widths like 24,32, {', '.join(f'{v}:NAME' for v in VARIABLE_RATE)}"


def build(name: str, *, highest: float = 1.0) -> nn.Module:
    """A fresh codec.

    Args:
        name: ``small``, ``24,32``, ``variable-rate:small``, ``compressai:mbt2018-mean@3``, …
        highest: λ at which a variable-rate codec has a step of 1; not used by the others.

    Raises:
        ArchitectureError: No such name, or one of CompressAI's without CompressAI.
    """
    kind, _, base = name.partition(":")
    if name.startswith(PREFIX):
        return compressai_adapter.build(name)
    if kind in VARIABLE_RATE:
        offsets, hyper_step = VARIABLE_RATE[kind]
        return VariableRateCodec(_hyperprior(base), highest, offsets=offsets, hyper_step=hyper_step)
    return _hyperprior(name)


def base_of(name: str) -> str:
    """The fixed-rate codec in a variable-rate one; of any other, its own name."""
    kind, _, base = name.partition(":")
    return base if kind in VARIABLE_RATE else name


def _hyperprior(name: str) -> MeanScaleHyperprior:
    if re.fullmatch(r"[1-9]\d*,[1-9]\d*", name):
        return MeanScaleHyperprior(*map(int, name.split(",")))
    if name in WIDTHS:
        return MeanScaleHyperprior(*WIDTHS[name])
    raise ArchitectureError(
        f"--arch should be {NAMES} or {PREFIX}MODEL. Found {name}. Choose one of these."
    )


def coder_for(model: nn.Module) -> Coder | CompressAICoder:
    """What codes images with `model`, a fixed-rate codec or one step of a variable-rate one."""
    return CompressAICoder(model) if isinstance(model, CompressAICodec) else Coder(model)
