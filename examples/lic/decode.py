"""Decode the file of an image to PNG, with the codec among those given that has made it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.lic import options
from examples.lic.bitstream import BitstreamError
from examples.lic.coding import decode, load_codecs
from examples.lic.encode import add_codecs, check_output, codec_paths, write
from examples.lic.evaluation import psnr
from examples.lic.images import ImageError, read_image


def main(arguments: Sequence[str]) -> int:
    """Decode; returns the exit code."""
    parser = options.Parser("decode", "Decode a file to a PNG image.", quick=False)
    parser.add("file", "that encode or refine has written", Path, metavar="FILE")
    parser.add("output", "the image to write, .png", Path, metavar="OUT")
    parser.add("--original", "the image that was encoded, for the PSNR", Path)
    add_codecs(parser)
    chosen = parser.parse(arguments)
    paths = codec_paths(chosen)
    inputs = [chosen.file, chosen.original, *paths]
    check_output(chosen.output, [path for path in inputs if path is not None])
    if chosen.output.suffix.lower() != ".png":
        raise ImageError(f"OUT should end in .png. Found {chosen.output}. Choose another name.")
    data = _read(chosen.file)
    image, codec = decode(data, load_codecs(paths, chosen.device))
    text = f"{8 * len(data) / image[0].numel():.4f} bpp"
    if chosen.original is not None:
        original = read_image(chosen.original)
        if original.shape != image.shape:
            sizes = (f"{x.shape[1]} x {x.shape[2]}" for x in (image, original))
            raise ImageError("--original should have {} pixels. Found {}.".format(*sizes))
        text += f", {psnr(image, original):.2f} dB"
    png = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(png, format="PNG")
    write(chosen.output, png.getvalue())
    print(f"{chosen.output}: {image.shape[1]} x {image.shape[2]}, {text}, {codec.path}")
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BitstreamError(f"{path} cannot be read ({error.strerror}). Name a file.") from None
