"""A run that stops, or is killed, and resumes is the run that did not stop, to the last bit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from functools import partial
from pathlib import Path

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
from tests.support import resumable_run
from tests.support.problems import SmallModel, adam, setup, snapshot, train, whole_state
from tests.support.registry import NAMES, over_each_method, over_kinds, over_some

pytestmark = pytest.mark.capability("checkpoint and resume to the last bit")

STEPS = 10

# Adam, because it has the most state.
begin = partial(setup, optimizer=adam)


def save(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def resume(method, checkpoint, **arguments):
    """Fresh objects, filled from a file that may hold nothing but tensors and primitives."""
    model, optimizer = begin(method, **arguments)
    loaded = torch.load(io.BytesIO(checkpoint), weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return model, optimizer


@over_each_method
def test_resume_is_bit_exact_at_every_split(method):
    """From the middle to the end; from each other step for three steps."""
    model, optimizer = begin(method)
    checkpoints, states = [], []
    for step in range(STEPS):
        checkpoints.append(save(model, optimizer))
        states.append(whole_state(model, optimizer))
        train(model, optimizer, [step])
    states.append(whole_state(model, optimizer))
    for step, checkpoint in enumerate(checkpoints):
        stop = STEPS if step == STEPS // 2 else min(step + 3, STEPS)
        model, optimizer = resume(method, checkpoint)
        assert whole_state(model, optimizer) == states[step]
        train(model, optimizer, range(step, stop))
        assert whole_state(model, optimizer) == states[stop], f"split before step {step}"


@over_kinds
def test_resume_is_bit_exact_between_the_parts_of_a_step(method):
    """Saved after backward (which is then repeated), and between step and observe."""

    def backward(model, optimizer, step):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))

    def advance(model, optimizer, step):
        optimizer.step()

    def observe(model, optimizer, step):
        if method.observes:
            optimizer.observe(model.losses(step))

    def finish(model, optimizer, step, parts):
        for part in parts:
            part(model, optimizer, step)
        for later in range(step + 1, 4):
            for part in (backward, advance, observe):
                part(model, optimizer, later)

    model, optimizer = begin(method)
    checkpoints = []
    for step in range(4):
        backward(model, optimizer, step)
        checkpoints.append((step, (backward, advance, observe), save(model, optimizer)))
        advance(model, optimizer, step)
        checkpoints.append((step, (observe,), save(model, optimizer)))
        observe(model, optimizer, step)
    end = whole_state(model, optimizer)
    for step, parts, checkpoint in checkpoints:
        model, optimizer = resume(method, checkpoint)
        finish(model, optimizer, step, parts)
        assert whole_state(model, optimizer) == end, f"split in step {step} before {parts[0]}"


@over_kinds
def test_the_balance_entry_holds_tensors_and_primitives_only(method):
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


@over_kinds
def test_a_state_dict_is_a_copy(method):
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


@over_kinds
def test_a_loaded_state_does_not_alias_what_was_loaded(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(2))
    checkpoint = optimizer.state_dict()
    model, optimizer = begin(method)
    optimizer.load_state_dict(checkpoint)
    before = snapshot(checkpoint["balance"])
    train(model, optimizer, range(2, 4))
    assert snapshot(checkpoint["balance"]) == before


@over_kinds
def test_a_plain_optimizer_loads_our_state_dict(method):
    model, optimizer = begin(method)
    train(model, optimizer, range(3))
    plain = adam(model)
    plain.load_state_dict(optimizer.state_dict())
    assert snapshot(plain.state_dict()) == snapshot(optimizer.optimizer.state_dict())


@over_kinds
def test_a_plain_checkpoint_loads_and_keeps_the_balance(method):
    """It holds nothing about losses; some checkpoints keep the balance elsewhere."""
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
    checkpoint = save(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(lambda: model.losses(17))
    optimizer.load_state_dict(torch.load(io.BytesIO(checkpoint), weights_only=True)["optimizer"])
    before = whole_state(model, optimizer)
    with pytest.raises(Exception, match="should follow `backward`"):
        optimizer.step()
    assert whole_state(model, optimizer) == before


@over_some("FAMO-adam")
def test_losses_that_come_in_another_order_keep_their_state(method):
    """The names are saved with it; the order of a dict does not matter."""
    model, optimizer = begin(method)
    train(model, optimizer, range(4))
    end = optimizer.state_dict()["balance"]
    checkpoint = save(model, optimizer)

    model, optimizer = resume(method, checkpoint, loss_names=NAMES[::-1])
    assert snapshot(optimizer.state_dict()["balance"]) == snapshot(end)
    optimizer.backward(dict(reversed(model.losses(4).items())))
    assert tuple(optimizer.metrics.losses) == NAMES


def mismatched():
    """Entries that do not fit an optimizer over FAMO(), and what the message should say."""

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
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), before)
    train(model, optimizer, range(2))
    changed = "" if type(before) is not type(after) else r".*(logit_optimizer|every).*saved with"
    with pytest.raises(BalanceValueError, match=f"`balance`{changed}"):
        BalancedOptimizer(adam(model), after).load_state_dict(optimizer.state_dict())


def test_a_wrapped_checkpoint_that_does_not_fit_keeps_the_balance():
    model = SmallModel()
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
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    other = BalancedOptimizer(adam(model), FAMO(lagged=True))
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(2))


@over_kinds
def test_loss_names_declared_before_the_first_step_are_saved(method):
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
    checkpoint, schedule = save(model, optimizer), scheduler.state_dict()
    run(model, optimizer, scheduler, range(4, STEPS))
    end = whole_state(model, optimizer)

    model, optimizer = resume(method, checkpoint)
    scheduler = scheduled(optimizer)
    scheduler.load_state_dict(schedule)
    optimizer.load_state_dict(torch.load(io.BytesIO(checkpoint), weights_only=True)["optimizer"])
    run(model, optimizer, scheduler, range(4, STEPS))
    assert whole_state(model, optimizer) == end


# ---------------------------------------------------------------------- killed runs


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """A folder for each of two runs that were killed three times each and went on."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.support.resumable_run", str(folder)]
    root = Path(__file__).parents[1]
    subprocess.run([*command, "FAMO-adam", "AnalyticQP"], cwd=root, check=True)
    return folder


@pytest.mark.capability("kill -9 and resume", "FAMO", "AnalyticQP")
@pytest.mark.parametrize("method", ["FAMO-adam", "AnalyticQP"])
def test_a_killed_run_resumes_to_the_last_bit(method, killed_runs, tmp_path):
    resumable_run.train(tmp_path, method)
    for name in ("final.pt", "checkpoint.pt"):
        expected = torch.load(tmp_path / name, weights_only=True)
        actual = torch.load(killed_runs / method / name, weights_only=True)
        assert snapshot(actual) == snapshot(expected)
