"""``balanced``: the BalancedOptimizer inside of a framework's optimizer."""

from __future__ import annotations

import pytest
import torch

from moo_balance import BalanceValueError
from moo_balance.integrations import unwrap_optimizer
from tests.support.plain_runs import model_and_optimizer
from tests.support.registry import over_some


@over_some("Sum")
def test_a_balanced_optimizer_is_returned_as_it_is(method):
    _, optimizer = model_and_optimizer(method)
    assert unwrap_optimizer(optimizer) is optimizer


@pytest.mark.parametrize("stranger", [torch.optim.SGD([torch.zeros(1)]), None])
def test_a_plain_optimizer_is_refused(stranger):
    with pytest.raises(BalanceValueError, match=f"`optimizer`.*Found {type(stranger).__name__}"):
        unwrap_optimizer(stranger)
