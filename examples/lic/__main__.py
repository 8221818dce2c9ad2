"""Learned image compression with balanced losses.

python -m examples.lic             fine-tune with balanced losses, compare; about five minutes
python -m examples.lic encode      code an image to a file, at a rate or with a PSNR
python -m examples.lic decode      decode it to PNG
python -m examples.lic refine      code an image with refined latents
python -m examples.lic train       train a codec with any weighting
python -m examples.lic export      write codec files from checkpoints
python -m examples.lic evaluate    code images to files with trained codecs, compare curves

Each has --help; demo (the first one), train and evaluate have --quick, to see that they work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from examples.lic import options

COMMANDS = ("demo", "encode", "decode", "refine", "train", "export", "evaluate")


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code."""
    try:
        return _run(*(arguments or ["demo"]))
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough of it
        return _leave_pipe()
    except options.FAULTS as error:
        print(f"error: {options.describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _run(name: str, *rest: str) -> int:
    if name.startswith("-") and name not in ("-h", "--help"):
        name, rest = "demo", (name, *rest)
    try:
        if name in COMMANDS:
            return import_module(f"examples.lic.{name}").main(rest)
        print(__doc__, file=sys.stdout if name.startswith("-") else sys.stderr)
        return 0 if name.startswith("-") else 2
    finally:
        sys.stdout.flush()


def _leave_pipe() -> int:
    """Send the rest of the output nowhere; returns the exit code of a process that SIGPIPE ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


if __name__ == "__main__":
    # Names of files may have characters that the terminal has not.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
