"""What `import moo_balance` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import Settings
from benchmarks.tables import table
from benchmarks.timing import Spread

TITLE = "Import time"
ROUNDS = 15
BARE = "import moo_balance"
STATEMENTS = (
    BARE,
    "from moo_balance import BalancedOptimizer, FAMO",
    "from moo_balance import BalancedOptimizer, AnalyticQP",
    "from moo_balance import *",
)
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
        _imported(STATEMENTS[-1])  # writes the byte code that the others find
    found: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    torch: list[float] = []
    for _ in range(rounds):
        for statement, milliseconds in found.items():
            before, own = _imported(statement)
            torch.append(1000 * before)
            milliseconds.append(1000 * own)
    return {
        "rounds": rounds,
        "torch ms": Spread.of(torch),
        "ours ms": {statement: Spread.of(values) for statement, values in found.items()},
    }


def _imported(statement: str) -> list[float]:
    root = Path(__file__).parent.parent
    # As everywhere but where it is forbidden, modules are compiled once and for all.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
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
        f"median of {results['rounds']} fresh processes each, and the range of the middle half. "
        "What a program does not use is not read.\n\n" + table(["statement", "ms"], rows)
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
