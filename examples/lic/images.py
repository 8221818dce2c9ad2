"""Photographs: the bundled ones, and folders of the user's own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

TRAIN_BYTES = 2**29
"""How much of a folder is held in memory to train on; the rest of a larger one is left out."""

EVAL_BYTES = 2**25
"""The same for held-out images: every trained model is evaluated on all of them in full."""

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The files of a folder that are taken for images."""

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Pillow's errors for a file that is no image, or a broken one."""


class ImageError(Exception):
    """Images that cannot be used; the message names the path and says what to do."""


@dataclass(frozen=True)
class Photographs:
    """Images by name, each uint8 ``[3, H, W]``, and notes for the user about them."""

    train: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    notes: Sequence[str] = field(default=())


def bundled() -> Photographs:
    """Return the photographs that scikit-image and scikit-learn contain."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    train = {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        # The other half of the stereo pair shows the same scene.
        "motorcycle": data.stereo_motorcycle()[0],
    }
    held_out = {
        "chelsea": data.chelsea(),
        "china": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }
    return Photographs(
        {name: _to_tensor(pixels) for name, pixels in train.items()},
        {name: _to_tensor(pixels) for name, pixels in held_out.items()},
    )


def from_folders(folder: Path, held_out: Path | None, *, crop: int) -> Photographs:
    """Read the images of the user's folders, subfolders included.

    Args:
        folder: Images to train on, each at least ``crop`` pixels high and wide.
        held_out: Images to evaluate on, of any size. Without it the last fifth of ``folder`` by
            file name, at least one image, is held out.
        crop: Side of the training crops in pixels.

    Raises:
        ImageError: When a folder is missing or empty, or an image is broken or too small.
    """
    train_paths = list_images(folder)
    if held_out is None:
        if len(train_paths) == 1:
            raise ImageError(
                f"{folder} should hold at least two images, one of them to be held out. Found "
                "one. Add images, or name a folder of held-out ones with --eval-images."
            )
        split = len(train_paths) - max(1, len(train_paths) // 5)
        train_paths, eval_paths = train_paths[:split], train_paths[split:]
    else:
        eval_paths = list_images(held_out)
        if shared := {p.resolve() for p in train_paths} & {p.resolve() for p in eval_paths}:
            raise ImageError(
                f"The held-out images should not be trained on. Found {min(shared)} in both "
                f"{folder} and {held_out}. Move it out of one of them."
            )
    notes: list[str] = []
    train = _read_all(train_paths, TRAIN_BYTES, crop, notes)
    return Photographs(train, _read_all(eval_paths, EVAL_BYTES, 1, notes), notes)


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
    """Return the image at ``path`` as uint8 ``[3, H, W]``.

    Raises:
        ImageError: It cannot be read, or a side is shorter than `min_side` pixels.
    """
    try:
        with Image.open(path) as image:
            pixels = _to_rgb(ImageOps.exif_transpose(image))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    _check_side(path, *pixels.shape[:2], min_side)
    return _to_tensor(pixels)


def read_modes(
    paths: Sequence[Path], *, min_side: int = 1
) -> tuple[dict[Path, str], list[ImageError]]:
    """Read every file's header, so that a bad one is found now and not after days of training.

    Returns:
        The modes of the images that can be used, and an error for each of the others.
    """
    modes, faults = {}, []
    for path in paths:
        try:
            modes[path] = _read_mode(path, min_side)
        except ImageError as error:
            faults.append(error)
    return modes, faults


def check(faults: Sequence[ImageError], count: int) -> None:
    """Raise the first fault among `count` images, if there is one, and say how many there are."""
    if faults:
        more = f" {len(faults)} of {count} images have such a fault." if faults[1:] else ""
        raise ImageError(f"{faults[0]}{more}")


def conversions(modes: Mapping[Path, str]) -> list[str]:
    """A sentence on the images whose mode is not 8-bit RGB, if there are any."""
    names = [f"{path.name} ({mode})" for path, mode in modes.items() if mode != "RGB"]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return [f"Converted to 8-bit RGB: {', '.join(names[:3])}{more}."]


def _read_all(
    paths: Sequence[Path], budget: int, min_side: int, notes: list[str]
) -> dict[str, Tensor]:
    images: dict[Path, Tensor] = {}
    # In shuffled order, so that what fits into the budget is a fair sample of the folder.
    for path in random.Random(0).sample(paths, len(paths)):
        images[path] = read_image(path, min_side=min_side)
        budget -= images[path].numel()
        if budget <= 0:
            notes.append(f"{len(images)} of {len(paths)} images fit into memory and are used.")
            break
    notes += conversions(read_modes(list(images))[0])
    return {str(path): image for path, image in images.items()}


def _read_mode(path: Path, min_side: int) -> str:
    try:
        with Image.open(path) as image:
            _check_range(image)
            mode, (width, height) = image.mode, image.size
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    _check_side(path, height, width, min_side)
    return mode


def _unreadable(path: Path, error: Exception) -> ImageError:
    known = not isinstance(error, UnidentifiedImageError)
    reason = str(error) if known else "not an image format that Pillow knows"
    return ImageError(f"{path} cannot be read ({reason}). Repair or remove it.")


def _check_side(path: Path, height: int, width: int, min_side: int) -> None:
    if min(height, width) < min_side:
        raise ImageError(
            f"{path} should be at least {min_side} pixels high and wide, the side of the training "
            f"crops. Found {height} x {width}. Remove it, or choose a smaller --crop."
        )


def _check_range(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip and not scale
        gray = np.asarray(image).astype(np.float64) / 257
        return np.repeat(gray.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    _check_range(image)
    if image.has_transparency_data:
        # The colour of transparent pixels is not part of the picture.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
