"""Several optimizers in one BalancedOptimizer: the twin is a plain loop that steps each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from moo_balance import (
    MGDA,
    BalancedOptimizer,
    BalanceError,
    BalanceValueError,
    MoCo,
    SeparateMoments,
    Sum,
)
from tests.support.companions import SAM, ScheduleFree
from tests.support.problems import SmallModel, sgd, snapshot, train, train_plainly, whole_state
from tests.support.registry import over_kinds

pytestmark = pytest.mark.capability("several optimizers as one")

HAS_MUON = hasattr(torch.optim, "Muon")


def parts(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer for matrices, another one in two groups for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    first, *rest = [p for p in model.parameters() if p.ndim != 2]
    if HAS_MUON:
        one = torch.optim.Muon(matrices, lr=0.02)
    else:
        one = torch.optim.SGD(matrices, lr=0.002, momentum=0.9, nesterov=True)
    groups = [{"params": [first], "lr": 0.004}, {"params": rest}]
    return [one, torch.optim.AdamW(groups, lr=0.01)]


def together(weighting, **arguments):
    model = SmallModel()
    return model, BalancedOptimizer(parts(model), weighting, **arguments)


class Plain:
    """What a plain loop does with several optimizers."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def test_training_with_sum_is_a_plain_loop_over_both_to_the_last_bit():
    model, optimizer = together(Sum())
    twin = SmallModel()
    plain = Plain(parts(twin))
    train(model, optimizer, range(6))
    train_plainly(twin, plain, range(6))
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())
    for own, other in zip(optimizer.optimizer.optimizers, plain.optimizers, strict=True):
        assert snapshot(own.state_dict()) == snapshot(other.state_dict())


@pytest.mark.parametrize("weighting", [MGDA(), MoCo(), SeparateMoments()], ids=repr)
def test_one_optimizer_in_two_parts_is_the_same_optimizer(weighting):
    """The groups of one Adam as two Adams: also what is kept for each parameter and loss."""

    def groups(model):
        return [[*model.trunk.parameters()], [*model.heads.parameters()]]

    model, twin = SmallModel(), SmallModel()
    split = BalancedOptimizer([torch.optim.Adam(g, lr=0.01) for g in groups(model)], weighting)
    whole = torch.optim.Adam([{"params": g} for g in groups(twin)], lr=0.01)
    other = BalancedOptimizer(whole, weighting)
    train(model, split, range(4))
    train(twin, other, range(4))
    assert whole_state(model, split) == whole_state(twin, other)


# ---------------------------------------------------------------------- groups, state, schedulers


def test_groups_are_the_dicts_of_the_parts_also_after_loading():
    model, optimizer = together(Sum())
    train(model, optimizer, [0])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    own = [group for part in optimizer.optimizer.optimizers for group in part.param_groups]
    assert len(own) == 3
    assert all(a is b for a, b in zip(optimizer.param_groups, own, strict=True))


def test_the_state_is_a_view_of_theirs():
    model, optimizer = together(Sum())
    train(model, optimizer, [0])
    param = model.trunk.bias
    part = optimizer.optimizer.optimizers[1]
    assert optimizer.state[param] is part.state[param]
    assert len(optimizer.state) == len(list(model.parameters())) == len({*optimizer.state})
    optimizer.state[param]["note"] = 1
    assert part.state[param]["note"] == 1
    entry = optimizer.state.pop(param)
    assert param not in part.state
    assert param not in optimizer.state
    assert optimizer.state.get(param) is None
    optimizer.state.update({param: entry})
    assert part.state[param] is entry
    with pytest.raises(KeyError):
        optimizer.state.pop("nothing")
    whole = dict(optimizer.state)
    optimizer.state = whole
    assert part.state[param] is entry
    assert len(optimizer.optimizer.optimizers[0].state) + len(part.state) == len(whole)


def test_assigned_groups_reach_the_parts():
    model, optimizer = together(Sum())
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups = groups
    train(model, optimizer, [0])
    assert optimizer.optimizer.optimizers[1].param_groups[1] is groups[2]
    with pytest.raises(BalanceValueError, match=r"`param_groups`.*3 groups.*Found 2"):
        optimizer.param_groups = groups[:2]


@pytest.mark.parametrize("which", [0, 1, None])
def test_a_scheduler_of_one_part_or_of_all_works(which):
    def fall(step):
        return 0.5**step

    def run(model, step, optimizers, scheduled):
        scheduler = LambdaLR(scheduled, fall)
        for batch in range(4):
            step(model, optimizers, [batch])
            scheduler.step()
        return snapshot(model.state_dict())

    model, optimizer = together(Sum())
    scheduled = optimizer if which is None else optimizer.optimizer.optimizers[which]
    end = run(model, train, optimizer, scheduled)
    twin = SmallModel()
    plain = Plain(parts(twin))
    schedulers = [
        LambdaLR(part, fall) for k, part in enumerate(plain.optimizers) if which in (k, None)
    ]
    for batch in range(4):
        train_plainly(twin, plain, [batch])
        for scheduler in schedulers:
            scheduler.step()
    assert end == snapshot(twin.state_dict())


def test_defaults_are_what_all_parts_have():
    _, optimizer = together(Sum())
    assert {"lr", "weight_decay"} <= optimizer.defaults.keys()
    assert "betas" not in optimizer.defaults
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=4, cycle_momentum=False)


# ---------------------------------------------------------------------- checkpoints and copies


@over_kinds
def test_a_resumed_run_is_the_same_run(method):
    weighting = method.make(("a", "b", "c"))
    model, optimizer = together(weighting)
    train(model, optimizer, range(3))
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    assert set(saved[1]) == {"state", "param_groups", "balance"}
    train(model, optimizer, range(3, 6))
    twin, other = together(weighting)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(twin, other, range(3, 6))
    assert whole_state(model, optimizer) == whole_state(twin, other)


def test_the_state_dict_is_that_of_one_optimizer_with_all_groups():
    model = SmallModel()
    trunk, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    split = BalancedOptimizer([torch.optim.Adam(trunk), torch.optim.Adam(heads)], Sum())
    train(model, split, range(2))
    one = torch.optim.Adam([{"params": trunk}, {"params": heads}])
    saved = split.state_dict()
    saved.pop("balance")
    one.load_state_dict(saved)
    assert snapshot(one.state_dict()) == snapshot(saved)
    split.load_state_dict(one.state_dict())
    assert snapshot({**split.state_dict(), "balance": 0}) == snapshot({**saved, "balance": 0})


class Counting(torch.optim.SGD):
    """Its state dict has more than the form of PyTorch, and an entry of no parameter."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        self.state["total"] = {"steps": self.count}
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]


def test_what_a_part_saves_beyond_the_form_of_pytorch_is_loaded_again():
    def fresh():
        model = SmallModel()
        first = torch.optim.Adam(model.trunk.parameters())
        return model, BalancedOptimizer([first, Counting(model.heads.parameters())], Sum())

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    assert optimizer.state["total"] == {"steps": 3}
    _, other = fresh()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    part = other.optimizer.optimizers[1]
    assert part.count == 3
    assert part.state["total"] == {"steps": 3}
    assert "total" not in other.optimizer.optimizers[0].state
    assert snapshot(other.state_dict()) == snapshot(optimizer.state_dict())


def test_groups_of_other_optimizers_are_refused_before_anything_is_loaded():
    model, optimizer = together(Sum())
    train(model, optimizer, [0])
    saved = optimizer.state_dict()
    before = whole_state(model, optimizer)
    fewer = {**saved, "param_groups": saved["param_groups"][:2]}
    with pytest.raises(BalanceValueError, match=r"3 groups.*Found 2"):
        optimizer.load_state_dict(fewer)
    swapped = {**saved, "param_groups": saved["param_groups"][::-1]}
    with pytest.raises(BalanceValueError, match="order of the saved run"):
        optimizer.load_state_dict(swapped)
    assert whole_state(model, optimizer) == before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_copies_train_on_identically_and_independently(duplicate):
    pair = together(MGDA())
    train(*pair, range(2))
    other = duplicate(pair)
    before = whole_state(*pair)
    train(*other, range(2, 4))
    assert whole_state(*pair) == before
    train(*pair, range(2, 4))
    assert whole_state(*pair) == whole_state(*other)


# ---------------------------------------------------------------------- steps


def test_a_scaler_unscales_and_steps_all_parts():
    model, optimizer = together(MGDA())
    twin, other = together(MGDA())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch), grad_scaler=scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        other.backward(twin.losses(batch))
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        other.step()
    assert whole_state(model, optimizer) == whole_state(twin, other)


def test_a_scaler_that_was_given_a_part_is_refused():
    model, optimizer = together(MGDA())
    scaler = torch.amp.GradScaler("cpu")
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer.optimizer.optimizers[1])
    with pytest.raises(BalanceError, match="given the BalancedOptimizer"):
        scaler.step(optimizer)


def test_a_window_is_one_batch():
    model, optimizer = together(MGDA())
    twin, other = together(MGDA())
    for batch in range(2):
        optimizer.backward(model.losses(batch), last=batch == 1)
    sums = {k: loss + twin.losses(1)[k] for k, loss in twin.losses(0).items()}
    other.backward(sums)
    optimizer.step()
    other.step()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def test_hooks_of_the_wrapper_of_all_and_of_each_run_once():
    model, optimizer = together(Sum())
    calls = []
    every = optimizer.optimizer
    for name, each in {"wrapper": optimizer, "all": every, "part": every.optimizers[1]}.items():
        each.register_step_post_hook(lambda *_, name=name: calls.append(f"step {name}"))
        each.register_state_dict_post_hook(lambda *_, name=name: calls.append(f"save {name}"))
        each.register_load_state_dict_post_hook(lambda *_, name=name: calls.append(f"load {name}"))
    train(model, optimizer, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    expected = [
        f"{call} {name}" for call in ("step", "save", "load") for name in ("part", "all", "wrapper")
    ]
    assert calls == expected


def test_an_error_in_a_later_part_says_which_have_moved():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    model = SmallModel()
    first = torch.optim.Adam(model.trunk.parameters())
    optimizer = BalancedOptimizer([first, Failing(model.heads.parameters())], Sum())
    optimizer.backward(model.losses())
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        optimizer.step()
    (note,) = getattr(caught.value, "__notes__", ["Adam had taken its step, and Failing not"])
    assert "Adam had taken its step, and Failing not" in note
    assert optimizer.state_dict()["balance"]["steps"] == 0


def test_modes_reach_the_parts_that_have_them():
    model = SmallModel()
    free = ScheduleFree(model.trunk.parameters(), lr=0.01)
    optimizer = BalancedOptimizer([free, sgd(model.heads)], Sum())
    optimizer.eval()
    assert not free.param_groups[0]["train_mode"]
    optimizer.train()
    train(model, optimizer, [0])
    with pytest.raises(AttributeError):
        _ = optimizer.unheard_of
    both = [ScheduleFree(m.parameters(), lr=0.01) for m in (SmallModel(), SmallModel())]
    BalancedOptimizer(both, Sum()).eval()
    assert not any(each.param_groups[0]["train_mode"] for each in both)


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_one_of_several_is_refused():
    model = SmallModel()
    trunk, heads = model.trunk.parameters, model.heads.parameters
    rest = torch.optim.Adam(heads())

    def refuse(optimizers, message):
        with pytest.raises(BalanceValueError, match=f"`optimizer`.*{message}"):
            BalancedOptimizer(optimizers, Sum())

    refuse([], "empty list")
    refuse([rest, None], "NoneType")
    refuse([rest, torch.optim.LBFGS(trunk())], "LBFGS")
    refuse([rest, BalancedOptimizer(sgd(model.trunk), Sum())], "already wrapped")
    refuse([rest, SAM(trunk(), torch.optim.SGD, lr=0.1)], "SAM as one of several")
    shared = torch.optim.SGD([*trunk(), model.heads[0].bias], lr=0.1)
    refuse([rest, shared], r"shape \(1,\) in both Adam \(number 0\) and SGD \(number 1\)")
    refuse([rest, rest], r"in both Adam \(number 0\) and Adam \(number 1\)")

    class Asks(torch.optim.SGD):
        def step(self, closure):
            raise AssertionError("not reached")

    refuse([rest, Asks(trunk(), lr=0.1)], "Asks, whose `step` needs `closure`")


def test_a_group_is_added_to_a_part():
    model, optimizer = together(Sum())
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(BalanceValueError, match=r"added to one of.*optimizers\[0\]"):
        optimizer.add_param_group({"params": [extra]})
    optimizer.optimizers[1].add_param_group({"params": [extra]})
    optimizer.backward({**model.losses(), "d": extra.square().sum()})
    optimizer.step()
    assert bool((extra != 1).all())
    assert optimizer.state[extra]


def test_a_closure_is_evaluated_once():
    model = SmallModel()
    twin = SmallModel()
    several = BalancedOptimizer(parts(model), Sum()).optimizer
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = torch.stack([*model.losses().values()]).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert several.step(closure).ndim == 0
    assert calls == [True]
    train_plainly(twin, Plain(parts(twin)), [0])
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


def test_the_state_of_another_order_is_refused():
    """Groups have as many parameters, so only shapes tell them apart."""
    small, large = (torch.nn.Parameter(torch.ones(size)) for size in (2, 3))

    def make(*params):
        return BalancedOptimizer([torch.optim.Adam([p], lr=0.1) for p in params], Sum())

    optimizer, other = make(small, large), make(large, small)
    optimizer.backward({"a": small.sum(), "b": large.sum()})
    optimizer.step()
    before = snapshot(other.state_dict())
    with pytest.raises(BalanceValueError, match=r"of shape \(2,\) for a parameter of shape \(3,\)"):
        other.load_state_dict(optimizer.state_dict())
    assert snapshot(other.state_dict()) == before


def test_a_note_says_which_parts_had_loaded_before_one_failed():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = BalancedOptimizer([torch.optim.SGD([p], lr=0.1) for p in params], Sum())
    saved = optimizer.state_dict()

    def fail(state):
        raise RuntimeError("a fault of its own")

    optimizer.optimizer.optimizers[1].load_state_dict = fail
    with pytest.raises(RuntimeError, match="its own") as caught:
        optimizer.load_state_dict(saved)
    assert caught.value.__notes__ == ["The first 1 of the optimizers have loaded theirs."]
