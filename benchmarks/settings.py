"""Settings of a run, and the machine and versions that it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

OTHER_LIBRARIES = ("torchjd", "conflictfree", "pytorch-optimizer", "scipy")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        quick: Use tiny models and few rounds, only to check that everything runs.
        threads: Threads of PyTorch within one operation.
        device: The accelerator if there is one.
    """

    quick: bool = False
    threads: int = 1
    device: torch.device = field(default_factory=_device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def report(self, text: str) -> None:
        """Print the progress of a long run."""
        if not self.quick:
            print(f"… {text}", file=sys.stderr, flush=True)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.on_gpu:
            torch.cuda.synchronize()


def environment(settings: Settings) -> dict[str, object]:
    """Machine, date and versions; nothing that identifies the machine's owner."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if settings.on_gpu else None,
        "threads": settings.threads,
        "load": round(os.getloadavg()[0], 1),
        "quick": settings.quick,
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            **_library_versions(),
        },
    }


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in OTHER_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def processor() -> str:
    """Name of the processor's model, or of its architecture if the model is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
