"""Ranks that disagree: an error on all of them, never a deadlock, and nothing has changed."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceError, NonFiniteError, Sum
from tests.support.distributed import (
    Net,
    adam,
    assert_same_on_all_ranks,
    by_backward,
    by_closure,
    losses_of,
    share,
    train,
)
from tests.support.problems import whole_state
from tests.support.registry import NAMES, over_some

pytestmark = pytest.mark.capability("ranks that disagree are refused")

over_some_kinds = over_some("FixedWeights", "FAMO-lagged", "MGDA-none")


def started(method=None, steps=2, **arguments):
    """A model and its optimizer that have taken a few steps together."""
    model = DDP(Net(), find_unused_parameters=True)
    weighting = FAMO(lagged=True) if method is None else method.make(NAMES)
    optimizer = BalancedOptimizer(adam(model), weighting, **arguments)
    train(model, optimizer, range(steps), by_backward)
    return model, optimizer


@contextmanager
def refused(model, optimizer, message, error=BalanceError):
    """The error comes on all ranks, leaves all as it was, and training can go on."""
    before = whole_state(model, optimizer)
    with pytest.raises(error, match=message):
        yield
    optimizer.zero_grad()
    assert whole_state(model, optimizer) == before
    train(model, optimizer, range(5, 7), by_backward)
    assert_same_on_all_ranks(whole_state(model, optimizer))


def on_rank_1(value, elsewhere):
    """One value on rank 1, another on all others."""
    return value if dist.get_rank() == 1 else elsewhere


@over_some_kinds
def test_a_loss_that_is_absent_on_one_rank_is_refused(method):
    model, optimizer = started(method)
    with refused(model, optimizer, "Loss `b` should be present on all ranks or on none.*1 of 2"):
        optimizer.backward(losses_of(model, share(2), on_rank_1("ac", NAMES)))


@over_some_kinds
def test_a_loss_that_is_absent_on_all_ranks_is_absent(method):
    model, optimizer = started(method)
    twin = Net()
    alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
    train(twin, alone, range(2), by_backward, alone=True)
    for net, run in ((model, optimizer), (twin, alone)):
        run.zero_grad()
        run.backward(losses_of(net, share(2, alone=net is twin), "ac"))
        run.step()
    torch.testing.assert_close(
        list(model.parameters()), list(twin.parameters()), rtol=1e-12, atol=1e-12
    )
    assert_same_on_all_ranks(whole_state(model, optimizer))


def test_other_loss_names_in_the_first_step_are_refused():
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), Sum())
    with refused(model, optimizer, r"same losses. Found \['a', 'c'\] on rank 1 and"):
        optimizer.backward(losses_of(model, share(0), on_rank_1("ac", NAMES)))


def test_other_loss_names_in_a_later_step_are_refused():
    model, optimizer = started()
    losses = losses_of(model, share(2))
    losses[on_rank_1("d", "c")] = losses.pop("c")
    with refused(
        model,
        optimizer,
        on_rank_1("Loss `d` is none of the declared ones", "1 of 2 ranks could not compute"),
    ):
        optimizer.backward(losses)


def test_loss_names_of_a_backward_without_a_step_are_not_declared():
    model = DDP(Net(), find_unused_parameters=True)
    optimizer = BalancedOptimizer(adam(model), Sum())
    optimizer.backward(losses_of(model, share(0), "ab"))
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    assert_same_on_all_ranks(whole_state(model, optimizer))


@over_some_kinds
@pytest.mark.parametrize("steps", [0, 2])
def test_a_nan_on_one_rank_is_refused_on_all(method, steps):
    model, optimizer = started(method, steps)
    losses = losses_of(model, share(2))
    losses["b"] = losses["b"] * on_rank_1(math.nan, 1.0)
    with refused(model, optimizer, "Loss `b` should be finite", NonFiniteError):
        optimizer.backward(losses)


@over_some_kinds
def test_a_nan_on_one_rank_is_skipped_by_all(method):
    model, optimizer = started(method, nonfinite="skip")
    before = whole_state(model, optimizer)["optimizer"]
    losses = losses_of(model, share(2))
    losses["b"] = losses["b"] * on_rank_1(math.nan, 1.0)
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()
    assert whole_state(model, optimizer)["optimizer"] == {
        **before,
        "balance": {**before["balance"], "skipped": 1},
    }
    train(model, optimizer, range(5, 7), by_backward)
    assert_same_on_all_ranks(whole_state(model, optimizer))


@over_some("AnalyticQP", "MGDA-none")
def test_a_nan_gradient_on_one_rank_is_refused_on_all(method):
    """The loss is finite: what is wrong shows in the averaged row only."""
    model, optimizer = started(method)
    losses = losses_of(model, share(2))
    if dist.get_rank() == 1:
        losses["b"] = losses["b"] + (losses["b"] * 0.0).sqrt()
    with refused(model, optimizer, "gradient of loss `b` should be finite", NonFiniteError):
        optimizer.backward(losses)


@over_some("MGDA-none")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_detached_loss_on_one_rank_is_refused_on_all(method, steps):
    model, optimizer = started(method, steps)
    losses = losses_of(model, share(2))
    losses["b"] = on_rank_1(losses["b"].detach(), losses["b"])
    others = (
        "1 of 2 ranks could not compute"
        if steps
        else "Rank 1 could not compute its losses: Loss `b`"
    )
    with refused(model, optimizer, on_rank_1("Loss `b` should be attached", others)):
        optimizer.backward(losses)


@over_some("MGDA-none")
def test_a_tensor_instead_of_losses_on_one_rank_is_refused_on_all(method):
    model, optimizer = started(method)
    losses = losses_of(model, share(2))
    with refused(
        model, optimizer, on_rank_1("should be a mapping", "1 of 2 ranks could not compute")
    ):
        optimizer.backward(on_rank_1(losses["a"], losses))


def test_another_method_on_one_rank_is_refused():
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), on_rank_1(MGDA(), Sum()))
    with pytest.raises(BalanceError, match=r"Found method MGDA\(.* on rank 1 and Sum\(\)"):
        optimizer.backward(losses_of(model, share(0)))


def test_a_checkpoint_that_only_one_rank_loads_at_the_start_is_refused():
    state = started()[1].state_dict()
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    if dist.get_rank() == 1:
        optimizer.load_state_dict(state)
    with pytest.raises(BalanceError, match="Found step 2 on rank 1 and 0 on rank 0"):
        optimizer.backward(losses_of(model, share(0)))


def test_a_checkpoint_that_only_one_rank_loads_later_is_refused():
    model, optimizer = started()
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, [2], by_backward)
    if dist.get_rank() == 1:
        optimizer.load_state_dict(state)
    with pytest.raises(BalanceError, match="Found step 2 on rank 1 and 3 on rank 0"):
        optimizer.backward(losses_of(model, share(3)))


@over_some("FAMO-lagged", "MGDA-none")
def test_a_window_on_one_rank_only_is_refused(method):
    model, optimizer = started(method)
    losses = losses_of(model, share(2))
    with refused(model, optimizer, "Found call accumulate on rank 1 and backward on rank 0"):
        if dist.get_rank() == 1:
            with optimizer.accumulate():
                optimizer.backward(losses)
        else:
            optimizer.backward(losses)


def test_an_observation_on_one_rank_only_is_refused():
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), FAMO())
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, share(2)))
    optimizer.step()
    with torch.no_grad():
        losses = losses_of(model, share(2))
    # Only a rank that loaded another checkpoint can come here without having observed.
    if dist.get_rank() == 1:
        saved = optimizer.state_dict()
        saved["balance"]["awaiting"] = None
        optimizer.load_state_dict(saved)
        losses = losses_of(model, share(3))
    with pytest.raises(BalanceError, match="Found call backward on rank 1 and observe on"):
        on_rank_1(optimizer.backward, optimizer.observe)(losses)


def test_a_nan_observed_on_one_rank_is_refused_on_all():
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), FAMO())
    optimizer.backward(losses_of(model, share(0)))
    optimizer.step()
    with torch.no_grad():
        losses = losses_of(model, share(0))
    losses["c"] = losses["c"] * on_rank_1(math.nan, 1.0)
    with pytest.raises(NonFiniteError, match="Loss `c` should be finite"):
        optimizer.observe(losses)
    train(model, optimizer, range(1, 3))
    assert_same_on_all_ranks(whole_state(model, optimizer))


# ---------------------------------------------------------------------- process groups


@over_some("MGDA-none")
def test_a_destroyed_process_group_is_refused(method):
    model, optimizer = started(method)
    losses = losses_of(model, share(2))
    dist.destroy_process_group()
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceError, match="process group that this run began with"):
        optimizer.backward(losses)
    assert whole_state(model, optimizer) == before


def test_a_destroyed_explicit_group_is_refused():
    model, optimizer = started(process_group=dist.new_group())
    losses = losses_of(model, share(2))
    dist.destroy_process_group()
    with pytest.raises(BalanceError, match="process group that this run began with"):
        optimizer.backward(losses)


@pytest.mark.capability("each rank a model of its own", "MGDA")
def test_without_a_group_each_rank_trains_a_model_of_its_own():
    model, twin = Net(), Net()
    optimizer = BalancedOptimizer(adam(model), MGDA(), process_group=None)
    single = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    own = BalancedOptimizer(adam(twin), MGDA(), process_group=single)
    for net, run in ((model, optimizer), (twin, own)):
        for step in range(on_rank_1(3, 5)):  # no rank waits for another
            run.step(lambda: losses_of(net, share(step)))  # noqa: B023
    assert whole_state(model, optimizer) == whole_state(twin, own)


def test_a_process_group_without_this_rank_is_refused():
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=r"`process_group` should be .*this rank belongs to"):
            BalancedOptimizer(adam(Net()), Sum(), process_group=group)
    with pytest.raises(ValueError, match=r"`process_group` should be .* Found 'gloo'"):
        BalancedOptimizer(adam(Net()), Sum(), process_group="gloo")


@pytest.mark.parametrize("explicit", [False, True])
def test_a_copy_belongs_to_the_same_ranks(explicit):
    model = Net()
    group = dist.new_group() if explicit else "auto"
    optimizer = BalancedOptimizer(adam(model), MGDA(), process_group=group)
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 5))
    train(twin, other, range(2, 5))
    assert whole_state(twin, other) == whole_state(model, optimizer)


@pytest.mark.parametrize("steps", [0, 2])
def test_ranks_that_train_other_parameters_are_refused(steps):
    """Also of equal number and shape, whose gradients could be averaged into each other."""
    model, optimizer = started(steps=steps)
    first, second = (model.module.heads[k].bias for k in (0, 1))
    on_rank_1(first, second).requires_grad_(False)
    losses = losses_of(model, share(2))
    with refused(model, optimizer, "All ranks should train the same parameters"):
        try:
            optimizer.backward(losses)
        finally:
            model.requires_grad_(True)


def test_steps_that_differ_by_a_power_of_two_are_refused():
    model, optimizer = started()
    optimizer._balancer.record.steps += on_rank_1(128, 0)
    losses = losses_of(model, share(2))
    with pytest.raises(BalanceError, match="Found step 130 on rank 1 and 2 on rank 0"):
        optimizer.backward(losses)


@pytest.mark.parametrize(
    ("steps", "call"), [(0, "backward"), (2, "backward"), (0, "step"), (2, "step")]
)
def test_an_error_in_the_closure_of_one_rank_ends_the_call_on_all(steps, call):
    model, optimizer = started(steps=0)
    train(model, optimizer, range(steps), by_closure)

    def closure():
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        return losses_of(model, share(2))

    expected = on_rank_1(RuntimeError, BalanceError)
    with refused(model, optimizer, on_rank_1("out of", "could not compute"), expected):
        getattr(optimizer, call)(closure)


def test_features_that_one_rank_refuses_end_the_call_on_all():
    model, optimizer = started()
    losses = losses_of(model, share(2))
    features = on_rank_1(torch.ones(3), losses["a"])
    with refused(model, optimizer, on_rank_1("`features` should be a tensor", "could not comp")):
        optimizer.backward(losses, features=features)
