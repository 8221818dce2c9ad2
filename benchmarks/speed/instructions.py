"""Instructions of a training step, counted by valgrind: free of the machine's noise.

``python -m benchmarks.speed.instructions`` prints them for the plain loop, `Sum`, lagged `FAMO` and
`MGDA`; ``--package FOLDER`` counts with the `moo_balance` of another checkout, to compare versions.

Each method runs in a process of its own under ``valgrind --tool=callgrind``, with one thread and a
fixed hash seed. Start-up does not count: the process calls a small C library, compiled against
valgrind's header, that turns instrumentation on before the measured steps and off after them. It
needs ``valgrind``, its header and a C compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.tables import table

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "instructions_step.py"
PLAIN = "plain loop"
METHODS = (PLAIN, "Sum", "FAMO lagged", "MGDA")
WARM_UP, STEPS = 3, 10
TOGGLE = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_STOP_INSTRUMENTATION; }
"""


def missing() -> str | None:
    """What is needed and not installed, or None."""
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    header = subprocess.run(
        ["cc", "-E", "-"], input=TOGGLE, capture_output=True, text=True, check=False
    )
    return None if header.returncode == 0 else "valgrind/callgrind.h is not installed"


def compile_toggle(folder: Path) -> Path:
    source, library = folder / "toggle.c", folder / "toggle.so"
    source.write_text(TOGGLE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def count(method: str, package: Path, folder: Path, steps: int = STEPS) -> int:
    """Instructions of one step.

    Args:
        method: One of `METHODS`.
        package: Folder that contains `moo_balance`.
        folder: For temporary files.
        steps: Number of measured steps.
    """
    profile = folder / f"{method}.out".replace(" ", "-")
    command = [
        "valgrind",
        "--tool=callgrind",
        "--instr-atstart=no",
        f"--callgrind-out-file={profile}",
        sys.executable,
        str(SCRIPT),
        *(method, str(WARM_UP), str(steps), str(compile_toggle(folder))),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"Counting `{method}` failed:\n{run.stderr[-3000:]}")
    return total(profile.read_text()) // steps


def total(profile: str) -> int:
    """Instructions that a file of callgrind sums up."""
    sums = re.findall(r"^(?:totals|summary): (\d+)", profile, re.MULTILINE)
    return max(map(int, sums), default=0)


def section(counts: dict[str, int]) -> str:
    plain = counts[PLAIN]
    rows = [
        [name, f"{value / 1e6:.2f}", f"{(value - plain) / 1e6:.2f}", f"{value / plain:.4f}"]
        for name, value in counts.items()
    ]
    return table(["", "million instructions", "above plain", "× plain"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.instructions",
        description="Count the instructions of a training step.",
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--package", type=Path, default=ROOT, help="folder with moo_balance")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"measured (default: {STEPS})")
    args = parser.parse_args(arguments)
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        parser.error(f"METHOD should be one of {', '.join(METHODS)}. Found {unknown.pop()!r}.")
    if reason := missing():
        parser.error(reason)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in (PLAIN, *(m for m in args.methods or METHODS if m != PLAIN)):
            counts[method] = count(method, args.package.resolve(), Path(folder), args.steps)
            print(f"… {method}: {counts[method]:,}", file=sys.stderr, flush=True)
    print(section(counts))


if __name__ == "__main__":
    main()
