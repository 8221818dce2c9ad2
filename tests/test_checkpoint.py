"""A run that stops and resumes is the run that did not stop, to the last bit."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    BalanceValueError,
    Sum,
)
from tests.problems import Toy, adam, setup, snapshot, train, whole_state
from tests.support.registry import NAMES, over_methods, over_some

pytestmark = pytest.mark.capability("checkpoint and resume to the last bit")

STEPS = 10

# Adam, because it remembers most.
begin = partial(setup, optimizer=adam)


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def resumed(method, checkpoint, **arguments):
    """Fresh objects, filled from a file as one would get it from a stranger."""
    model, optimizer = begin(method, **arguments)
    found = torch.load(io.BytesIO(checkpoint), weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return model, optimizer


@over_methods
def test_resume_is_bit_exact_at_every_split(method):
    """From the middle to the end; from each step for as long as any method looks ahead."""
    model, optimizer = begin(method)
    checkpoints, states = [], []
    for step in range(STEPS):
        checkpoints.append(saved(model, optimizer))
        states.append(whole_state(model, optimizer))
        train(model, optimizer, [step])
    states.append(whole_state(model, optimizer))
    for step, checkpoint in enumerate(checkpoints):
        stop = STEPS if step == STEPS // 2 else min(step + 3, STEPS)
        model, optimizer = resumed(method, checkpoint)
        assert whole_state(model, optimizer) == states[step]
        train(model, optimizer, range(step, stop))
        assert whole_state(model, optimizer) == states[stop], f"split before step {step}"


@over_methods
def test_resume_is_bit_exact_between_the_parts_of_a_step(method):
    """Saved behind backward (which is then repeated), and between step and observe."""

    def backward(model, optimizer, step):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))

    def advance(model, optimizer, step):
        optimizer.step()

    def look(model, optimizer, step):
        if method.observes:
            optimizer.observe(model.losses(step))

    def finish(model, optimizer, step, parts):
        for part in parts:
            part(model, optimizer, step)
        for later in range(step + 1, 4):
            for part in (backward, advance, look):
                part(model, optimizer, later)

    model, optimizer = begin(method)
    checkpoints = []
    for step in range(4):
        backward(model, optimizer, step)
        checkpoints.append((step, (backward, advance, look), saved(model, optimizer)))
        advance(model, optimizer, step)
        checkpoints.append((step, (look,), saved(model, optimizer)))
        look(model, optimizer, step)
    end = whole_state(model, optimizer)
    for step, parts, checkpoint in checkpoints:
        model, optimizer = resumed(method, checkpoint)
        finish(model, optimizer, step, parts)
        assert whole_state(model, optimizer) == end, f"split in step {step} before {parts[0]}"


@over_methods
def test_the_entry_holds_tensors_and_primitives_only(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(2))

    def leaves(value):
        if isinstance(value, (dict, list)):
            for entry in value.values() if isinstance(value, dict) else value:
                yield from leaves(entry)
        else:
            yield value

    allowed = (torch.Tensor, str, int, float, type(None))
    assert all(type(leaf) in allowed for leaf in leaves(optimizer.state_dict()["balance"]))


@over_methods
def test_a_state_dict_is_a_copy_not_a_window(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(2))
    balance = optimizer.state_dict()["balance"]
    before = snapshot(balance)
    train(model, optimizer, range(2, 4))
    assert snapshot(balance) == before
    after = whole_state(model, optimizer)
    for value in balance["state"].values():
        value.zero_()
    assert whole_state(model, optimizer) == after


@over_methods
def test_a_loaded_state_does_not_alias_what_was_loaded(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(2))
    checkpoint = optimizer.state_dict()
    model, optimizer = begin(method)
    optimizer.load_state_dict(checkpoint)
    before = snapshot(checkpoint["balance"])
    train(model, optimizer, range(2, 4))
    assert snapshot(checkpoint["balance"]) == before


@over_methods
def test_a_plain_optimizer_loads_ours(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(3))
    plain = adam(model)
    plain.load_state_dict(optimizer.state_dict())
    assert snapshot(plain.state_dict()) == snapshot(optimizer.optimizer.state_dict())


@over_methods
def test_a_plain_checkpoint_loads_and_leaves_the_balance_alone(method):
    """It has nothing to say about losses; others carry the balance beside it."""
    model, optimizer = begin(method)
    train(model, optimizer, range(3))
    plain = optimizer.optimizer.state_dict()

    for steps in (0, 2):
        model, optimizer = begin(method)
        train(model, optimizer, range(steps))
        before = snapshot(optimizer.state_dict()["balance"])
        optimizer.load_state_dict(plain)
        assert snapshot(optimizer.optimizer.state_dict()) == snapshot(plain)
        assert snapshot(optimizer.state_dict()["balance"]) == before
        train(model, optimizer, range(2, 4))


@over_some("FAMO-adam")
def test_loading_discards_what_was_staged(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(2))
    checkpoint = saved(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(lambda: model.losses(17))
    optimizer.load_state_dict(torch.load(io.BytesIO(checkpoint), weights_only=True)["optimizer"])
    before = whole_state(model, optimizer)
    with pytest.raises(Exception, match="should follow `backward`"):
        optimizer.step()
    assert whole_state(model, optimizer) == before


@over_some("FAMO-adam")
def test_losses_that_come_in_another_order_keep_their_state(method):
    """The names travel with the checkpoint; the order of a dict does not matter."""
    model, optimizer = begin(method)
    train(model, optimizer, range(4))
    end = optimizer.state_dict()["balance"]
    checkpoint = saved(model, optimizer)

    model, optimizer = resumed(method, checkpoint, loss_names=NAMES[::-1])
    assert snapshot(optimizer.state_dict()["balance"]) == snapshot(end)
    optimizer.backward(dict(reversed(model.losses(4).items())))
    assert tuple(optimizer.metrics.losses) == NAMES


def mismatched():
    """Entries that do not fit an optimizer over FAMO(), and what the message has to say."""

    def edited(**changes):
        def edit(balance):
            balance.update(changes)

        return edit

    def without(key):
        return lambda balance: balance.pop(key)

    yield "method", edited(weighting="MGDA"), "should come from FAMO. Found MGDA"
    yield "names", edited(names=["a", "b", "d"]), r"losses \['a', 'b', 'c'\]"
    yield "fewer", edited(names=["a", "b"]), r"Found \['a', 'b'\]"
    yield "format", edited(format=99), "Found 99"
    yield "incomplete", without("steps"), "without `steps`"
    yield "bare", lambda balance: balance.clear(), "format"
    yield "settings", lambda balance: balance["state"].pop("exp_avg"), "other settings"
    yield (
        "shapes",
        lambda balance: balance["state"].update(logits=torch.zeros(2)),
        "other settings",
    )


@pytest.mark.parametrize(
    ("edit", "message"), [row[1:] for row in mismatched()], ids=[row[0] for row in mismatched()]
)
@over_some("FAMO-adam")
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(method, edit, message):
    model, optimizer = begin(method)
    train(model, optimizer, range(3))
    checkpoint = copy.deepcopy(optimizer.state_dict())  # torch's own part is no copy
    edit(checkpoint["balance"])
    train(model, optimizer, range(3, 5))
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    assert whole_state(model, optimizer) == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (FAMO(logit_optimizer="sgd"), FAMO()),
        (FAMO(), FAMO(logit_optimizer="sgd")),
        (MGDA(every=3), MGDA()),
        (MGDA(), MGDA(every=3)),
        (Sum(), AnalyticQP()),
    ],
    ids=repr,
)
def test_a_checkpoint_of_other_settings_is_refused(before, after):
    model = Toy()
    optimizer = BalancedOptimizer(adam(model), before)
    train(model, optimizer, range(2))
    with pytest.raises(BalanceValueError, match="`balance`"):
        BalancedOptimizer(adam(model), after).load_state_dict(optimizer.state_dict())


def test_a_wrapped_checkpoint_that_does_not_fit_leaves_the_balance_alone():
    model = Toy()
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    train(model, optimizer, range(3))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"] = []
    train(model, optimizer, range(3, 5))
    before = whole_state(model, optimizer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(checkpoint)
    assert whole_state(model, optimizer) == before


def test_a_fresh_checkpoint_loads():
    """Saved before the first step: names unknown, nothing to remember."""
    model = Toy()
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    other = BalancedOptimizer(adam(model), FAMO(lagged=True))
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(2))


@over_methods
def test_names_declared_before_the_first_step_travel_too(method):
    optimizer, other = begin(method, loss_names=NAMES)[1], begin(method)[1]
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["balance"]["names"] == list(NAMES)


@over_some("FAMO-lagged", "MGDA-every")
def test_a_scheduler_and_clipping_resume_too(method):
    def run(model, optimizer, scheduler, steps):
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(model.losses(step))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()

    def scheduled(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)

    model, optimizer = begin(method)
    scheduler = scheduled(optimizer)
    run(model, optimizer, scheduler, range(4))
    checkpoint, schedule = saved(model, optimizer), scheduler.state_dict()
    run(model, optimizer, scheduler, range(4, STEPS))
    end = whole_state(model, optimizer)

    model, optimizer = resumed(method, checkpoint)
    scheduler = scheduled(optimizer)
    scheduler.load_state_dict(schedule)
    optimizer.load_state_dict(torch.load(io.BytesIO(checkpoint), weights_only=True)["optimizer"])
    run(model, optimizer, scheduler, range(4, STEPS))
    assert whole_state(model, optimizer) == end
