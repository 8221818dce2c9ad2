"""JPEG and WebP, as Pillow writes them: curves that codecs are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from examples.lic.evaluation import Measurement, psnr, structural_similarity
from examples.lic.images import ImageError, read_image

QUALITIES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)


class Format(NamedTuple):
    """The suffix of an image format, its longest side, and Pillow's options for writing it."""

    suffix: str
    longest: int
    options: dict[str, object]


FORMATS = {
    "jpeg": Format(".jpg", 65500, {"subsampling": "4:2:0", "optimize": True}),
    "webp": Format(".webp", 16383, {"method": 6}),
}


def measure_format(name: str, quality: int, image: Callable[[], Tensor], file: Path) -> Measurement:
    """Write one image in another format, read it back and compare.

    Args:
        name: Of the format.
        quality: Pillow's, from 0 to 100.
        image: Loads a uint8 image ``[3, H, W]``.
        file: To write; the suffix of the format is added.

    Raises:
        ImageError: The image is too large for the format.
    """
    suffix, longest, options = FORMATS[name]
    reference, path = image(), file.with_name(file.name + suffix)
    height, width = reference.shape[1:]
    if max(height, width) > longest:
        raise ImageError(
            f"{file.name} should have sides of at most {longest} pixels, for {name}. Found "
            f"{height} x {width}. Leave that image out, or {name} if it is an --anchor."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.ascontiguousarray(reference.permute(1, 2, 0))
    Image.fromarray(pixels).save(path, quality=quality, **options)
    decoded, size = read_image(path), path.stat().st_size
    return Measurement(
        size=size,
        bpp=8 * size / reference[0].numel(),
        estimated_bpp=None,
        psnr=psnr(decoded, reference),
        ms_ssim=structural_similarity(decoded, reference),
        exact=None,
    )
