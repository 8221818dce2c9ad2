"""All methods: their kinds, what each of them promises, and what they refuse.

``METHODS`` is the only list of methods in the tests: a new row inherits every test. Rows are in
``rows/``, one file for each family of methods. Mathematics is tested over all rows, by
``over_methods`` and ``over``. What can only differ by the *kind* of a method (windows, loss
scalers, checkpoints, ranks ...) is tested over ``KINDS``, one row of each kind, by ``over_kinds``.
Methods that need gradients of several batches take part in ``over_all`` and ``over_all_methods``.
``REFUSALS`` are configurations that are refused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from examples.own_methods import EqualLengths, SlowestFirst
from tests.support.method import NAMES as NAMES, Kind as Kind, Method as Method, positive
from tests.support.rows import FAMILIES

METHODS = [row for family in FAMILIES for row in family.METHODS]
REFUSALS = [refusal for family in FAMILIES for refusal in family.REFUSALS]
FACTS = {name: facts for family in FAMILIES for name, facts in family.FACTS.items()}

OWN_METHODS = [
    Method(
        "SlowestFirst", lambda names: SlowestFirst(power=2.0), bounds=positive, scaling="unchanged"
    ),
    Method("EqualLengths", lambda names: EqualLengths(), kind="gramian", scaling="shares"),
    Method(
        "EqualLengths-every",
        lambda names: EqualLengths(beta=0.5, every=2),
        kind="gramian-every",
        scaling="shares",
    ),
]
"""The methods that the manual shows how to write, which are not in the package."""


def over(rows: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """Run a test for the rows that fit, those of the manual's methods included.

    Not for methods that need gradients of several batches: most tests give one at a time.
    """
    return over_all(lambda method: rows(method) and not method.independent)


def over_all(rows: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """The same for methods that need several batches, too, where a test gives a Gramian itself."""
    fitting = list(filter(rows, [*METHODS, *OWN_METHODS]))
    return pytest.mark.parametrize("method", fitting, ids=repr)


def over_some(*ids: str) -> pytest.MarkDecorator:
    """Run a test for the rows with these ids."""
    chosen = {method.id: method for method in METHODS}
    return pytest.mark.parametrize("method", [chosen[id] for id in ids], ids=repr)


over_methods = over(lambda method: True)
over_all_methods = over_all(lambda method: True)

_REPRESENTATIVES: dict[Kind, str] = {
    "known": "FixedWeights",
    "losses": "SumLog",
    "lagged": "FAMO-lagged",
    "observing": "FAMO-adam",
    "gramian": "AnalyticQP",
    "gramian-every": "MGDA-every",
}
KINDS = [next(row for row in METHODS if row.id == id) for id in _REPRESENTATIVES.values()]
"""One row of each kind."""

over_kinds = over(lambda method: method in KINDS)


def _first_of_each() -> list[Method]:
    """The first row of each method in each of its kinds."""
    first: dict[tuple[str, Kind], Method] = {}
    for row in METHODS:
        first.setdefault((row.id.split("-")[0], row.kind), row)
    return list(first.values())


FIRST_OF_EACH = _first_of_each()

over_each_method = over(lambda method: method in FIRST_OF_EACH)
"""For what may depend on the method but not on its hyper-parameters."""
