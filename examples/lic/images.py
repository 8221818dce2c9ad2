"""Photographs: the bundled ones, and folders of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from examples.lic.progress import Meter

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


def bundled(*, min_side: int = 1) -> Photographs:
    """Return the photographs that scikit-image and scikit-learn contain.

    Those to train on have to be at least `min_side` pixels high and wide.
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    train = {name: getattr(data, name)() for name in ("astronaut", "coffee", "rocket")}
    # The other half of the stereo pair shows the same scene.
    train["motorcycle"] = data.stereo_motorcycle()[0]
    held_out = {"chelsea": data.chelsea()}
    held_out |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    least = min(min(pixels.shape[:2]) for pixels in train.values())
    if least < min_side:
        raise ImageError(
            f"--crop should be at most {least}, the least side of the bundled images. Found "
            f"{min_side}. Choose a smaller one, or train on larger images with --images."
        )
    return Photographs(*(
        {name: _to_tensor(pixels) for name, pixels in role.items()} for role in (train, held_out)
    ))  # fmt: skip


def study_photographs() -> dict[str, Tensor]:
    """The photographs that :func:`bundled` holds out, and five more, for studies.

    They are fixed, uint8 ``[3, H, W]``, and none of them is trained on: a portrait from
    matplotlib, and from scikit-image three in grayscale and a stained tissue.
    """
    from matplotlib.cbook import get_sample_data
    from skimage import data

    photographs = dict(bundled().held_out)
    portrait = get_sample_data("grace_hopper.jpg", asfileobj=False)
    photographs["grace hopper"] = read_image(Path(portrait))
    for name in ("camera", "coins", "brick"):
        photographs[name] = _to_tensor(_to_rgb(Image.fromarray(getattr(data, name)())))
    return photographs | {"ihc": _to_tensor(data.immunohistochemistry())}


def from_folders(folder: Path, held_out: Path | None, *, crop: int) -> Photographs:
    """Read the images of the user's folders, subfolders included; their names are paths in these.

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
    root = folder if held_out is None else held_out
    return Photographs(
        {str(p.relative_to(folder)): read_image(p, min_side=crop) for p in paths[:split]},
        {str(p.relative_to(root)): read_image(p) for p in eval_paths},
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


def read_image(path: Path, *, min_side: int = 1, shrink: int = 1) -> Tensor:
    """Return the image at ``path`` as uint8 ``[3, H, W]``.

    With `shrink` above 1 its sides are divided by that, and each pixel is the mean of a square.
    """
    with _open(path) as image:
        pixels = _to_rgb(ImageOps.exif_transpose(image))
    if shrink > 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(shrink))
    _check_side(path, *pixels.shape[:2], min_side)
    return _to_tensor(pixels)


class Photo(NamedTuple):
    """An image file, and its pixels, uint8 ``[3, H, W]``, where they are kept in memory."""

    path: Path
    pixels: Tensor | None = None
    shrink: int = 1

    def read(self, min_side: int = 1) -> Tensor:
        """The pixels, from memory or from the file."""
        if self.pixels is not None:
            return self.pixels
        return read_image(self.path, min_side=min_side, shrink=self.shrink)


def read_all(
    paths: Sequence[Path],
    *,
    min_side: int = 1,
    skip: bool = False,
    threads: int = 1,
    memory: int = 0,
    shrink: int = 1,
) -> list[Photo]:
    """Decode every image once, so that a bad one is found now and not after days of training.

    Args:
        paths: Of the images, at least one.
        min_side: Least height and width in pixels.
        skip: Leave out images that are too small or broken; otherwise they are an error.
        threads: How many decode.
        memory: Bytes: the pixels of so many images, in their order, are kept.
        shrink: See :func:`read_image`.
    """
    photos, faults, left = [], [], memory
    meter = Meter("Images", len(paths), "image")
    for path, pixels in _decode(paths, min_side, shrink, threads):
        meter.update()
        if isinstance(pixels, ImageError):
            faults.append(pixels)
            continue
        left -= pixels.numel()
        photos.append(Photo(path, pixels if left >= 0 else None, shrink))
    meter.close()
    if faults and not (skip and photos):
        more = f" {len(faults)} of {len(paths)} images have such a fault." if faults[1:] else ""
        raise ImageError(f"{faults[0]}{more}")
    return photos


def _decode(
    paths: Sequence[Path], min_side: int, shrink: int, threads: int
) -> Iterator[tuple[Path, Tensor | ImageError]]:
    def attempt(path: Path) -> Tensor | ImageError:
        try:
            return read_image(path, min_side=min_side, shrink=shrink)
        except ImageError as error:
            return error

    ahead = 4 * threads  # a pool that is given everything at once would hold everything
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(paths), ahead):
            some = paths[first : first + ahead]
            yield from zip(some, pool.map(attempt, some), strict=True)


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels have no fixed range")
            yield image
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error  # which has no second copy of the name
        raise ImageError(f"{path} cannot be read ({reason}). Repair or remove it.") from None


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
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
