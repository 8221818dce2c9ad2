"""Results that outlive the process which computed them, so that a killed experiment goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

JSON: TypeAlias = Any
"""What :func:`json.dumps` takes; there is no better type for it."""

T = TypeVar("T")


class StoreError(Exception):
    """A result that cannot be kept or trusted; the message names the file and says what to do."""


def cached(folder: Path, key: Mapping[str, JSON], compute: Callable[[], T]) -> T:
    """Return the result for `key`: from its file in `folder`, or computed and then kept there.

    Args:
        folder: Holds one JSON file a result; made when it is missing.
        key: Everything that the result depends on. Strings in it make the readable part of the
            file's name, all of it the rest.
        compute: Called when there is no such file; its result must be what JSON can hold, and
            comes back as JSON gives it (a tuple as a list), on the first call as on later ones.

    Raises:
        StoreError: When a file cannot be read or written, or was kept for another key. Nothing is
            overwritten: a file appears under its name at once and whole, or not at all.
    """
    path = folder / file_name(key)
    if path.exists():
        return _read(path, _canonical(key))
    text = json.dumps({"key": key, "value": compute()}, indent=1)
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return json.loads(text)["value"]


def file_name(key: Mapping[str, JSON], suffix: str = ".json") -> str:
    """Return a name that says what the file is about and differs for different keys."""
    words = "-".join(value for value in key.values() if isinstance(value, str))
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:48].strip("-.")
    digest = hashlib.sha256(_canonical(key).encode()).hexdigest()[:12]
    return f"{readable}-{digest}{suffix}".lstrip("-")


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there once it is complete.

    Raises:
        StoreError: When that fails, on a full disk say; what was at `path` before is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}). Make room or choose another "
            "folder, and start again: what was finished before is kept."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _read(path: Path, key: str) -> JSON:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, value = _canonical(stored["key"]), stored["value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not a result that can be read ({error}). Remove it to compute it again."
        ) from error
    if found != key:
        raise StoreError(
            f"{path} should hold the result for {key}. Found that for {found}. "
            "Remove it to compute it again."
        )
    return value


def _canonical(key: JSON) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=False)
