"""Training crops: read from disk by workers or from memory, and resumed where they stopped."""

from __future__ import annotations

import itertools
import random
import signal
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.lic.images import ImageError, bundled, check_headers, list_images, read_image

Sources: TypeAlias = Sequence[Path] | Sequence[Tensor]
"""Images to train on: files, or uint8 tensors ``[3, H, W]``."""


class Crops(Dataset[Tensor | ImageError]):
    """Crop number `i` of a run, uint8 ``[3, crop, crop]``: a function of the seed and `i` only.

    Every epoch goes through all images once, in an order of its own; half of the crops are
    mirrored. A broken image is returned as an error and raised where the batches are used: a
    worker would wrap it into a traceback. Every image has at least `crop` pixels a side.
    """

    def __init__(self, sources: Sources, *, crop: int, seed: int) -> None:
        self._sources, self._side, self._seed = sources, crop, seed

    @property
    def identity(self) -> str:
        """Two runs with equal ones see the same images, by name or size."""
        names = [s.name if isinstance(s, Path) else str(tuple(s.shape)) for s in self._sources]
        return f"{len(names)} images, {zlib.crc32(' '.join(names).encode()):08x}"

    def __getitem__(self, index: int) -> Tensor | ImageError:
        epoch, place = divmod(index, len(self._sources))
        order = _order(self._seed, epoch, len(self._sources))
        source = self._sources[order[place]]
        try:
            image = source if isinstance(source, Tensor) else read_image(source)
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


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; only the trainer may act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class CropStream(Iterator[Tensor]):
    """An endless stream of batches ``[B, 3, crop, crop]`` in [0, 1] that can be resumed.

    Streams of equal seeds yield equal batches, which is how runs are paired. With `workers` as
    many processes read ahead.
    """

    def __init__(self, crops: Crops, *, batch: int, workers: int = 0) -> None:
        self._crops, self._batch, self._workers = crops, batch, workers
        self._taken = 0
        self._batches: Iterator[Tensor | ImageError] | None = None

    def __next__(self) -> Tensor:
        if self._batches is None:
            self._batches = iter(self._load())
        batch = next(self._batches)
        if isinstance(batch, ImageError):
            self._batches = None  # which ends the workers
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
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            # Crops have their own seeds; without this a loader takes one from torch's stream.
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, int]:
        """The number of batches taken; what workers have read ahead does not count."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken, self._batches = state["taken"], None


def find_sources(folder: Path | None, *, crop: int, skip: bool = False) -> tuple[Sources, str]:
    """The images of a folder to train on, or the bundled ones, and a note about them.

    Images that are too small for the crops or broken are errors, or with `skip` left out.
    """
    if folder is None:
        train = bundled().train
        return list(train.values()), f"Trains on {', '.join(train)}."
    paths = list_images(folder)
    usable = check_headers(paths, min_side=crop, skip=skip)
    return usable, f"Trains on {len(usable)} of the {len(paths)} images in {folder}."
