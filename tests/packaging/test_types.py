"""Which symbols count as having an unknown type."""

from __future__ import annotations

import pytest

from tests.packaging.check_types import unknown_symbols

UNKNOWN = {
    "name": "moo_balance.a",
    "isExported": True,
    "isTypeKnown": False,
    "isTypeAmbiguous": False,
}


@pytest.mark.parametrize(
    ("change", "counted"),
    [
        ({}, ["moo_balance.a"]),
        ({"isTypeKnown": True}, []),
        ({"isTypeAmbiguous": True}, []),
        ({"isExported": False}, []),
        ({"name": "moo_balance.integrations.lightning.LogBalance"}, []),
    ],
)
def test_only_exported_symbols_of_the_package_itself_count(change, counted):
    assert unknown_symbols({"symbols": [UNKNOWN | change]}) == counted
