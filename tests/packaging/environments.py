"""Environments that a check makes and removes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"

# A fast part of the library's tests, in one process and without other frameworks.
FAST_TESTS = (
    "tests/functional",
    "tests/engine/test_per_loss.py",
    "tests/test_checkpoint.py",
    "tests/test_optimizer.py",
    "tests/test_torch_internals.py",
    "tests/test_wrapper.py",
    "tests/weighting/test_famo.py",
    "tests/weighting/test_mgda.py",
)


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment that knows nothing of this one's modules."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean,
        check=check,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def create(folder: Path, python: str | Path = sys.executable) -> Path:
    """Create a virtual environment and return its interpreter."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(python: Path, *arguments: str | Path, check: bool = True) -> bool:
    """Whether pip installed what is asked for, into the environment of `python`."""
    command = (python, "-m", "pip", "install", "--quiet", *arguments)
    result = run(*command, cwd=ROOT, check=False)
    if check and result.returncode:
        sys.exit(f"pip install failed:\n{result.stdout}")
    return result.returncode == 0
