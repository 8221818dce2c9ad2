"""What the command lines have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from examples.lic.architectures import ArchitectureError
from examples.lic.bd import CurveError
from examples.lic.bitstream import BitstreamError
from examples.lic.checkpoint import CheckpointError
from examples.lic.hyperprior import MeanScaleHyperprior
from examples.lic.images import ImageError
from moo_balance import BalanceError

FAULTS = (ImageError, CheckpointError, ArchitectureError, BitstreamError, CurveError, BalanceError,
          OSError)  # fmt: skip
"""Errors that end a command with a sentence: everything else is a fault of the program."""

LAMBDAS = [0.0035, 0.013, 0.05]
"""The λ of the commands if none are given."""

METAVARS = {"Path": "PATH", "int": "N", "crop_side": "N", "float": "X", "gradient_bound": "X"}
"""What the help calls a value, by the name of its type."""


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, and has the options that several commands share."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"python -m examples.lic {command}".strip(), description=description)
        self.add("--threads", "2 help on idle cores, and harm on busy ones", number(int), 1)
        self.add_argument("--quick", action="store_true", help="to see that it works, in seconds")

    def add(
        self, flag: str, text: str, kind: Any = str, default: Any = None, **options: Any
    ) -> None:
        """An argument of the type `kind`, with its default after the text if it has one."""
        options.setdefault("metavar", METAVARS.get(kind.__name__, "NAME"))
        help_text = text if default is None else f"{text} (%(default)s)"
        self.add_argument(flag, help=help_text, type=kind, default=default, **options)

    def parse(self, arguments: Sequence[str], quick: Mapping[str, Any]) -> argparse.Namespace:
        """The options, with other defaults for ``--quick``; PyTorch gets its threads."""
        if "--quick" in arguments:
            self.set_defaults(**quick)
        chosen = self.parse_args(arguments)
        torch.set_num_threads(chosen.threads)
        return chosen


def number(
    kind: type[int] | type[float], *, above: float = 0, below: float = math.inf
) -> Callable[[str], float]:
    """A parser of numbers strictly between two bounds."""

    def parse(text: str) -> float:
        if not above < (value := kind(text)) < below:
            limit = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"should be above {above:g}{limit}, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's name for it when `text` is no number
    return parse


def gradient_bound(text: str) -> float | str:
    """A parser of bounds above 0, ``inf`` and ``unit``."""
    return text if text == "unit" else math.inf if text == "inf" else number(float)(text)


def crop_side(text: str) -> int:
    """A parser of multiples of the codecs' stride."""
    stride = MeanScaleHyperprior.stride
    if (value := int(text)) < 1 or value % stride:
        raise argparse.ArgumentTypeError(f"should be a multiple of {stride}, found {text}")
    return value


def device(text: str) -> torch.device:
    """A parser of devices that are there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason})") from None


def describe(error: Exception) -> str:
    """The message for the user: errors of this example are sentences, the system's are not."""
    if not isinstance(error, OSError):
        return str(error)
    reason = f"{error.filename or 'A file'} cannot be written ({error.strerror})."
    return f"{reason} Free some space, or choose another --output."
