"""What the command lines have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from examples.lic.bd import CurveError
from examples.lic.bitstream import BitstreamError
from examples.lic.checkpoint import CheckpointError
from examples.lic.compressai_adapter import ArchitectureError
from examples.lic.hyperprior import MeanScaleHyperprior
from examples.lic.images import ImageError
from moo_balance import BalanceError

FAULTS = (ImageError, CheckpointError, ArchitectureError, BitstreamError, CurveError, BalanceError,
          OSError)  # fmt: skip
"""Errors that end a command with a sentence: everything else is a fault of the program."""


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, and has the options that several commands share."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"python -m examples.lic {command}".strip(), description=description)
        self.add("--threads", "2 help on idle cores, and harm on busy ones", type=positive(int),
                 metavar="N", default=1)  # fmt: skip
        self.add_argument("--quick", action="store_true", help="to see that it works, in seconds")

    def add(self, flag: str, text: str, **kwargs: Any) -> None:
        """An argument, with its default after the text if it has one."""
        shown = kwargs.get("default") is not None
        self.add_argument(flag, help=f"{text} (%(default)s)" if shown else text, **kwargs)

    def parse(self, arguments: Sequence[str], quick: Mapping[str, Any]) -> argparse.Namespace:
        """The options, with other defaults for ``--quick``; PyTorch gets its threads."""
        if "--quick" in arguments:
            self.set_defaults(**quick)
        chosen = self.parse_args(arguments)
        torch.set_num_threads(chosen.threads)
        return chosen


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of finite numbers above 0."""

    def parse(text: str) -> float:
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"should be positive, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's name for it when `text` is no number
    return parse


def between_0_and_1(text: str) -> float:
    """A parser of numbers strictly between 0 and 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"should be between 0 and 1, found {text}")
    return value


def gradient_bound(text: str) -> float | str:
    """A parser of bounds above 0, ``inf`` and ``unit``."""
    if text == "unit":
        return text
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"should be positive or unit, found {text}")
    return value


def crop_side(text: str) -> int:
    """A parser of multiples of the codecs' stride."""
    stride = MeanScaleHyperprior.stride
    if (value := int(text)) < 1 or value % stride:
        raise argparse.ArgumentTypeError(f"should be a multiple of {stride}, found {text}")
    return value


def device(text: str) -> torch.device:
    """A parser of devices that are there."""
    try:
        named = torch.device(text)
        available = torch.get_device_module(named).is_available()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason})") from None
    if not available:
        raise argparse.ArgumentTypeError(f"{text} cannot be used, PyTorch finds none here")
    return named


def describe(error: Exception) -> str:
    """The message for the user: errors of this example are sentences, the system's are not."""
    if not isinstance(error, OSError):
        return str(error)
    reason = f"{error.filename or 'A file'} cannot be written ({error.strerror})."
    return f"{reason} Free some space, or choose another --output."
