"""What ``import moo_balance`` adds to ``import torch``, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import Settings
from benchmarks.speed.tables import table
from benchmarks.speed.timing import Spread

TITLE = "Import time"
ROUNDS = 15
STATEMENTS = ("import moo_balance", "from moo_balance import *")
_SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
{statement}
print([middle - start, time.perf_counter() - middle])
"""


def run(settings: Settings) -> dict[str, Any]:
    rounds = 1 if settings.quick else ROUNDS
    if not settings.quick:
        _import(STATEMENTS[-1])  # writes the byte code that the others read
    ours: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    torch: list[float] = []
    for _ in range(rounds):
        for statement, milliseconds in ours.items():
            torch_seconds, our_seconds = _import(statement)
            torch.append(1000 * torch_seconds)
            milliseconds.append(1000 * our_seconds)
    return {
        "rounds": rounds,
        "torch ms": Spread.of(torch),
        "ours ms": {statement: Spread.of(values) for statement, values in ours.items()},
    }


def _import(statement: str) -> list[float]:
    """Return the seconds that a fresh process takes to import torch, and then for the statement."""
    # Byte code must be written: without it, compiling the modules would be measured each time.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    return list(json.loads(run.stdout))


def section(results: dict[str, Any]) -> str:
    rows = [
        [f"`{statement}`", f"{ours[0]:.1f} ({ours[1]:.1f}–{ours[2]:.1f})"]
        for statement, ours in results["ours ms"].items()
    ]
    return (
        f"Milliseconds after `import torch`, which itself takes {results['torch ms'][0]:.0f}; the "
        f"median of {results['rounds']} fresh processes each, and the two quartiles.\n\n"
        + table(["statement", "ms"], rows)
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
