"""What the command lines of this folder have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.lic.codec import MeanScaleHyperprior


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, and has the options that several command lines share."""

    def add(self, flag: str, text: str, **kwargs: Any) -> None:
        """An argument, with its default behind the text if it has one."""
        shown = kwargs.get("default") is not None
        self.add_argument(flag, help=f"{text} (%(default)s)" if shown else text, **kwargs)

    def add_images(self) -> None:
        """Folders in place of the bundled photographs."""
        self.add("--images", "train on this folder, not on bundled images", type=Path,
                 metavar="DIR")  # fmt: skip
        self.add("--eval-images", "held out; if not given, the last fifth of --images by name",
                 type=Path, metavar="DIR")  # fmt: skip

    def add_threads(self) -> None:
        """How many threads PyTorch may use."""
        self.add("--threads", "2 help on idle cores, and harm on busy ones", type=positive(int),
                 metavar="N", default=1)  # fmt: skip

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As usual; held-out images need a folder that they were held out from."""
        found = super().parse_args(*args, **kwargs)
        if getattr(found, "eval_images", None) is not None and found.images is None:
            self.error("--eval-images needs --images")
        return found


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
