"""How much of the public interface has known types: ``python -m tests.packaging.check_types``.

Pyright counts the symbols that a user can reach. None may have an unknown type, except for classes
that derive from a framework's, and few may leave their type to inference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LOWEST_SCORE = 0.95
PYRIGHT = ["-m", "pyright", "--verifytypes", "moo_balance", "--ignoreexternal", "--outputjson"]


def read_report() -> dict[str, Any]:
    """What Pyright says of the package that is installed next to this interpreter."""
    # Pyright reads the packages of the first `python` on PATH.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    run = subprocess.run(
        [sys.executable, *PYRIGHT], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    return json.loads(run.stdout)["typeCompleteness"]


def unknown_symbols(report: dict[str, Any]) -> list[str]:
    """Exported symbols of unknown type, but for those of frameworks."""
    return [
        symbol["name"]
        for symbol in report["symbols"]
        if symbol["isExported"]
        and not symbol["isTypeKnown"]
        and not symbol["isTypeAmbiguous"]
        and not symbol["name"].startswith("moo_balance.integrations.")
    ]


def main() -> int:
    report = read_report()
    if not report["symbols"]:
        sys.exit("Pyright finds no public symbols. Install the package first: make types does.")
    unknown, score = unknown_symbols(report), report["completenessScore"]
    print(f"types of the public interface: {100 * score:.1f} % declared; unknown: {unknown}")
    return bool(unknown) or score < LOWEST_SCORE


if __name__ == "__main__":
    sys.exit(main())
