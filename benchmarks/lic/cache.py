"""Results on disk, so that a study that was stopped continues where it was."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from examples.lic.checkpoint import write_atomically


class CacheError(Exception):
    """A result that cannot be kept or trusted; the message names the file and says what to do."""


def file_name(key: str, words: str, suffix: str = ".json") -> str:
    """Return a file name that tells what it is about and differs for different keys."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:48].strip("-.")
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}{suffix}".lstrip("-")


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        CacheError: The disk is full, or the folder cannot be written to.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror or error}). Make room or choose another "
            "folder, and start again: finished runs are kept."
        ) from error


def store(path: Path, key: str, value: Any) -> Any:
    """Keep `value`, and return it as JSON gives it back (a tuple as a list)."""
    text = json.dumps({"key": key, "value": value}, indent=1, ensure_ascii=False)
    write(path, text)
    return json.loads(text)["value"]


def load(path: Path) -> Any:
    """Return what was kept at `path`, or None.

    Raises:
        CacheError: The file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))["value"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path} is not a result that can be read ({error}). Remove it to compute it again."
        ) from error
