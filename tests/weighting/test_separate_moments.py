"""SeparateMoments: one optimizer per loss, against as many real ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from moo_balance import BalancedOptimizer, BalanceValueError, SeparateMoments, Sequential, Sum
from tests.support.companions import SAM
from tests.support.problems import SmallModel, snapshot, train, train_plainly
from tests.support.registry import NAMES

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "Adam-coupled": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW-fused": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, foreach=False),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
}
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def states(optimizer):
    """The states of the wrapped optimizer by parameter, loss and name."""
    return optimizer.state_dict()["balance"].get("rows", {})


@over_optimizers
def test_one_loss_is_the_plain_optimizer_bit_for_bit(make):
    model, plain = SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(make(model.parameters()), SeparateMoments())
    other = make(plain.parameters())
    train(model, optimizer, range(5), ("b",))
    train_plainly(plain, other, range(5), ("b",))
    assert snapshot(model.state_dict()) == snapshot(plain.state_dict())
    expected = other.state_dict()["state"]
    for k, each in states(optimizer).items():
        assert snapshot(each["b"]) == snapshot(expected[k])


@over_optimizers
def test_each_loss_has_the_step_that_it_would_take_alone(make):
    """K real optimizers on copies of the model, and the mean of where they lead."""
    model = SmallModel()
    optimizer = BalancedOptimizer(make(model.parameters()), SeparateMoments())
    copies = {name: copy.deepcopy(model) for name in NAMES}
    others = {name: make(net.parameters()) for name, net in copies.items()}
    for step in range(4):
        ends = []
        for name, net in copies.items():
            net.load_state_dict(model.state_dict())
            train_plainly(net, others[name], [step], (name,))
            ends.append(torch.nn.utils.parameters_to_vector(net.trunk.parameters()))
        train(model, optimizer, [step])
        own = torch.nn.utils.parameters_to_vector(model.trunk.parameters())
        torch.testing.assert_close(own, torch.stack(ends).mean(0), rtol=1e-12, atol=1e-14)
        for k, name in enumerate(NAMES):
            assert torch.equal(model.heads[k].weight, copies[name].heads[k].weight)


@pytest.mark.parametrize("make", [OPTIMIZERS["Adam"], OPTIMIZERS["AdamW"]], ids=["Adam", "AdamW"])
def test_steps_do_not_depend_on_the_scale_of_a_loss(make):
    ends = []
    for factors in ({}, {"a": 1e6, "c": 1e-3}):
        model = SmallModel()
        inner = make(model.parameters())
        inner.param_groups[0]["eps"] = 1e-30
        optimizer = BalancedOptimizer(inner, SeparateMoments())
        for step in range(5):
            optimizer.zero_grad()
            losses = model.losses(step)
            optimizer.backward({k: factors.get(k, 1.0) * loss for k, loss in losses.items()})
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_weight_decay_acts_once():
    """With gradients that cancel in no way: AdamW without a learning signal only decays."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer, before = BalancedOptimizer(inner, SeparateMoments()), model.weight.detach().clone()
    loss = model.weight.sum()
    optimizer.backward({"up": loss, "down": -loss, "twice": 2 * loss, "back": -2 * loss})
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before, rtol=1e-12, atol=1e-14)


def test_preferences_are_what_each_step_counts():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = BalancedOptimizer(
        torch.optim.Adam([w], lr=0.1), SeparateMoments({"a": 1.0, "b": 3.0})
    )
    optimizer.backward({"a": w.sum(), "b": 1000 * (w[0] - w[1])})
    optimizer.step()
    expected = torch.tensor([-0.1, 0.05], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=1e-9)


def test_gradients_that_a_caller_sees_are_the_mean():
    model = SmallModel()
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters()), SeparateMoments())
    optimizer.backward(model.losses())
    seen = snapshot([p.grad for p in model.parameters()])
    optimizer.step()
    assert snapshot([p.grad for p in model.parameters()]) == seen
    assert not optimizer.optimizer.state


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_and_a_checkpoint_go_on_bit_for_bit(duplicate):
    make = OPTIMIZERS["AdamW"]
    model = SmallModel()
    optimizer = BalancedOptimizer(make(model.parameters()), SeparateMoments())
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    copied = duplicate((model, optimizer))
    fresh = SmallModel()
    fresh.load_state_dict(saved[0])
    resumed = fresh, BalancedOptimizer(make(fresh.parameters()), SeparateMoments())
    resumed[1].load_state_dict(saved[1])
    ends = []
    for net, run in ((model, optimizer), copied, resumed):
        train(net, run, range(3, 6))
        ends.append(snapshot((net.state_dict(), run.state_dict())))
    assert ends[0] == ends[1] == ends[2]


def test_a_scheduler_counts_steps_once():
    model = SmallModel()
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=1.0), SeparateMoments())
    scheduler = ExponentialLR(optimizer, 0.5)
    for step in range(2):
        train(model, optimizer, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert {float(s["step"]) for each in states(optimizer).values() for s in each.values()} == {2.0}


class _Counting:
    """Counts its steps in an option of the group, as schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


class Counting(_Counting, torch.optim.SGD):
    pass


class CountingAdam(_Counting, torch.optim.Adam):
    pass


def test_options_that_count_steps_count_once():
    model = SmallModel()
    optimizer = BalancedOptimizer(Counting(model.parameters(), lr=0.1), SeparateMoments())
    train(model, optimizer, range(3))
    assert optimizer.param_groups[0]["k"] == 3


def test_an_absent_loss_keeps_its_state():
    model = SmallModel()
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters()), SeparateMoments())
    train(model, optimizer, range(2))
    before = snapshot({k: each.get("b") for k, each in states(optimizer).items()})
    train(model, optimizer, range(2, 4), ("a", "c"))
    assert snapshot({k: each.get("b") for k, each in states(optimizer).items()}) == before


def test_a_step_that_fails_leaves_all_as_it_was(monkeypatch):
    """And can be taken again."""
    ends = []
    for fails in (False, True):
        model = SmallModel()
        optimizer = BalancedOptimizer(CountingAdam(model.parameters(), lr=0.1), SeparateMoments())
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        optimizer.backward(model.losses(2))
        before = snapshot([[(p, p.grad) for p in model.parameters()], optimizer.state_dict()])
        if fails:
            calls, step = [], optimizer.optimizer.step

            def fail():
                calls.append(step())  # noqa: B023
                if len(calls) == 2:  # noqa: B023
                    raise RuntimeError("out of memory")

            with monkeypatch.context() as patch:
                patch.setattr(optimizer.optimizer, "step", fail)
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
            after = snapshot([[(p, p.grad) for p in model.parameters()], optimizer.state_dict()])
            assert after == before
        optimizer.step()
        ends.append(snapshot([model.state_dict(), optimizer.state_dict()]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])
def test_the_state_of_a_satisfied_loss_stays_as_that_of_an_absent_one(on_device, monkeypatch):
    if on_device:
        monkeypatch.setattr("moo_balance._nonfinite.is_on_cpu", lambda tensor: False)
    ends = []
    for present in (True, False):
        model = SmallModel()
        inner = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = BalancedOptimizer(inner, SeparateMoments(), loss_names=NAMES)
        for step in range(4):
            losses = model.losses(step)
            if step == 2:
                losses["b"] = 0.0 * losses["b"]
                if not present:
                    del losses["b"]
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        ends.append(snapshot([model.state_dict(), states(optimizer)]))
    assert ends[0] == ends[1]


def test_an_optimizer_with_two_steps_is_refused():
    inner = SAM(SmallModel().parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(BalanceValueError, match=r"SeparateMoments.*takes two"):
        BalancedOptimizer(inner, SeparateMoments())
    model = SmallModel()
    inner = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer = BalancedOptimizer(inner, Sequential([Sum(), SeparateMoments()], [1]))
    optimizer.backward(model.losses())
    optimizer.first_step(zero_grad=True)
    optimizer.backward(model.losses())
    optimizer.second_step(zero_grad=True)
    with pytest.raises(BalanceValueError, match=r"SeparateMoments.*takes two"):
        optimizer.backward(model.losses(1))


def test_zeros_of_a_compiled_model_are_no_gradients():
    """They would share the step of a head that they do not reach."""
    w, v = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = BalancedOptimizer(torch.optim.Adam([w, v], lr=0.1), SeparateMoments())
    optimizer.backward({"a": w.sum() + 0 * v.sum(), "b": (w * v).sum()})
    optimizer.step()
    torch.testing.assert_close(v.detach(), torch.full_like(v, 0.9), rtol=1e-7, atol=0)
    assert list(states(optimizer)[1]) == ["b"]
