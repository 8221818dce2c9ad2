"""How a run is set up, and what it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

PEER_LIBRARIES = ("torchjd", "conflictfree", "pytorch-optimizer", "scipy")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """What the user chose, and what there is.

    Args:
        quick: Tiny models and a few rounds: does everything run?
        threads: Of PyTorch, within operations.
        device: The accelerator if there is one.
    """

    quick: bool = False
    threads: int = 1
    device: torch.device = field(default_factory=_device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, text: str) -> None:
        """Say how far a long run has come."""
        if not self.quick:
            print(f"… {text}", file=sys.stderr, flush=True)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()


def surroundings(settings: Settings) -> dict[str, object]:
    """Machine, date and versions; nothing that tells whose machine it is."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if settings.on_gpu else None,
        "threads": settings.threads,
        "load": round(os.getloadavg()[0], 1),
        "quick": settings.quick,
        "versions": {"Python": platform.python_version(), "torch": torch.__version__} | _peers(),
    }


def _peers() -> dict[str, str]:
    found = {}
    for name in PEER_LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
