"""What `import moo_balance` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import Settings
from benchmarks.timing import Spread

TITLE = "Import time"
ROUNDS = 15
_SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import moo_balance
print([middle - start, time.perf_counter() - middle])
"""


def run(settings: Settings) -> dict[str, Any]:
    rounds = 1 if settings.quick else ROUNDS
    if not settings.quick:
        _imported()  # writes the byte code that the others find
    found = [_imported() for _ in range(rounds)]
    torch, ours = zip(*found, strict=True)
    return {
        "rounds": rounds,
        "torch ms": Spread.of([1000 * value for value in torch]),
        "ours ms": Spread.of([1000 * value for value in ours]),
    }


def _imported() -> list[float]:
    root = Path(__file__).parent.parent
    # As everywhere but where it is forbidden, modules are compiled once and for all.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=environment,
    )
    return list(json.loads(run.stdout))


def section(results: dict[str, Any]) -> str:
    ours, torch = results["ours ms"], results["torch ms"]
    return (
        f"In each of {results['rounds']} fresh processes, `import moo_balance` after "
        f"`import torch` took {ours[0]:.1f} ms in the median ({ours[1]:.1f} to {ours[2]:.1f} ms in "
        f"the middle half), and `import torch` itself {torch[0]:.0f} ms."
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
