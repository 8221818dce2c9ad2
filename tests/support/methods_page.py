"""The table of methods in ``docs/methods.md``, written from the registry.

    python -m tests.support.methods_page

A row of the table says what the first configuration of a method in the registry promises; the
contract tests show it.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.method import Kind, Method, average, count, one
from tests.support.registry import FACTS, METHODS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN = "<!-- Written by `python -m tests.support.methods_page`. -->\n"
END = "<!-- End of the table. -->\n"

HEAD = [
    "method",
    "makes equal, or minimizes",
    "coefficients sum to",
    "units of a loss matter",
    "a loss may rise",
    "cost beyond a plain step",
    "relation to others",
]

COSTS: dict[Kind, str] = {
    "known": "none",
    "losses": "none",
    "lagged": "none",
    "observing": "one forward pass",
    "gramian": "one backward pass per loss",
    "gramian-every": "one backward pass per loss, in each n-th step",
}
TOTALS = {count: "K", one: "1", average: "1/K"}


def default_row(name: str) -> Method:
    """The first row of a class, as a rule its default configuration."""
    return next(row for row in METHODS if row.id.split("-")[0] == name)


def table() -> str:
    """All methods, in the order of the families."""
    lines = [HEAD, ["---"] * len(HEAD), *map(_cells, FACTS)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(name: str) -> list[str]:
    facts, row = FACTS[name], default_row(name)
    return [
        f"`{name}`",
        facts.equalizes,
        facts.total or TOTALS.get(row.total, "nothing fixed"),
        facts.units or ("no" if row.scaling in ("inverse", "shares", "direction") else "yes"),
        facts.rises or ("no" if row.never_rises else "yes"),
        facts.cost or COSTS[row.kind],
        facts.relation,
    ]


def insert(text: str) -> str:
    """The page with the table between its two marks."""
    pattern = f"(?s){re.escape(BEGIN)}.*{re.escape(END)}"
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table()}\n{END}", text)


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text()))
