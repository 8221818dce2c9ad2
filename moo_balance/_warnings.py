"""Warnings that point to the user's line, however many calls lie in between."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_USERS = {
    *("moo_balance", "torch", "accelerate", "transformers"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
}


def warn(message: str) -> None:
    """Warn at the innermost line that is not of this package, PyTorch or a trainer."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package_of(frame.f_globals) in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package_of(names: dict[str, object]) -> str:
    return str(names.get("__name__")).partition(".")[0]
