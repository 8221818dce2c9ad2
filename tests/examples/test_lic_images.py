"""Folders of images: what is converted, held out and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from examples.lic import images
from examples.lic.images import ImageError, from_folders, read_all, read_image


def write(path, *, size=(80, 70), mode="RGB", value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        write(tmp_path / "photos" / f"{index}.png", value=(index, 0, 0))
    return tmp_path / "photos"


def test_bundled_photographs_are_held_apart():
    photographs = images.bundled()
    study = images.study_photographs()
    assert not set(photographs.train) & set(study)
    assert list(study)[:3] == list(photographs.held_out)
    assert len(study) == 8
    for image in (*photographs.train.values(), *study.values()):
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert min(image.shape[1:]) >= 256


def test_the_last_fifth_is_held_out(folder):
    photographs = from_folders(folder, None, crop=64)
    assert sorted(photographs.train) == [f"{i}.png" for i in range(5)]
    assert list(photographs.held_out) == ["5.png"]
    assert photographs.held_out["5.png"][:, 0, 0].tolist() == [5, 0, 0]


def test_subfolders_and_a_folder_of_held_out_images(folder, tmp_path):
    write(folder / "more" / "0.jpg")
    write(tmp_path / "kodak" / "small.png", size=(9, 7))
    photographs = from_folders(folder, tmp_path / "kodak", crop=64)
    assert len(photographs.train) == 7
    assert "more/0.jpg" in photographs.train
    assert photographs.held_out["small.png"].shape == (3, 7, 9)


@pytest.mark.parametrize(
    ("mode", "stored", "read"),
    [
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_other_modes_are_converted(tmp_path, mode, stored, read):
    image = read_image(write(tmp_path / "image.png", mode=mode, value=stored))
    assert image.shape == (3, 70, 80)
    assert tuple(image[:, 3, 4].tolist()) == read


def test_a_shrunk_image_has_the_means_of_squares(tmp_path):
    Image.fromarray(np.array([[0, 8], [4, 8]], np.uint8).repeat(2, 1)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", shrink=2)
    assert image.tolist() == 3 * [[[2, 8]]]
    with pytest.raises(ImageError, match=r"Found 1 x 1\."):
        read_image(tmp_path / "a.png", shrink=9, min_side=2)


def test_camera_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (80, 70)).save(tmp_path / "portrait.jpg", exif=exif)
    assert read_image(tmp_path / "portrait.jpg").shape == (3, 80, 70)


def broken(path):
    path.write_bytes(b"not a picture")


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("harm", [broken, truncated])
def test_a_broken_image_is_named(folder, harm):
    harm(folder / "3.png")
    with pytest.raises(ImageError, match=r"3\.png cannot be read .*Repair or remove it"):
        from_folders(folder, None, crop=64)


def test_an_image_smaller_than_the_crops_is_named(folder):
    write(folder / "2.png", size=(100, 63))
    with pytest.raises(ImageError, match=r"2\.png should be at least 64 .* Found 63 x 100\."):
        from_folders(folder, None, crop=64)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere is not a folder\."):
        from_folders(tmp_path / "nowhere", None, crop=64)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ImageError, match=r"holds no images\."):
        from_folders(tmp_path, None, crop=64)


def test_one_image_cannot_be_both_trained_on_and_held_out(tmp_path):
    write(tmp_path / "only.png")
    with pytest.raises(ImageError, match=r"at least two images.*--eval-images"):
        from_folders(tmp_path, None, crop=64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("harm", [broken, truncated])
def test_all_images_are_decoded_before_training(harm, threads, folder):
    """A truncated one has a good header."""
    harm(folder / "3.png")
    write(folder / "1.png", size=(100, 63))
    paths, options = sorted(folder.iterdir()), {"threads": threads}
    with pytest.raises(ImageError, match=r"1\.png .* 63 x 100.*2 of 6 images have such a fault"):
        read_all(paths, min_side=64, **options)
    usable = read_all(paths, min_side=64, skip=True, **options)
    assert [photo.path.name for photo in usable] == ["0.png", "2.png", "4.png", "5.png"]
    with pytest.raises(ImageError, match="6 of 6 images"):
        read_all(paths, min_side=128, skip=True, **options)


def test_pixels_are_kept_up_to_a_bound(folder):
    paths, size = sorted(folder.iterdir()), 3 * 80 * 70
    photos = read_all(paths, memory=3 * size + 1)
    assert [photo.pixels is not None for photo in photos] == 3 * [True] + 3 * [False]
    assert all(torch.equal(photo.read(), read_image(photo.path)) for photo in photos)


def test_reading_images_says_how_far_it_is(folder, capsys):
    read_all(sorted(folder.iterdir()))
    assert capsys.readouterr().err == "Images: image 6 of 6\n"


def test_floating_point_pixels_are_refused(tmp_path):
    Image.new("F", (100, 100)).save(tmp_path / "depth.tiff")
    with pytest.raises(ImageError, match=r"depth\.tiff cannot be read \(floating-point pixels"):
        read_image(tmp_path / "depth.tiff")
