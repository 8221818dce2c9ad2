"""The README's table of what the tests show, written after a full run.

    python -m tests.support.capabilities

``capability_plugin`` keeps the record of the run, and fails one that shows something else.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from moo_balance import weighting
from moo_balance.weighting import Weighting

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RECORD = "moo_balance/capabilities"  # in pytest's cache
BEGIN = "<!-- written by `python -m tests.support.capabilities` after a full run of the tests -->\n"
END = "<!-- until here -->\n"

METHODS = {
    name
    for name in weighting.__all__
    if Weighting in getattr(value := getattr(weighting, name), "__mro__", ())
    and not inspect.isabstract(value)
}


def table(shown: Mapping[str, Collection[str]]) -> str:
    """Capabilities in alphabetical order, each with the methods it was tested with."""
    rows = [
        f"| {name} | {_listed(METHODS & set(shown[name]))} |"
        for name in sorted(shown, key=str.casefold)
    ]
    return "\n".join(["| what works | tested with |", "| --- | --- |", *rows, ""])


def _listed(methods: set[str]) -> str:
    if methods == METHODS:
        return "all methods"
    return ", ".join(f"`{name}`" for name in sorted(methods))


def is_current(shown: Mapping[str, Collection[str]]) -> bool:
    """Does the README say so?"""
    return f"{BEGIN}\n{table(shown)}\n{END}" in README.read_text()


def main() -> None:
    record = ROOT / ".pytest_cache" / "v" / RECORD
    if not record.exists():
        raise SystemExit("No full run of the tests is on record. Run `make test` first.")
    before, rest = README.read_text().split(BEGIN)
    after = rest.partition(END)[2]
    shown = json.loads(record.read_text())
    README.write_text(f"{before}{BEGIN}\n{table(shown)}\n{END}{after}")


if __name__ == "__main__":
    main()
