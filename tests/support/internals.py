"""Private names of the package that several tests need."""

from __future__ import annotations

import pytest

from moo_balance import _nonfinite


def treat_cpu_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handle values on the CPU as those of an accelerator, where reading them would synchronize."""
    monkeypatch.setattr(_nonfinite, "is_on_cpu", lambda tensor: False)
