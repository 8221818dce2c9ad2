"""The page of what the tests show, ``docs/capabilities.md``, written after a full run.

    python -m tests.support.capabilities

``capability_plugin`` keeps the record of the run, and fails a run that shows something else.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from moo_balance import weighting
from moo_balance.weighting import Weighting

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "capabilities.md"
RECORD = "moo_balance/capabilities"  # in pytest's cache

METHODS = {
    name
    for name in weighting.__all__
    if Weighting in getattr(value := getattr(weighting, name), "__mro__", ())
    and not inspect.isabstract(value)
}

HEAD = """\
# What was tested

Each row is shown by tests that pass, with the methods named in it: the run that is balanced ends
where a plain loop, one process, or one large batch ends, most often to the last bit.

<!-- Written by `python -m tests.support.capabilities` after a full run of the tests. -->

"""


def table(shown: Mapping[str, Collection[str]]) -> str:
    """Capabilities in alphabetical order, each with the methods it was tested with."""
    rows = [
        f"| {name} | {_list_methods(METHODS & set(shown[name]))} |"
        for name in sorted(shown, key=str.casefold)
    ]
    return "\n".join(["| what works | tested with |", "| --- | --- |", *rows, ""])


def _list_methods(methods: set[str]) -> str:
    if methods == METHODS:
        return "all methods"
    return ", ".join(f"`{name}`" for name in sorted(methods))


def page(shown: Mapping[str, Collection[str]]) -> str:
    """The whole page."""
    return HEAD + table(shown)


def is_current(shown: Mapping[str, Collection[str]]) -> bool:
    """Whether the page in the manual says what the tests showed."""
    return PAGE.exists() and PAGE.read_text() == page(shown)


def main() -> None:
    record = ROOT / ".pytest_cache" / "v" / RECORD
    if not record.exists():
        raise SystemExit("No full run of the tests is on record. Run `make test` first.")
    PAGE.write_text(page(json.loads(record.read_text())))


if __name__ == "__main__":
    main()
