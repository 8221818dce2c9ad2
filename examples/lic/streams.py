"""Training crops for long runs: read from disk by workers, and resumed where they stopped."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.lic.images import ImageError, bundled, list_images, read_image


def check_sizes(paths: Sequence[Path], crop: int) -> None:
    """Look at the header of every file, so that a bad one is found now and not in three days.

    Raises:
        ImageError: Some cannot be opened or are smaller than the crops; names the first of them.
    """
    faults = [fault for path in paths if (fault := _fault(path, crop))]
    if faults:
        more = f" {len(faults)} of {len(paths)} images have such a fault." if faults[1:] else ""
        raise ImageError(f"{faults[0]}{more}")


def _fault(path: Path, crop: int) -> str | None:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f"{path} cannot be read (not an image that Pillow knows). Repair or remove it."
    if min(width, height) >= crop:
        return None
    return (
        f"{path} should be at least {crop} pixels high and wide, the side of the training crops. "
        f"Found {height} x {width}. Remove it, or choose a smaller --crop."
    )


def conversions(paths: Sequence[Path]) -> str | None:
    """A sentence on the images that are not 8-bit RGB, as which all are read; None without any."""
    names = []
    for path in paths:
        with Image.open(path) as image:
            if image.mode != "RGB":
                names.append(f"{path.name} ({image.mode})")
    if not names:
        return None
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"Converted to 8-bit RGB: {', '.join(names[:3])}{more}."


def _pixels(source: Path | Tensor) -> Tensor:
    """An image as uint8 ``[3, H, W]``, from its file or from memory."""
    return source if isinstance(source, Tensor) else read_image(source)[0]


class Crops(Dataset[Tensor | ImageError]):
    """Crop number `i` of a run: a function of the seed and `i` alone.

    Every epoch goes through all images once, in an order of its own. A broken image is returned as
    an error and raised where the batches are used: a worker would wrap it into a traceback.
    """

    def __init__(self, sources: Sequence[Path] | Sequence[Tensor], *, crop: int, seed: int) -> None:
        self.side = crop
        self._sources, self._seed = sources, seed

    @property
    def identity(self) -> str:
        """Says whether two runs see the same images."""
        names = [s.name if isinstance(s, Path) else str(tuple(s.shape)) for s in self._sources]
        return f"{len(names)} images, {zlib.crc32(' '.join(names).encode()):08x}"

    def __getitem__(self, index: int) -> Tensor | ImageError:
        epoch, place = divmod(index, len(self._sources))
        order = _order(self._seed, epoch, len(self._sources))
        try:
            image = _pixels(self._sources[order[place]])
        except ImageError as error:
            return error
        chance = random.Random(f"{self._seed}/{index}")
        top = chance.randint(0, image.shape[1] - self.side)
        left = chance.randint(0, image.shape[2] - self.side)
        crop = image[:, top : top + self.side, left : left + self.side]
        return crop.flip(-1) if chance.random() < 0.5 else crop


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(count, generator=generator)


def _collate(crops: list[Tensor | ImageError]) -> Tensor | ImageError:
    errors = [crop for crop in crops if isinstance(crop, ImageError)]
    return errors[0] if errors else torch.stack(crops)


class CropStream(Iterator[Tensor]):
    """An endless stream of batches ``[B, 3, crop, crop]`` in [0, 1] that knows where it is.

    Args:
        crops: Where they come from.
        batch: How many to a batch.
        workers: Processes that read ahead; 0 reads in this one.
        rank: Of `world` streams that share the crops among them, this one.
    """

    def __init__(
        self, crops: Crops, *, batch: int, workers: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self._crops, self._batch, self._workers = crops, batch, workers
        self._rank, self._world = rank, world
        self._taken = 0
        self._batches: Iterator[Tensor | ImageError] | None = None

    def __next__(self) -> Tensor:
        if self._batches is None:
            self._batches = iter(self._loader())
        batch = next(self._batches)
        if isinstance(batch, ImageError):
            raise batch
        self._taken += 1
        pixels = batch.to(torch.float32).div_(255)
        return pixels.contiguous(memory_format=torch.channels_last)

    def _loader(self) -> DataLoader[Any]:
        first = (self._taken * self._world + self._rank) * self._batch
        stride = self._world * self._batch
        return DataLoader(
            self._crops,
            batch_sampler=(
                range(start, start + self._batch) for start in itertools.count(first, stride)
            ),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # Crops carry their own seeds; without this a loader takes one from torch's stream.
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, int]:
        """How many batches were taken; what workers have read ahead does not count."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken, self._batches = state["taken"], None


def folder_crops(folder: Path, *, crop: int, seed: int) -> tuple[Crops, list[str]]:
    """Crops of the images below `folder`, and what the user should know about them.

    Raises:
        ImageError: The folder is missing or empty, or an image is broken or too small.
    """
    paths = list_images(folder)
    check_sizes(paths, crop)
    note = conversions(paths)
    notes = [f"{len(paths)} images in {folder}."] + ([note] if note else [])
    return Crops(paths, crop=crop, seed=seed), notes


def bundled_crops(*, crop: int, seed: int) -> tuple[Crops, list[str]]:
    """Crops of the photographs that come with the example."""
    train = bundled().train
    return Crops(list(train.values()), crop=crop, seed=seed), [f"Trains on {', '.join(train)}."]
