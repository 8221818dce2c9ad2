"""Folders of small images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def write_photographs(folder: Path, count: int) -> Path:
    """Write `count` noisy images of 80 x 70 pixels, ``0.png`` and so on; returns the folder."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.effect_noise((80, 70), 40 + index).convert("RGB").save(folder / f"{index}.png")
    return folder
