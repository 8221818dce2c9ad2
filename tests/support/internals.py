"""The only place where tests reach for private names of the package."""

from __future__ import annotations

import pytest

try:
    from moo_balance import _nonfinite
except ImportError:
    from moo_balance import screening as _nonfinite


def treat_cpu_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handle values on the CPU as those of an accelerator, where reading them would synchronize."""
    name = "is_on_cpu" if hasattr(_nonfinite, "is_on_cpu") else "on_host"
    monkeypatch.setattr(_nonfinite, name, lambda tensor: False)
