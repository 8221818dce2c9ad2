"""Gramians at features that are spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import MGDA, BalancedOptimizer, BalanceError
from tests.support.distributed import Net, adam, share
from tests.support.registry import NAMES


class Exposed(Net):
    """A net that returns its features as well as its outputs."""

    def forward(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.trunk(batch[:, :5])
        return features, [head(features) for head in self.heads]


def backward(model: nn.Module, optimizer: BalancedOptimizer, batch: Tensor) -> None:
    features, outputs = model(batch)
    losses = {
        name: 10.0**k * (output - (k - 1) * batch[:, 5:]).square().mean()
        for k, (name, output) in enumerate(zip(NAMES, outputs, strict=True))
    }
    optimizer.backward(losses, features=features)


@pytest.mark.parametrize("wrap", [DDP, lambda net: net], ids=["DDP", "bare"])
def test_ranks_take_the_step_of_one_process_on_the_joined_batch(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model, alone = wrap(Exposed()), Exposed()
    optimizer = BalancedOptimizer(adam(model), MGDA())
    reference = BalancedOptimizer(adam(alone), MGDA(), process_group=None)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, optimizer, share(step))
        reference.zero_grad()
        backward(alone, reference, share(step, alone=True))
        torch.testing.assert_close(
            optimizer.metrics.gramian, reference.metrics.gramian, rtol=1e-12, atol=0
        )
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13)
        optimizer.step()
        reference.step()


def test_sharded_parameters_are_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(Exposed(torch.float32), mesh=mesh)
    optimizer = BalancedOptimizer(adam(model), MGDA())
    with pytest.raises(BalanceError, match="sharded parameters"):
        backward(model, optimizer, share(0, torch.float32))
