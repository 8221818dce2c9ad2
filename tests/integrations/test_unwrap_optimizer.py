"""The optimizer behind a stand-in; what each framework's own is, its own test asks."""

from __future__ import annotations

import pytest
import torch

from moo_balance import BalanceValueError
from moo_balance.integrations import unwrap_optimizer
from tests.support.plain_runs import model_and_optimizer
from tests.support.registry import over_some


@over_some("Sum")
def test_an_optimizer_is_itself(method):
    _, optimizer = model_and_optimizer(method)
    assert unwrap_optimizer(optimizer) is optimizer


@pytest.mark.parametrize("stranger", [torch.optim.SGD([torch.zeros(1)]), None])
def test_one_that_balances_nothing_is_refused(stranger):
    with pytest.raises(BalanceValueError, match=f"`optimizer`.*Found {type(stranger).__name__}"):
        unwrap_optimizer(stranger)
