"""DistributedDataParallel: the ranks take the step that one process takes on their joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from moo_balance import BalancedOptimizer, BalanceError
from tests.support.distributed import (
    Net,
    Normalized,
    adam,
    assert_equals_reference,
    by_backward,
    by_combined_loss,
    losses_of,
    share,
    train,
)
from tests.support.problems import snapshot
from tests.support.registry import NAMES, over_each_method, over_kinds, over_some

WRAPPERS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def check(method, wrapper, dtype, step=None):
    model = DDP(Net(dtype), **WRAPPERS[wrapper])
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer, **({} if step is None else {"step": step}))
    assert_equals_reference(model, optimizer, method, dtype)


@pytest.mark.capability("DistributedDataParallel")
@over_each_method
def test_every_method_in_double_precision(method):
    check(method, "default", torch.float64)


@pytest.mark.capability("DistributedDataParallel")
@over_kinds
def test_every_kind_of_method_in_single_precision(method):
    check(method, "find_unused_parameters", torch.float32)


@pytest.mark.capability("DDP with static_graph or gradient_as_bucket_view")
@over_some("FixedWeights", "SumLog", "FAMO-adam", "AnalyticQP", "MGDA-every")
@pytest.mark.parametrize("wrapper", ["static_graph", "gradient_as_bucket_view"])
@pytest.mark.parametrize("step", [by_backward, by_combined_loss], ids=lambda step: step.__name__)
def test_other_wrappers(method, wrapper, step):
    check(method, wrapper, torch.float64, step)


@pytest.mark.slow
@over_kinds
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_kind_of_method_with_every_wrapper(method, wrapper, dtype):
    check(method, wrapper, dtype)


class Checkpointed(Net):
    reentrant = False

    def forward(self, batch):
        inputs = batch[:, :5].requires_grad_(self.reentrant)
        features = checkpoint(self.trunk, inputs, use_reentrant=self.reentrant)
        return [head(features) for head in self.heads]


@pytest.mark.capability("activation checkpointing under DDP")
@over_some("SumLog", "FAMO-adam", "AnalyticQP")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(method, reentrant):
    net = Checkpointed()
    net.reentrant = reentrant
    model = DDP(net)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    if reentrant and method.gramian:
        with pytest.raises(BalanceError, match="should be `use_reentrant=False`"):
            train(model, optimizer, range(1))
    else:
        train(model, optimizer)
        assert_equals_reference(model, optimizer, method, torch.float64)


@over_some("FAMO-adam")
def test_running_statistics_are_updated_once_a_step(method):
    """DDP broadcasts rank 0's buffers before a forward pass, also after a second evaluation."""
    model = DDP(Normalized())
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    twin = DDP(Normalized())
    for step in range(3):
        twin.load_state_dict({**model.state_dict(), **buffers(twin)})
        losses_of(twin, share(step))
        train(model, optimizer, [step])
        assert snapshot(buffers(model)) == snapshot(buffers(twin))
    assert int(model.module.norm.num_batches_tracked) == 3


def buffers(model):
    return {f"module.{name}": buffer for name, buffer in model.module.named_buffers()}
