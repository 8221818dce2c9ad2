"""Entries that do not fit are refused before anything changes; what differs is named."""

from __future__ import annotations

import copy
import json
import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moo_balance import (
    FAMO,
    MGDA,
    BalancedOptimizer,
    BalanceError,
    BalanceValueError,
    MovingAverage,
    SumLog,
    Tchebycheff,
)
from tests.support.problems import SmallModel, adam, setup, snapshot, train, whole_state
from tests.support.registry import NAMES, over_each_method, over_kinds, over_some

# Key, value, and what the message must say.
MALFORMED = [
    ("format", 2.0, "Found 2.0"),
    ("format", torch.ones(2), "format 2"),
    ("weighting", None, "Found None"),
    ("weighting", torch.ones(2), "should come from"),
    ("names", "abc", "`names`.*Found 'abc'"),
    ("names", 3, "`names`.*Found 3"),
    ("names", ["a", "b", 3], "`names`.*3"),
    ("names", ["a", "b", "b"], "`names`.*distinct"),
    ("names", ["a", ""], "`names`.*non-empty"),
    ("names", [], "`names`.*2 steps. Found none"),
    ("names", ["a", "b", "rat"], "Found .*rat"),
    ("steps", -1, "`steps`.*Found -1"),
    ("steps", 2.0, "`steps`.*Found 2.0"),
    ("steps", "2", "`steps`.*Found '2'"),
    ("steps", True, "`steps`.*Found True"),
    ("steps", None, "`steps`.*Found None"),
    ("steps", torch.tensor([1, 2]), "`steps`.*Found tensor"),
    ("steps", 0, "should hold nothing"),
    ("skipped", -3, "`skipped`.*Found -3"),
    ("skipped", None, "`skipped`.*Found None"),
    ("awaiting", "a", "`awaiting`.*Found 'a'"),
    ("awaiting", ["rat"], r"`awaiting`.*Found \['rat'\]"),
    ("awaiting", ["a", "a"], "`awaiting`.*distinct"),
    ("awaiting", [], "`awaiting`.*Found none"),
    ("awaiting", 0, "`awaiting`.*Found 0"),
    ("state", None, "`state`.*Found NoneType"),
    ("state", [1.0], "`state`.*Found list"),
    ("state", {1: torch.ones(3)}, "`state`"),
    ("settings", 3, "`settings`.*Found 3"),
    ("settings", {"lr": 0.1}, "`settings`"),
]

# The same for one entry of the state of FAMO().
MALFORMED_LOGITS = [
    (torch.full((3,), math.nan), "logits.*finite"),
    (torch.tensor([0.0, math.inf, 0.0]), "logits.*finite"),
    (torch.ones(3, dtype=torch.complex64), "logits.*float64.*complex64"),
    (torch.ones(3, 1), "other settings"),
    (torch.ones(3).to_sparse(), "logits.*dense"),
    (torch.ones(3, device="meta"), "logits.*dense"),
    (None, "logits.*dense tensor"),
    ("rubbish", "logits.*dense tensor"),
    (["x", "y", "z"], "logits.*numbers"),
    ([[1.0], [2.0, 3.0]], "logits.*numbers"),
    ([10**400, 0, 0], "logits.*numbers"),
]


def trained(method, steps=2):
    model, optimizer = setup(method, optimizer=adam)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_refused(model, optimizer, load, message):
    before = whole_state(model, optimizer)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(BalanceValueError, match=message):
        load()
    assert whole_state(model, optimizer) == before
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize(("key", "value", "message"), MALFORMED, ids=lambda v: f"{v}"[:30])
@over_some("FAMO-adam")
def test_a_malformed_entry_is_refused_and_changes_nothing(method, key, value, message):
    model, optimizer = trained(method)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["balance"][key] = value
    train(model, optimizer, [2])
    assert_refused(model, optimizer, lambda: optimizer.load_state_dict(checkpoint), message)
    if key not in ("format", "weighting", "names"):  # where a fresh optimizer knows more
        fresh, other = setup(method, optimizer=adam)
        with pytest.raises(BalanceValueError, match=message):
            other.load_state_dict(checkpoint)
        assert whole_state(fresh, other) == whole_state(*setup(method, optimizer=adam))


@pytest.mark.parametrize(("value", "message"), MALFORMED_LOGITS, ids=lambda v: f"{v}"[:30])
@over_some("FAMO-adam")
def test_a_malformed_state_is_refused_and_changes_nothing(method, value, message):
    model, optimizer = trained(method)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["balance"]["state"]["logits"] = value
    train(model, optimizer, [2])
    assert_refused(model, optimizer, lambda: optimizer.load_state_dict(checkpoint), message)


@pytest.mark.parametrize(
    "key", ["format", "weighting", "names", "steps", "skipped", "awaiting", "state"]
)
@over_some("FAMO-adam")
def test_a_missing_part_is_named_and_no_other_version_blamed(method, key):
    _, optimizer = trained(method)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    del checkpoint["balance"][key]
    with pytest.raises(BalanceValueError, match=f"without `{key}`. Remove the entry") as caught:
        optimizer.load_state_dict(checkpoint)
    assert "another version" not in str(caught.value)


@over_some("FAMO-adam")
def test_only_the_part_of_the_state_that_differs_is_named(method):
    _, optimizer = trained(method)
    for edit, message in (
        (lambda state: state.update(logits=torch.ones(2)), r"{'logits': \(3,\)}.*{'logits': \(2,"),
        (lambda state: state.pop("logits"), r"hold {'logits': \(3,\)} for .* Found nothing"),
        (lambda state: state.update(more=torch.ones(2)), r"hold nothing for .*{'more': \(2,\)}"),
    ):
        checkpoint = copy.deepcopy(optimizer.state_dict())
        edit(checkpoint["balance"]["state"])
        with pytest.raises(BalanceValueError, match=f"{message}.*or is damaged") as caught:
            optimizer.load_state_dict(checkpoint)
        assert "exp_avg" not in str(caught.value)


@pytest.mark.parametrize("balance", [None, 3, "text", [], ["format"]], ids=str)
@over_some("SumLog", "FAMO-adam")
def test_an_entry_that_is_no_mapping_is_refused(method, balance):
    model, optimizer = trained(method)
    checkpoint = {**optimizer.state_dict(), "balance": balance}
    assert_refused(
        model, optimizer, lambda: optimizer.load_state_dict(checkpoint), "should be a mapping"
    )
    assert_refused(
        model, optimizer, lambda: optimizer.load_state_dict(balance), "should be a mapping"
    )


@pytest.mark.parametrize(
    "saved",
    [
        *(None, 3, {}, {"balance": None}, {"balance": 3}, {"balance": "{"}, {"balance": "[1]"}),
        *({"balance": "null"}, {"balance": "[" * 100_000}),
    ],
    ids=lambda saved: f"{saved}"[:30],
)
@over_some("SumLog", "FAMO-adam")
def test_a_text_that_is_no_balance_is_refused(method, saved):
    model, optimizer = trained(method)
    load = optimizer.balance_state.load_state_dict
    assert_refused(model, optimizer, lambda: load(saved), "JSON text")


@over_some("FAMO-adam")
def test_a_text_with_a_malformed_entry_is_refused(method):
    model, optimizer = trained(method)
    for key, value in (("steps", -1), ("state", 3), ("awaiting", ["rat"]), ("names", "abc")):
        saved = json.loads(optimizer.balance_state.state_dict()["balance"])
        saved[key] = value
        text = {"balance": json.dumps(saved)}
        load = optimizer.balance_state.load_state_dict
        assert_refused(model, optimizer, lambda text=text: load(text), f"`{key}`")  # noqa: B023


def test_values_that_a_method_begins_with_are_no_fault():
    """NaN for losses that were never seen, or infinity as the least value so far."""
    for weighting in (FAMO(lagged=True), Tchebycheff(ideal="running"), MovingAverage(MGDA())):
        model = SmallModel()
        optimizer = BalancedOptimizer(adam(model), weighting, loss_names=NAMES)
        train(model, optimizer, range(2), ("a", "b"))
        saved = optimizer.state_dict()
        values = [value for value in saved["balance"]["state"].values() if value.ndim]
        assert not all(bool(value.isfinite().all()) for value in values)
        other = BalancedOptimizer(adam(model), weighting)
        other.load_state_dict(saved)
        assert snapshot(other.state_dict()) == snapshot(saved)


# ---------------------------------------------------------------------- mutated entries

RUBBISH = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(), st.sampled_from([*NAMES, "rat"])), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([(), (3,), (2,), (3, 3)]).map(torch.ones),
    st.sampled_from([torch.int64, torch.bool, torch.complex64]).map(
        lambda dtype: torch.ones(3, dtype=dtype)
    ),
    st.just(torch.full((3,), math.nan)),
    st.just(object()),
)


@cache
def checkpoint_of(id):
    from tests.support.registry import METHODS

    method = next(row for row in METHODS if row.id == id)
    model, optimizer = trained(method)
    optimizer.zero_grad()
    optimizer.backward(model.losses(2))
    optimizer.step()  # which leaves a method that observes waiting
    return method, copy.deepcopy(optimizer.state_dict())


def paths(value, path=()):
    """All places in nested mappings."""
    for key, entry in value.items():
        yield (*path, key)
        if isinstance(entry, dict):
            yield from paths(entry, (*path, key))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), id=st.sampled_from(["FAMO-adam", "MGDA-every", "MovingAverage-FAMO"]))
def test_a_mutated_checkpoint_loads_whole_or_changes_nothing(data, id):
    method, valid = checkpoint_of(id)
    checkpoint = copy.deepcopy(valid)
    for path in data.draw(st.lists(st.sampled_from([*paths(valid)]), min_size=1, max_size=2)):
        inner = checkpoint
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            remove = data.draw(st.booleans())
            inner.pop(path[-1], None) if remove else inner.update({path[-1]: data.draw(RUBBISH)})
    model, optimizer = setup(method, optimizer=adam)
    train(model, optimizer, range(1))
    before = snapshot(optimizer.state_dict()["balance"])
    whole = whole_state(model, optimizer)
    intact = snapshot(
        {key: value for key, value in checkpoint.items() if key != "balance"}
    ) == snapshot({key: value for key, value in valid.items() if key != "balance"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer.load_state_dict(checkpoint)
        except BalanceValueError:
            assert whole_state(model, optimizer) == whole
            return
        except Exception:
            # The wrapped optimizer's own error, about its own part.
            assert not intact
            assert snapshot(optimizer.state_dict()["balance"]) == before
            return
    if intact:  # what loads can be used
        if optimizer.state_dict()["balance"]["awaiting"]:
            losses = model.losses(2, optimizer.state_dict()["balance"]["awaiting"])
            optimizer.observe(losses)
        train(model, optimizer, range(3, 5))
        assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "edit",
    [
        lambda saved: saved.pop("param_groups"),
        lambda saved: saved.pop("state"),
        lambda saved: saved.update(param_groups=[]),
        lambda saved: saved.update(param_groups=3),
        lambda saved: saved["param_groups"][0].update(params=[0]),
    ],
)
@over_some("FAMO-lagged", "MGDA-every")
def test_a_malformed_part_of_the_wrapped_optimizer_leaves_the_balance(method, edit):
    model, optimizer = trained(method)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    edit(checkpoint)
    train(model, optimizer, [2])
    before = whole_state(model, optimizer)
    with pytest.raises((KeyError, ValueError, TypeError)):
        optimizer.load_state_dict(checkpoint)
    assert whole_state(model, optimizer) == before


# ---------------------------------------------------------------------- other settings


def saved_with(weighting):
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), weighting)
    train(model, optimizer, range(2))
    return model, optimizer.state_dict()


@pytest.mark.parametrize(
    ("before", "after", "named", "unnamed"),
    [
        (FAMO(), FAMO(lr=0.1), ["lr=0.1", "saved with 0.025"], ["decay", "bounds"]),
        (FAMO(), FAMO(decay=0.0, every=3), ["decay=0 ", "every=3"], ["lr=", "shift"]),
        (MovingAverage(FAMO()), MovingAverage(FAMO(lr=0.1)), ["weighting.lr=0.1"], ["beta"]),
        (SumLog(bounds={"a": 0.0}), SumLog(bounds={"a": -1.0}), ["'a': -1"], ["shift"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else repr(value),
)
def test_a_warning_names_the_arguments_that_differ(before, after, named, unnamed):
    model, saved = saved_with(before)
    optimizer = BalancedOptimizer(adam(model), after)
    with pytest.warns(UserWarning, match="other arguments") as caught:
        optimizer.load_state_dict(saved)
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename == __file__
    assert all(argument in text for argument in named)
    assert not any(argument in text for argument in unnamed)
    assert snapshot(optimizer.state_dict()["balance"]["state"]) == snapshot(
        saved["balance"]["state"]
    )
    _, other = model, BalancedOptimizer(adam(model), before)
    other.load_state_dict(saved)
    with pytest.warns(UserWarning, match="other arguments"):
        optimizer.balance_state.load_state_dict(other.balance_state.state_dict())


def test_the_same_settings_and_entries_without_them_load_in_silence():
    model, saved = saved_with(FAMO())
    BalancedOptimizer(adam(model), FAMO()).load_state_dict(saved)
    saved["balance"].pop("settings")
    other = BalancedOptimizer(adam(model), FAMO(lr=0.1))
    other.load_state_dict(saved)
    assert other.state_dict()["balance"]["steps"] == 2


def test_equal_numbers_are_the_same_setting():
    model, saved = saved_with(SumLog(shift=1, bounds={"a": 0, "b": 0.0}))
    same = SumLog(shift=np.float64(1.0), bounds={"a": 0.0, "b": 0})
    BalancedOptimizer(adam(model), same).load_state_dict(saved)


def test_a_warning_that_is_an_error_changes_nothing():
    model, saved = saved_with(FAMO())
    optimizer = BalancedOptimizer(adam(model), FAMO(lr=0.1))
    before = whole_state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            optimizer.load_state_dict(saved)
    assert whole_state(model, optimizer) == before


# ---------------------------------------------------------------------- the step in progress


def steps_in_progress(model, optimizer):
    """What can be in progress when another state is loaded; each ends with what shows it."""

    def staged():
        optimizer.backward(model.losses(7))

    def window():
        with optimizer.accumulate():
            optimizer.backward(model.losses(7))

    def unobserved():
        optimizer.backward(model.losses(7))
        optimizer.step()

    return staged, window, unobserved


@pytest.mark.parametrize("part", [0, 1, 2], ids=["staged", "window", "unobserved"])
@over_kinds
def test_a_plain_checkpoint_drops_the_step_in_progress(method, part):
    model, optimizer = trained(method)
    plain = copy.deepcopy(optimizer.optimizer.state_dict())
    optimizer.zero_grad()
    steps_in_progress(model, optimizer)[part]()
    committed = snapshot(optimizer.state_dict()["balance"]["state"])
    optimizer.load_state_dict(plain)
    assert optimizer.metrics.names == ()
    assert optimizer.state_dict()["balance"]["awaiting"] is None
    assert snapshot(optimizer.state_dict()["balance"]["state"]) == committed
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()
    train(model, optimizer, range(3, 5))


@over_some("FAMO-adam", "MovingAverage-FAMO")
def test_the_two_parts_of_a_checkpoint_load_in_any_order(method):
    """Saved between a step and `observe`, which the resumed run still has to do."""
    model, optimizer = trained(method)
    optimizer.zero_grad()
    optimizer.backward(model.losses(2))
    optimizer.step()
    plain, balance = optimizer.optimizer.state_dict(), optimizer.balance_state.state_dict()
    model_state = copy.deepcopy(model.state_dict())
    plain = copy.deepcopy(plain)
    optimizer.observe(model.losses(2))
    train(model, optimizer, range(3, 5))
    for order in (1, -1):
        twin, other = trained(method, 1)
        parts = (
            lambda other=other: other.load_state_dict(copy.deepcopy(plain)),
            lambda other=other: other.balance_state.load_state_dict(balance),
        )
        twin.load_state_dict(model_state)
        for load in parts[::order]:
            load()
        other.observe(twin.losses(2))
        train(twin, other, range(3, 5))
        assert whole_state(twin, other) == whole_state(model, optimizer)


def test_a_checkpoint_before_observe_fits_a_method_without_a_second_evaluation():
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), FAMO())
    optimizer.backward(model.losses())
    optimizer.step()
    assert optimizer.state_dict()["balance"]["awaiting"] == [*NAMES]
    for form in (lambda each: each, lambda each: each.balance_state):
        other = BalancedOptimizer(adam(model), FAMO(lagged=True))
        with pytest.warns(UserWarning, match="lagged=True"):
            form(other).load_state_dict(form(optimizer).state_dict())
        train(model, other, range(2))


@over_each_method
def test_the_settings_of_every_method_survive_both_forms(method):
    model, optimizer = trained(method)
    other = BalancedOptimizer(adam(model), method.make(NAMES))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.balance_state.load_state_dict(optimizer.balance_state.state_dict())
    assert snapshot(other.state_dict()) == snapshot(optimizer.state_dict())
