"""A disk that is full."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def full_disk(after=5000):
    """No file may grow beyond so many bytes: the closest to a full disk without a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
