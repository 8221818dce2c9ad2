"""Photographs: the bundled ones, and folders of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The files of a folder that are taken for images."""

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Pillow's errors for a file that is no image, or a broken one."""


class ImageError(Exception):
    """Images that cannot be used; the message names the path and says what to do."""


@dataclass(frozen=True)
class Photographs:
    """Images by name, each uint8 ``[3, H, W]``."""

    train: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]


def bundled() -> Photographs:
    """Return the photographs that scikit-image and scikit-learn contain."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    train = {name: getattr(data, name)() for name in ("astronaut", "coffee", "rocket")}
    # The other half of the stereo pair shows the same scene.
    train["motorcycle"] = data.stereo_motorcycle()[0]
    held_out = {"chelsea": data.chelsea()}
    held_out |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return Photographs(*(
        {name: _to_tensor(pixels) for name, pixels in role.items()} for role in (train, held_out)
    ))  # fmt: skip


def from_folders(folder: Path, held_out: Path | None, *, crop: int) -> Photographs:
    """Read the images of the user's folders, subfolders included.

    Args:
        folder: Images to train on, each at least ``crop`` pixels high and wide.
        held_out: Images to evaluate on, of any size. Without it the last fifth of ``folder`` by
            file name, at least one image, is held out.
        crop: Side of the training crops in pixels.
    """
    paths = list_images(folder)
    split = len(paths)
    if held_out is None:
        split -= max(1, len(paths) // 5)
    if split == 0:
        raise ImageError(
            f"{folder} should hold at least two images, one of them to be held out. Found one. "
            "Add images, or name a folder of held-out ones with --eval-images."
        )
    eval_paths = paths[split:] if held_out is None else list_images(held_out)
    return Photographs(
        {str(path): read_image(path, min_side=crop) for path in paths[:split]},
        {str(path): read_image(path) for path in eval_paths},
    )


def list_images(folder: Path) -> list[Path]:
    """Return the image files below ``folder`` in order of their paths."""
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder. Name a folder that holds images.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ImageError(
            f"{folder} holds no images. Name a folder with files in {' '.join(SUFFIXES)}."
        )
    return paths


def read_image(path: Path, *, min_side: int = 1) -> Tensor:
    """Return the image at ``path`` as uint8 ``[3, H, W]``."""
    with _open(path) as image:
        pixels = _to_rgb(ImageOps.exif_transpose(image))
    _check_side(path, *pixels.shape[:2], min_side)
    return _to_tensor(pixels)


def check_headers(paths: Sequence[Path], *, min_side: int = 1, skip: bool = False) -> list[Path]:
    """The images that can be used: a bad one is found now, and not after days of training."""
    usable, faults = [], []
    for path in paths:
        try:
            with _open(path) as image:
                _check_side(path, image.height, image.width, min_side)
            usable.append(path)
        except ImageError as error:
            faults.append(error)
    if faults and not (skip and usable):
        more = f" {len(faults)} of {len(paths)} images have such a fault." if faults[1:] else ""
        raise ImageError(f"{faults[0]}{more}")
    return usable


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels have no fixed range")
            yield image
    except _UNREADABLE as error:
        raise ImageError(f"{path} cannot be read ({error}). Repair or remove it.") from None


def _check_side(path: Path, height: int, width: int, min_side: int) -> None:
    if min(height, width) < min_side:
        raise ImageError(
            f"{path} should be at least {min_side} pixels high and wide, the side of the training "
            f"crops. Found {height} x {width}. Remove it, or choose a smaller --crop."
        )


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip and not scale
        gray = np.asarray(image).astype(np.float64) / 257
        return np.repeat(gray.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        # The colour of transparent pixels is not part of the picture.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
