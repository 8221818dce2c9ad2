"""How long the random tests run: a few examples each, and many more in the slow tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

VARIABLE = "MOO_BALANCE_FUZZ_EXAMPLES"
"""Sets the number of examples of each slow test, which are then drawn anew in each run."""

MANY = int(os.environ.get(VARIABLE, "100"))

IS_DRAWN_ANEW = VARIABLE in os.environ


def over_amounts(few: int) -> pytest.MarkDecorator:
    """Run a test with a few examples and, among the slow tests, with many."""
    many = pytest.param(MANY, id="many", marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [pytest.param(few, id="few"), many])


def settings_for(examples: int, **arguments: object) -> settings:
    """Settings of a property that runs this many examples."""
    drawn_anew = IS_DRAWN_ANEW and examples == MANY
    return settings(
        max_examples=examples,
        derandomize=not drawn_anew,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **arguments,
    )
