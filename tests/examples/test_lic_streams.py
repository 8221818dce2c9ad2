"""Training crops: which images in which order, and what happens to broken ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.lic.images import ImageError, read_all
from examples.lic.streams import Crops, CropStream, find_sources
from tests.support.photographs import write_photographs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path, 5)


def folder_crops(folder, *, seed, memory=0):
    return Crops(read_all(sorted(folder.iterdir()), memory=memory), crop=64, seed=seed)


def flat(images=5):
    """Images of one grey value each, by which crops can be told apart."""
    return [torch.full((3, 64, 64), 50 * i, dtype=torch.uint8) for i in range(images)]


def stream(crops, **options):
    return CropStream(crops, **{"batch": 2, **options})


def take(crops, count):
    return [next(crops) for _ in range(count)]


def test_every_epoch_shows_every_image_once_and_in_another_order():
    values = [
        int(255 * b[0, 0, 0, 0] / 50)
        for b in take(stream(Crops(flat(), crop=64, seed=0), batch=1), 15)
    ]
    epochs = [values[0:5], values[5:10], values[10:15]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_crops_are_cut_within_the_image_and_half_of_them_mirrored():
    ramp = torch.arange(70, dtype=torch.uint8).expand(3, 64, 70)
    mirrored = Counter()
    for (crop,) in take(stream(Crops([ramp], crop=64, seed=0), batch=1), 40):
        row = (255 * crop[0, 0]).round().tolist()
        mirrored[row[0] > row[-1]] += 1
        assert sorted(row) == [min(row) + i for i in range(64)]
    assert min(mirrored.values()) > 10


@pytest.mark.parametrize(("workers", "memory"), [(2, 0), (0, 40_000), (2, 10**6)])
def test_workers_and_decoded_images_in_memory_make_no_difference(workers, memory, folder):
    alone = take(stream(folder_crops(folder, seed=3)), 4)
    helped = take(stream(folder_crops(folder, seed=3, memory=memory), workers=workers), 4)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert alone[0].is_contiguous(memory_format=torch.channels_last)
    assert 0 <= alone[0].min() < alone[0].max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_goes_on_where_it_was(workers, folder):
    crops = folder_crops(folder, seed=3)
    expected = take(stream(crops), 6)
    broken = stream(crops, workers=workers)
    take(broken, 3)
    resumed = stream(crops, workers=workers)
    resumed.load_state_dict(broken.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(take(resumed, 3), expected[3:], strict=True))


def test_drawing_crops_does_not_touch_torchs_random_stream(folder):
    """Or a resumed run, which starts its reader anew, would see other noise."""
    crops = folder_crops(folder, seed=3)
    before = torch.get_rng_state()
    take(stream(crops), 2)
    take(stream(crops, workers=1), 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off_is_named_when_its_turn_comes(workers, folder):
    crops = folder_crops(folder, seed=0)
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:3000])
    with pytest.raises(ImageError, match=r"2\.png cannot be read") as caught:
        take(stream(crops, workers=workers), 3)
    assert len(str(caught.value).splitlines()) == 1


def test_a_broken_image_does_not_count_as_taken(folder):
    crops = folder_crops(folder, seed=0)
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:3000])
    broken, taken = stream(crops), []
    with pytest.raises(ImageError):
        taken.extend(broken)
    assert broken.state_dict() == {"taken": len(taken)}


def test_other_images_are_another_identity(folder):
    first = folder_crops(folder, seed=0).identity
    (folder / "4.png").rename(folder / "5.png")
    assert first != folder_crops(folder, seed=0).identity


def test_images_in_memory_are_not_decoded_again(folder):
    crops = folder_crops(folder, seed=0, memory=10**6)
    for path in folder.iterdir():
        path.unlink()
    assert len(take(stream(crops), 5)) == 5


def test_workers_outlive_the_signals_that_stop_a_run(folder):
    """A batch system sends SIGTERM to all processes of a job; the trainer ends its step first."""
    batches = stream(folder_crops(folder, seed=3), workers=1)
    expected = take(stream(folder_crops(folder, seed=3)), 8)
    taken = take(batches, 1)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    taken += take(batches, 7)
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=True))


FAILS = """
import torch
from examples.lic.streams import Crops, CropStream
stream = CropStream(Crops([torch.zeros(3, 64, 64)], crop=64, seed=0), batch=1, workers=1)
next(stream)
raise RuntimeError("a fault")
"""


def test_workers_do_not_keep_a_process_that_fails_from_ending():
    done = subprocess.run([sys.executable, "-c", FAILS], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"a fault" in done.stderr


def test_an_image_that_has_shrunk_since_it_was_listed_is_named(folder):
    photos = read_all(sorted(folder.iterdir())[:1], min_side=64)
    Image.new("RGB", (90, 63)).save(photos[0].path)
    with pytest.raises(ImageError, match=r"0\.png should be at least 64 pixels .* Found 63 x 90"):
        next(stream(Crops(photos, crop=64, seed=0)))


def test_an_image_may_have_a_name_that_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (70, 70)).save(path)
    photos, _ = find_sources(tmp_path, crop=64)
    crops = Crops(photos, crop=64, seed=0)
    assert crops.identity.startswith("1 images, ")
    assert crops[0].shape == (3, 64, 64)


def test_sources_are_a_folder_or_the_bundled_photographs(folder):
    Image.new("L", (80, 70)).save(folder / "9.png")
    Image.new("L", (80, 60)).save(folder / "small.png")
    size = 3 * 80 * 70
    photos, note = find_sources(folder, crop=64, skip=True, memory=2 * size, threads=3)
    assert [photo.path for photo in photos] == sorted(folder.iterdir())[:-1]
    assert [photo.pixels is not None for photo in photos] == 2 * [True] + 4 * [False]
    assert note == f"Trains on 6 of the 7 images in {folder}, 2 of 6 decoded in memory."
    halves, _ = find_sources(folder, crop=30, shrink=[1, 2], memory=8 * size)
    assert [tuple(photo.read().shape) for photo in halves[::7]] == [(3, 70, 80), (3, 35, 40)]
    assert Crops(halves, crop=30, seed=0).identity != Crops(2 * photos, crop=30, seed=0).identity
    images, note = find_sources(None, crop=128)
    with pytest.raises(ImageError, match=r"--crop should be at most 400, the least side"):
        find_sources(None, crop=448)
    assert "astronaut" in note
    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in images)
