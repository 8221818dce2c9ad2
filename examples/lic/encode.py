"""Code an image to a file, with one codec or the best suited of several."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.lic import options
from examples.lic.checkpoint import write_atomically
from examples.lic.coding import PRETRAINED, Coded, choose, list_codecs, load_codecs
from examples.lic.images import read_image


def main(arguments: Sequence[str]) -> int:
    """Encode; returns the exit code."""
    parser = options.Parser("encode", "Code an image to a file.", quick=False)
    parser.add("image", "to encode, of any size", Path, metavar="IMAGE")
    parser.add("output", "the file to write", Path, metavar="OUT")
    add_target(parser)
    chosen = parser.parse(arguments)
    paths = codec_paths(chosen)
    check_output(chosen.output, [chosen.image, *paths])
    codecs = load_codecs(paths, chosen.device)
    image = read_image(chosen.image)
    coded = choose(image, codecs, bpp=chosen.bpp, decibels=chosen.psnr)
    write(chosen.output, coded.data)
    print(describe(chosen.output, coded))
    return 0


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is a folder, or one of the files that are read."""
    if path.is_dir():
        raise options.OptionError(
            f"OUT should be a file. Found the folder {path.absolute()}. Name a file in it."
        )
    if path.exists() and any(p.exists() and path.samefile(p) for p in inputs):
        raise options.OptionError(
            f"OUT should not be a file that is read. Found {path}. Choose another OUT."
        )


def check_folder(path: Path) -> None:
    """Refuse an output for several files that is no folder."""
    if path.exists() and not path.is_dir():
        raise options.OptionError(
            f"--output should be a folder. Found the file {path}. Choose another --output."
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


def codec_paths(chosen: argparse.Namespace) -> list[Path]:
    """The files of the codecs that were named, or of those that come with the example."""
    return list_codecs(chosen.codec or [PRETRAINED])


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
