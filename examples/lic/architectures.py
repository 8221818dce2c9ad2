"""The codecs that can be trained, by the names that the command line knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from examples.lic import compressai_codecs
from examples.lic.codec import MeanScaleHyperprior
from examples.lic.compressai_codecs import PREFIX, ArchitectureError

OWN: dict[str, Callable[[], MeanScaleHyperprior]] = {
    "small": partial(MeanScaleHyperprior, 24, 32),
    "base": partial(MeanScaleHyperprior, 32, 48),
    "large": partial(MeanScaleHyperprior, 64, 96),
    "full": partial(MeanScaleHyperprior, 128, 192),  # the widths of the literature at low rates
}


def build(name: str) -> nn.Module:
    """A fresh codec.

    Raises:
        ArchitectureError: No such name, or one of CompressAI's without CompressAI.
    """
    if name in OWN:
        return OWN[name]()
    if name.startswith(PREFIX):
        return compressai_codecs.build(name)
    raise ArchitectureError(
        f"--arch should be {', '.join(OWN)} or {PREFIX}MODEL. Found {name}. Choose one of these."
    )
