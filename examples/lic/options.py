"""What the command lines of this folder have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from examples.lic.codec import MeanScaleHyperprior


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of numbers above 0."""

    def parse(text: str) -> float:
        if not 0 < (value := kind(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"should be positive, found {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it when `text` is no number
    return parse


def between_0_and_1(text: str) -> float:
    """A parser of numbers strictly between 0 and 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"should be between 0 and 1, found {text}")
    return value


def crop_side(text: str) -> int:
    """A parser of what the codecs' strides divide."""
    stride = MeanScaleHyperprior.stride
    if (value := int(text)) < 1 or value % stride:
        raise argparse.ArgumentTypeError(f"should be a multiple of {stride}, found {text}")
    return value


def device(text: str) -> torch.device:
    """A parser of devices that are there."""
    try:
        found = torch.device(text)
        available = torch.get_device_module(found).is_available()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason})") from None
    if not available:
        raise argparse.ArgumentTypeError(f"{text} cannot be used, PyTorch finds none here")
    return found


def sentence(error: Exception) -> str:
    """What to tell the user: errors of this example are sentences, those of the system are not."""
    if not isinstance(error, OSError):
        return str(error)
    return (
        f"{error.filename or 'A file'} cannot be written ({error.strerror}). Free some space, or "
        "choose another --output."
    )
