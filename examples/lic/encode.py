"""Code an image to a file, with one codec or the best suited of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.lic import options
from examples.lic.checkpoint import write_atomically
from examples.lic.coding import PRETRAINED, Coded, choose, load_codecs
from examples.lic.images import read_image


def main(arguments: Sequence[str]) -> int:
    """Encode; returns the exit code."""
    parser = options.Parser("encode", "Code an image to a file.", quick=False)
    parser.add("image", "to encode, of any size", Path, metavar="IMAGE")
    parser.add("output", "the file to write", Path, metavar="OUT")
    add_target(parser)
    chosen = parser.parse(arguments)
    check_output(chosen.output, [chosen.image, *(chosen.codec or ())])
    codecs = load_codecs(chosen.codec or [PRETRAINED], chosen.device)
    image = read_image(chosen.image)
    coded = choose(image, codecs, bpp=chosen.bpp, decibels=chosen.psnr)
    write(chosen.output, coded.data)
    print(describe(chosen.output, coded))
    return 0


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is no file, or one of the files that are read."""
    if path.exists() and not path.is_file():
        raise options.OptionError(f"OUT should be a file. Found {path}. Choose another OUT.")
    inside = [p for given in inputs for p in (given.glob("*") if given.is_dir() else [given])]
    if path.exists() and any(p.exists() and path.samefile(p) for p in inside):
        raise options.OptionError(
            f"OUT should not be a file that is read. Found {path}. Choose another OUT."
        )


def write(path: Path, data: bytes) -> None:
    """Write what a command was asked for."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise options.OptionError(
            f"{path} cannot be written ({error.strerror}). Free some space, or choose another OUT."
        ) from None


def add_codecs(parser: options.Parser) -> None:
    """The options that name codecs, and where they run."""
    text = "checkpoints or codec files, or folders of them (those that come with the example)"
    parser.add("--codec", text, Path, nargs="+")
    parser.add("--device", "cpu, cuda, ...", options.device, "cpu")


def add_target(parser: options.Parser) -> None:
    """The options by which a codec and its λ are chosen."""
    add_codecs(parser)
    target = parser.add_mutually_exclusive_group()
    positive = options.number(float)
    options.add_argument(target, "--bpp", "at most so many bits per pixel", positive)
    options.add_argument(target, "--psnr", "at least so many dB", positive)


def describe(path: Path, coded: Coded) -> str:
    """A line about a file that was written."""
    return f"{path}: {coded}, {coded.codec.path} at λ {coded.lmbda:.4g}"
