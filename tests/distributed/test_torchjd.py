"""TorchJD's weightings on two ranks: those that draw numbers, or have a state, among them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import BalancedOptimizer
from moo_balance.integrations.torchjd import TorchJD
from tests.support.distributed import Net, adam, assert_equals_reference, train
from tests.support.method import Method
from tests.support.registry import NAMES

aggregation = pytest.importorskip("torchjd.aggregation")


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "ConFIG"])
def test_ranks_take_the_step_of_one_process(name):
    method = Method(name, lambda names: TorchJD(getattr(aggregation, name)()), kind="gramian")
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer)
    assert_equals_reference(model, optimizer, method, torch.float64)
