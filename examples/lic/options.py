"""What the command lines have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from examples.lic.architectures import ArchitectureError
from examples.lic.bd import CurveError
from examples.lic.bitstream import BitstreamError
from examples.lic.checkpoint import CheckpointError
from examples.lic.coding import TargetError
from examples.lic.hyperprior import ScaleHyperprior
from examples.lic.images import ImageError
from examples.lic.runs import TrainingError
from moo_balance import BalanceError


class OptionError(Exception):
    """Options that do not go together; the message says which, and what to do."""


FAULTS = (OptionError, TargetError, ImageError, CheckpointError, ArchitectureError, BitstreamError,
          CurveError, TrainingError, BalanceError, OSError)  # fmt: skip
"""Errors that end a command with a sentence: everything else is a fault of the program."""

LAMBDAS = [0.0035, 0.013, 0.05]
"""The λ of the commands if none are given."""

MEMORY = 2.0
"""GB of decoded images that are kept."""

METAVARS = {"Path": "PATH", "int": "N", "crop_side": "N", "float": "X", "gradient_bound": "X"}
"""What the help calls a value, by the name of its type."""


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, and has the options that several commands share."""

    def __init__(self, command: str, description: str, *, quick: bool = True) -> None:
        super().__init__(
            prog=f"python -m examples.lic {command}".strip(), description=description,
            allow_abbrev=False,  # or --qui would be --quick without its defaults
        )  # fmt: skip
        some = number(int, below=1025)
        self.add("--threads", "2 help on idle cores, and harm on busy ones", some, 1)
        if quick:
            self.add_argument("--quick", action="store_true",
                              help="to see that it works, in seconds")  # fmt: skip

    def add(self, flag: str, *options: Any, **more: Any) -> None:
        """See :func:`add_argument`."""
        add_argument(self, flag, *options, **more)

    def group(self, title: str) -> Callable[..., None]:
        """The same for arguments that the help has under a title."""
        return partial(add_argument, self.add_argument_group(title))

    def parse(self, arguments: Sequence[str], quick: Mapping[str, Any] = {}) -> argparse.Namespace:
        """The options, with other defaults for ``--quick``; PyTorch gets its threads."""
        if "--quick" in arguments:
            self.set_defaults(**quick)
        chosen = self.parse_args(arguments)
        torch.set_num_threads(chosen.threads)
        return chosen


def add_argument(
    container: Any, flag: str, text: str, kind: Any = str, default: Any = None, **options: Any
) -> None:
    """Add an argument of the type `kind`, with its default after the text if it has one."""
    options.setdefault("metavar", METAVARS.get(kind.__name__, "NAME"))
    help_text = text if default is None else f"{text} (%(default)s)"
    container.add_argument(flag, help=help_text, type=kind, default=default, **options)


def number(
    kind: type[int] | type[float],
    *,
    above: float = 0,
    least: float | None = None,
    below: float = math.inf,
) -> Callable[[str], float]:
    """A parser of numbers strictly between two bounds; with `least` this is the lowest one."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (above < value if least is None else least <= value) or not value < below:
            lower = f"above {above:g}" if least is None else f"at least {least:g}"
            upper = "" if below == math.inf != value else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"should be {lower}{upper}, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's name for it when `text` is no number
    return parse


def gradient_bound(text: str) -> float | str:
    """A parser of bounds above 0, ``inf`` and ``unit``."""
    return text if text == "unit" else math.inf if text == "inf" else number(float)(text)


def crop_side(text: str) -> int:
    """A parser of multiples of the codecs' stride."""
    stride = ScaleHyperprior.stride
    if (value := int(text)) < 1 or value % stride:
        raise argparse.ArgumentTypeError(f"should be a multiple of {stride}, found {text}")
    return value


seed = number(int, least=0, below=10**9)
"""A parser of seeds. Generators take 64 bits, and those of crops are seeded with multiples."""


def device(text: str) -> torch.device:
    """A parser of devices that are there, and hold data, as ``meta`` does not."""
    try:
        there = torch.zeros(1, device=text)
        there.cpu()
        return there.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason})") from None


def describe(error: Exception) -> str:
    """The message for the user: errors of this example are sentences, the system's are not."""
    if not isinstance(error, OSError):
        return str(error)
    reason = f"{error.filename or 'A file'} cannot be written ({error.strerror})."
    return f"{reason} Free some space, or choose another --output."
