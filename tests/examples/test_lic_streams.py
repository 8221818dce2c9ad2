"""Training crops: which images in which order, and what happens to broken ones."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image

from examples.lic.images import ImageError
from examples.lic.streams import Crops, CropStream, find_sources


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        Image.effect_noise((80, 70), 40 + index).convert("RGB").save(tmp_path / f"{index}.png")
    return tmp_path


def folder_crops(folder, *, seed):
    return Crops(sorted(folder.iterdir()), crop=64, seed=seed)


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


def test_workers_make_no_difference(folder):
    crops = folder_crops(folder, seed=3)
    alone, helped = take(stream(crops), 4), take(stream(crops, workers=2), 4)
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


def test_sources_are_a_folder_or_the_bundled_photographs(folder):
    Image.new("L", (80, 70)).save(folder / "9.png")
    Image.new("L", (80, 60)).save(folder / "small.png")
    paths, note = find_sources(folder, crop=64, skip=True)
    assert paths == sorted(folder.iterdir())[:-1]
    assert note == f"Trains on 6 of the 7 images in {folder}."
    images, note = find_sources(None, crop=128)
    assert "astronaut" in note
    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in images)
