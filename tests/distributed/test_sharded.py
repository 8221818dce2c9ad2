"""Parameters in shards: FSDP2 on one mesh dimension or two, tensor parallelism, FSDP1."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel as FSDP1,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceError, NonFiniteError
from moo_balance.engine import PerLoss
from tests.support.distributed import (
    Net,
    adam,
    assert_equals_reference,
    assert_same_on_all_ranks,
    by_backward,
    by_closure,
    by_combined_loss,
    losses_of,
    parameters,
    share,
    train,
)
from tests.support.registry import NAMES, over_each_method, over_kinds, over_some

over_some_kinds = over_some("SumLog", "FAMO-adam", "AnalyticQP")
over_steps = pytest.mark.parametrize(
    "step", [by_closure, by_backward, by_combined_loss], ids=lambda step: step.__name__
)


def sharded(model, **arguments):
    """In two groups, so that the trunk is gathered and freed by itself."""
    fully_shard(model.trunk, **arguments)
    fully_shard(model, **arguments)
    return model


def check(model, method, step=by_closure, dtype=torch.float64):
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer, step=step)
    assert_equals_reference(model, optimizer, method, dtype)


@pytest.mark.capability("FSDP2")
@over_each_method
def test_every_method(method):
    model = Net()
    fully_shard(model)
    check(model, method)


@pytest.mark.capability("FSDP2")
@over_some("SumLog", "MGDA-every")
def test_gradients_of_a_trunk_that_stays_gathered(method):
    check(sharded(Net(), reshard_after_forward=False), method)


@pytest.mark.capability("FSDP2")
@over_some_kinds
@over_steps
def test_every_form_of_a_step(method, step):
    check(sharded(Net()), method, step)


@pytest.mark.capability("FSDP2")
@over_some("SumLog", "MGDA-every")
def test_single_precision(method):
    check(sharded(Net(torch.float32)), method, dtype=torch.float32)


@pytest.mark.slow
@over_kinds
@over_steps
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_kind_of_method_with_every_form_of_a_step(method, step, reshard, dtype):
    check(sharded(Net(dtype), reshard_after_forward=reshard), method, step, dtype)


@pytest.mark.capability("FSDP2 on a 2-D mesh (HSDP)")
@over_some_kinds
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=str)
def test_replicas_of_shards(method, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    check(sharded(Net(), mesh=mesh), method)


@over_some("SumLog", "MGDA-none")
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_nan_in_the_shard_of_one_rank_stops_the_step_on_all(method, nonfinite):
    model = sharded(Net())
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES), nonfinite=nonfinite)
    train(model, optimizer, range(1), by_backward)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, share(1)))
    if dist.get_rank() == 1:
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        gradient.to_local().reshape(-1)[0] = float("nan")
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=r"Found NaN or infinity in `.grad`"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.log_dict()["moo/skipped"] == 1
    after = optimizer.state_dict()["state"]
    assert [float(s["step"]) for s in after.values()] == [float(s["step"]) for s in before.values()]
    train(model, optimizer, range(1, 3), by_backward)


def test_a_nan_gradient_of_a_finite_loss_stops_the_step():
    model = sharded(Net())
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    losses = losses_of(model, share(0))
    losses["b"] = losses["b"] + (losses["b"] * 0.0).sqrt()
    optimizer.backward(losses)
    with pytest.raises(NonFiniteError, match=r"Found NaN or infinity in `.grad`"):
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in parameters(model))


def test_the_gramian_is_that_of_the_whole_gradients():
    model, twin = sharded(Net()), Net()
    optimizer = BalancedOptimizer(adam(model), MGDA(), engine=PerLoss(torch.float64))
    alone = BalancedOptimizer(adam(twin), MGDA(), process_group=None)
    optimizer.backward(losses_of(model, share(0)))
    alone.backward(losses_of(twin, share(0, alone=True)))
    torch.testing.assert_close(
        optimizer.metrics.gramian, alone.metrics.gramian, rtol=1e-12, atol=1e-12
    )


def test_the_gramian_over_some_parameters():
    model, twin = sharded(Net()), Net()
    optimizer = BalancedOptimizer(adam(model), MGDA(), shared_params=model.trunk)
    alone = BalancedOptimizer(adam(twin), MGDA(), shared_params=twin.trunk, process_group=None)
    optimizer.backward(losses_of(model, share(0)))
    alone.backward(losses_of(twin, share(0, alone=True)))
    torch.testing.assert_close(
        optimizer.metrics.gramian, alone.metrics.gramian, rtol=1e-12, atol=1e-12
    )


@pytest.mark.capability("FSDP2 with a mixed-precision policy")
@over_some_kinds
def test_mixed_precision_policy(method):
    """bfloat16 has eight bits: the path is the same to within as much, and alike on all ranks."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, twin = sharded(Net(torch.float32), mp_policy=policy), Net(torch.float32)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
    start = torch.cat([p.flatten() for p in parameters(twin)]).clone()
    train(model, optimizer)
    train(twin, alone, alone=True)
    assert all(p.grad.dtype == torch.float32 for p in optimizer.param_groups[0]["params"])
    own, other = (torch.cat([p.flatten() for p in parameters(net)]) for net in (model, twin))
    assert_same_on_all_ranks(own, optimizer.state_dict()["balance"])
    ratio = float((own - other).norm() / (other - start).norm())
    assert ratio < 0.02


@over_some("AnalyticQP")
def test_shards_that_do_not_synchronize_are_refused(method):
    """FSDP2 can be told to synchronize no gradients of a micro-batch: rows would be missing."""
    model = sharded(Net())
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    model.set_requires_gradient_sync(False)
    with pytest.raises(BalanceError, match=r"loss `a` should reach.*`accumulate\(\)`"):
        optimizer.backward(losses_of(model, share(0)))


@over_some("SumLog", "AnalyticQP")
def test_a_model_that_is_only_sharded_in_part_is_refused(method):
    """Gradients of the other parameters are not averaged; that shows in the first step."""
    model = Net()
    fully_shard(model.trunk)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    with pytest.raises(BalanceError, match="Found a parameter on rank 1"):
        train(model, optimizer, range(1))


# ---------------------------------------------------------------------- tensor parallelism


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 6)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                start = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(start / 2)

    def forward(self, batch):
        features = self.down(torch.tanh(self.up(batch[None, :, :5])))
        return self.out(self.norm(features))[0].split(1, dim=1)


def by_sequence(model, mesh):
    """Each rank has some of the rows, too: the norm's gradients are left as open sums."""
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "out": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def by_columns(model, mesh):
    """Norm and output stay plain parameters, the same on all ranks."""
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@pytest.mark.capability("tensor parallelism")
@over_some("SumLog", "FAMO-adam", "AnalyticQP")
@pytest.mark.parametrize("plan", [by_columns, by_sequence], ids=lambda plan: plan.__name__)
@pytest.mark.parametrize("step", [by_closure, by_combined_loss], ids=lambda step: step.__name__)
def test_tensor_parallel(method, plan, step):
    def run(model, alone):
        optimizer = BalancedOptimizer(
            adam(model), method.make(NAMES), process_group=None if alone else "auto"
        )
        train(model, optimizer, range(6), step, alone=True)  # all ranks see the same batch
        return parameters(model)

    expected = run(Tower(), True)
    actual = run(plan(Tower(), init_device_mesh("cpu", (2,))), False)
    assert_same_on_all_ranks(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- FSDP1


def flat(model, whole):
    with FSDP1.summon_full_params(model):
        pieces = torch.cat([p.detach().flatten() for p in model.parameters()])
    return pieces[: len(whole)]  # padded at the end


@pytest.mark.capability("FSDP1, methods without a Gramian")
@over_some("FixedWeights", "SumLog", "FAMO-adam")
@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters_with_methods_that_take_one_backward(method, original):
    twin = Net()
    alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
    model = FSDP1(Net(), device_id=torch.device("cpu"), use_orig_params=original)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    for number in range(3):
        step = (by_closure, by_backward, by_combined_loss)[number]
        train(twin, alone, [number], step, alone=True)
        train(model, optimizer, [number], step)
    expected = torch.cat([p.flatten() for p in parameters(twin)])
    torch.testing.assert_close(flat(model, expected), expected, rtol=1e-12, atol=1e-12)


@over_some("AnalyticQP", "MGDA-none")
@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters_refuse_a_gramian(method, original):
    model = FSDP1(Net(), device_id=torch.device("cpu"), use_orig_params=original)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    before = copy.deepcopy(optimizer.state_dict()["balance"])
    for call in (optimizer.backward, optimizer.combined_loss):
        with pytest.raises(BalanceError, match=r"Found parameters of .*\(FSDP1\).*`fully_shard`"):
            call(losses_of(model, share(0)))
    assert optimizer.state_dict()["balance"] == before


def test_flat_parameters_refuse_the_gradients_of_a_window():
    model = FSDP1(Net(), device_id=torch.device("cpu"))
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    with optimizer.accumulate(), pytest.raises(BalanceError, match="FSDP1"):
        optimizer.backward(losses_of(model, share(0)))
