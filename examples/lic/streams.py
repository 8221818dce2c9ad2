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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.lic.images import (
    ImageError,
    bundled,
    check,
    conversions,
    list_images,
    read_modes,
    read_pixels,
)


def _pixels(source: Path | Tensor) -> Tensor:
    """An image as uint8 ``[3, H, W]``, from its file or from memory."""
    return source if isinstance(source, Tensor) else read_pixels(source)


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


def _blocks(first: int, length: int, stride: int) -> Iterator[range]:
    """Numbers of the crops of batch after batch.

    Not a method: a reader that refers to its stream would be collected as a cycle, late and in the
    wrong order, and its workers would linger.
    """
    return (range(start, start + length) for start in itertools.count(first, stride))


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
            self._batches = None  # which ends the workers
            raise batch
        self._taken += 1
        pixels = batch.to(torch.float32).div_(255)
        return pixels.contiguous(memory_format=torch.channels_last)

    def _loader(self) -> DataLoader[Any]:
        first = (self._taken * self._world + self._rank) * self._batch
        stride = self._world * self._batch
        return DataLoader(
            self._crops,
            batch_sampler=_blocks(first, self._batch, stride),
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


def folder_crops(
    folder: Path, *, crop: int, seed: int, skip: bool = False
) -> tuple[Crops, list[str]]:
    """Crops of the images below `folder`, and what the user should know about them.

    Args:
        folder: Of images, subfolders included.
        crop: Side of the crops.
        seed: Of their order and places.
        skip: Leave out what is too small or broken, where it is an error else.

    Raises:
        ImageError: The folder is missing or empty, or an image is broken or too small.
    """
    paths = list_images(folder)
    modes, faults = read_modes(paths, min_side=crop)
    if not (skip and modes):
        check(faults, len(paths))
    notes = [f"{len(modes)} images in {folder}."]
    if faults:
        notes.append(f"Left out {len(faults)}, the first because: {faults[0]}")
    note = conversions(modes)
    notes += [] if note is None else [note]
    return Crops(list(modes), crop=crop, seed=seed), notes


def bundled_crops(*, crop: int, seed: int) -> tuple[Crops, list[str]]:
    """Crops of the photographs that come with the example."""
    train = bundled().train
    return Crops(list(train.values()), crop=crop, seed=seed), [f"Trains on {', '.join(train)}."]
