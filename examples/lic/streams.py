"""Training crops: read from disk by workers or from memory, and resumed where they stopped."""

from __future__ import annotations

import itertools
import os
import random
import signal
import weakref
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.lic.images import ImageError, Photo, bundled, list_images, read_all

Sources: TypeAlias = Sequence[Photo] | Sequence[Tensor]
"""Images to train on: files, or uint8 tensors ``[3, H, W]``."""


class Crops(Dataset[Tensor | ImageError]):
    """Crop number `i` of a run, uint8 ``[3, crop, crop]``: a function of the seed and `i` only.

    Every epoch goes through all images once, in an order of its own; half of the crops are
    mirrored. A file that has broken or shrunk since it was listed is returned as an error and
    raised where the batches are used: a worker would wrap it into a traceback. Every image has at
    least `crop` pixels a side.
    """

    def __init__(self, sources: Sources, *, crop: int, seed: int) -> None:
        self._sources, self._side, self._seed = sources, crop, seed

    @property
    def identity(self) -> str:
        """Two runs with equal ones see the same images, by name or size."""
        names = [
            f"{s.path.name}/{s.shrink}" if isinstance(s, Photo) else str(tuple(s.shape))
            for s in self._sources
        ]
        return f"{len(names)} images, {zlib.crc32(os.fsencode(' '.join(names))):08x}"

    def __getitem__(self, index: int) -> Tensor | ImageError:
        epoch, place = divmod(index, len(self._sources))
        order = _order(self._seed, epoch, len(self._sources))
        source = self._sources[order[place]]
        try:
            image = source.read(self._side) if isinstance(source, Photo) else source
        except ImageError as error:
            return error
        return self._crop(image, random.Random(f"{self._seed}/{index}"))

    def _crop(self, image: Tensor, draw: random.Random) -> Tensor:
        top = draw.randint(0, image.shape[1] - self._side)
        left = draw.randint(0, image.shape[2] - self._side)
        crop = image[:, top : top + self._side, left : left + self._side]
        return crop.flip(-1) if draw.random() < 0.5 else crop


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(count, generator=generator)


def _collate(crops: list[Tensor | ImageError]) -> Tensor | ImageError:
    errors = [crop for crop in crops if isinstance(crop, ImageError)]
    return errors[0] if errors else torch.stack(crops)


def _batches(first: int, length: int) -> Iterator[range]:
    # Not a method: a reader that refers to its stream would be collected as a cycle, late and in
    # the wrong order, and its workers would linger.
    return (range(start, start + length) for start in itertools.count(first, length))


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, and SIGTERM every one of a batch system's job;
    # only the trainer may act on them, or it would lose its workers before the step ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class CropStream(Iterator[Tensor]):
    """An endless stream of batches ``[B, 3, crop, crop]`` in [0, 1] that can be resumed.

    Streams of equal seeds yield equal batches, which is how runs are paired. With `workers` as
    many processes read ahead.
    """

    def __init__(self, crops: Crops, *, batch: int, workers: int = 0) -> None:
        self._crops, self._batch, self._workers = crops, batch, workers
        self._taken = 0
        self._reader: list[Iterator[Tensor | ImageError]] = []  # at most one; it owns the workers
        # They are deaf to SIGTERM, with which Python would end them: it would wait for ever.
        weakref.finalize(self, self._reader.clear)

    def __next__(self) -> Tensor:
        if not self._reader:
            self._reader.append(iter(self._load()))
        batch = next(self._reader[0])
        if isinstance(batch, ImageError):
            self._reader.clear()  # which ends the workers
            raise batch
        self._taken += 1
        pixels = batch.to(torch.float32).div_(255)
        return pixels.contiguous(memory_format=torch.channels_last)

    def _load(self) -> DataLoader[Any]:
        return DataLoader(
            self._crops,
            batch_sampler=_batches(self._taken * self._batch, self._batch),
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
            # Crops have their own seeds; without this a loader takes one from torch's stream.
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, int]:
        """The number of batches taken; what workers have read ahead does not count."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken = int(state["taken"])
        self._reader.clear()


def find_sources(
    folder: Path | None,
    *,
    crop: int,
    shrink: Sequence[int] = (1,),
    skip: bool = False,
    threads: int = 1,
    memory: int = 0,
) -> tuple[Sources, str]:
    """The images of a folder to train on, or the bundled ones, and a note about them.

    Those of a folder are there once for each `shrink`, by which their sides are divided. Images
    that are too small for the crops or broken are errors, or with `skip` left out. For `threads`
    and `memory` see :func:`examples.lic.images.read_all`.
    """
    if folder is None:
        train = bundled(min_side=crop).train
        return list(train.values()), f"Trains on {', '.join(train)}."
    paths, photos = list_images(folder), []
    options = {"min_side": crop, "skip": skip, "threads": threads, "memory": memory // len(shrink)}
    for factor in shrink:
        photos += read_all(paths, shrink=factor, **options)
    used = len({photo.path for photo in photos})
    kept = sum(photo.pixels is not None for photo in photos)
    return photos, (
        f"Trains on {used} of the {len(paths)} images in {folder}, {kept} of {len(photos)} "
        "decoded in memory."
    )
