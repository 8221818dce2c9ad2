"""What a method keeps of rows: when it changes, what it survives, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from moo_balance import (
    DBMTL,
    BalancedOptimizer,
    BalanceError,
    BalanceValueError,
    ExcessMTL,
    GradDrop,
    MoCo,
    MovingAverage,
    NonFiniteError,
    RowWeighting,
    SeparateMoments,
    Sequential,
    Sum,
    TrimmedMean,
)
from moo_balance.engine import Streaming
from moo_balance.weighting.rows import rows_of
from tests.support.problems import (
    NAMES,
    SmallModel,
    adam,
    flat_gradient,
    jacobian,
    snapshot,
    spoil_gradient,
    sum_losses,
    train,
    whole_state,
)

KEEPING = [MoCo(lr=0.01), DBMTL(beta=0.7), ExcessMTL(lr=0.5), SeparateMoments()]
ALL = [*KEEPING, GradDrop(), TrimmedMean()]
over_keeping = pytest.mark.parametrize("method", KEEPING, ids=lambda m: type(m).__name__)
over_all = pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)


@dataclass(frozen=True)
class Magnitudes(RowWeighting):
    """Weights by the ratio of the largest magnitude of the first loss to each mean."""

    uses_magnitudes = True

    every: int = 1

    def solve(self, statistics, gramian, state):
        rows = rows_of(statistics, self)
        return {"weights": rows.largest[0] / rows.mean}

    def coefficients(self, statistics, state):
        return state["weights"].to(statistics.losses)


def setup(method, dtype=torch.float64, **arguments):
    model = SmallModel().to(dtype)
    return model, BalancedOptimizer(adam(model), method, **arguments)


def rows_in(optimizer):
    return optimizer.state_dict()["balance"].get("rows", {})


# ---------------------------------------------------------------------- statistics


def magnitudes(rows):
    return rows[0].abs().amax() / rows.abs().mean(1)


@pytest.mark.parametrize("every", [1, 2])
def test_magnitudes_are_those_of_whole_rows(every):
    model, optimizer = setup(Magnitudes(every))
    for step in range(3):
        rows = jacobian(model.losses(step), list(model.parameters()))
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        if step % every == 0:
            expected = magnitudes(rows)
        own = torch.stack([*optimizer.metrics.coefficients.values()])
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=0)
        expected_gradient = expected @ rows
        torch.testing.assert_close(flat_gradient(model), expected_gradient, rtol=1e-10, atol=1e-13)
        optimizer.step()


def test_magnitudes_over_shared_parameters_only():
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), Magnitudes(), shared_params=model.trunk)
    optimizer.backward(model.losses())
    rows = jacobian(model.losses(), list(model.trunk.parameters()))
    own = torch.stack([*optimizer.metrics.coefficients.values()])
    torch.testing.assert_close(own, magnitudes(rows), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- when it changes


@over_keeping
def test_what_is_kept_is_staged_and_then_committed(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses())
    assert rows_in(optimizer) == {}
    optimizer.step()
    kept = rows_in(optimizer)
    heads = [[name] for name in NAMES for _ in ("weight", "bias")]
    assert [list(each) for each in kept.values()] == [[*NAMES], [*NAMES], *heads]
    before = snapshot(kept)
    optimizer.zero_grad()
    optimizer.backward(model.losses(1))
    optimizer.zero_grad()  # gives it up
    assert snapshot(rows_in(optimizer)) == before


@over_keeping
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_skipped_step_keeps_what_was_there(method, nonfinite):
    model, optimizer = setup(method, nonfinite=nonfinite)
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    optimizer.zero_grad()
    bad = spoil_gradient(model.losses(2), float("nan"))
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError):
            optimizer.backward(bad)
    else:
        optimizer.backward(bad)
        optimizer.step()
        assert optimizer.log_dict()["moo/skipped"] == 1
    after = whole_state(model, optimizer)
    after["optimizer"]["balance"]["skipped"] = before["optimizer"]["balance"]["skipped"]
    assert after == before
    train(model, optimizer, [3])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@over_all
def test_rows_that_are_masked_on_a_device_change_nothing(method, monkeypatch):
    """As on an accelerator, where the host does not read whether values are finite."""
    monkeypatch.setattr("moo_balance._nonfinite.is_on_cpu", lambda tensor: False)
    model, optimizer = setup(method, nonfinite="skip")
    twin, other = setup(method, nonfinite="skip")
    for step in range(4):
        optimizer.zero_grad()
        losses = model.losses(step)
        optimizer.backward(spoil_gradient(losses, float("nan")) if step == 2 else losses)
        optimizer.step()
        if step != 2:
            train(twin, other, [step])
    if not isinstance(method, GradDrop):  # draws depend on the number of the step only
        own, theirs = whole_state(model, optimizer), whole_state(twin, other)
        own["optimizer"]["balance"]["skipped"] = 0
        assert own == theirs


@over_all
def test_absent_losses_keep_what_is_theirs(method):
    model, optimizer = setup(method, loss_names=NAMES)
    train(model, optimizer, range(2), ("a", "b"))

    def kept():
        return snapshot([each["b"] for each in rows_in(optimizer).values() if "b" in each])

    before = kept()
    train(model, optimizer, range(2, 4), ("a", "c"))
    assert kept() == before
    train(model, optimizer, range(4, 6))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@over_all
def test_a_window_is_one_batch(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(model.losses(2 * step))
        optimizer.backward(model.losses(2 * step + 1))
        optimizer.step()
        other.zero_grad()
        other.backward(sum_losses([twin.losses(2 * step), twin.losses(2 * step + 1)]))
        other.step()
    own, theirs = rows_in(optimizer), rows_in(other)
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    for one, another in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-9, atol=1e-12)


@over_keeping
def test_a_frozen_parameter_keeps_its_rows(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = snapshot(rows_in(optimizer)[0])
    model.trunk.weight.requires_grad_(False)
    train(model, optimizer, range(2, 4))
    assert snapshot(rows_in(optimizer)[0]) == before
    model.trunk.weight.requires_grad_(True)
    train(model, optimizer, [4])
    assert snapshot(rows_in(optimizer)[0]) != before


def test_a_loss_that_no_longer_reaches_a_parameter_has_a_gradient_of_zero_there():
    w, v = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([w, v], lr=0.1), MoCo(beta=0.5, lr=1e-9))
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward({"a": w.sum() + (v.sum() if step == 0 else 0.0), "b": w.sum()})
        optimizer.step()
    assert rows_in(optimizer)[1]["a"]["tracked"].tolist() == [0.25, 0.25]
    torch.testing.assert_close(v.grad, torch.full_like(v, 0.125), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------- precision and scale


@over_all
def test_a_loss_scale_does_not_matter(method):
    model, optimizer = setup(method, torch.float32)
    twin, other = setup(method, torch.float32)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step), grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        train(twin, other, [step])
    torch.testing.assert_close(rows_in(optimizer), rows_in(other), rtol=1e-4, atol=1e-6)
    for one, another in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)


@over_keeping
def test_a_step_that_a_scaler_skips_keeps_what_was_there(method):
    model, optimizer = setup(method, torch.float32)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        if step == 2:
            before = snapshot((model.state_dict(), rows_in(optimizer)))
        optimizer.zero_grad()
        losses = model.losses(step)
        losses = spoil_gradient(losses, float("inf")) if step == 2 else losses
        optimizer.backward(losses, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert snapshot((model.state_dict(), rows_in(optimizer))) == before


@pytest.mark.parametrize("method", KEEPING[:3], ids=lambda m: type(m).__name__)
def test_half_precision_parameters_have_rows_in_float32(method):
    model, optimizer = setup(method, torch.bfloat16)
    train(model, optimizer, range(3))
    kept = [t for each in rows_in(optimizer).values() for e in each.values() for t in e.values()]
    assert {t.dtype for t in kept} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- copies and checkpoints


@over_all
@pytest.mark.parametrize("form", ["state_dict", "deepcopy", "pickle", "balance_state"])
def test_training_goes_on_bit_for_bit(method, form):
    model, optimizer = setup(method)
    train(model, optimizer, range(3))
    if form == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif form == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        saved = model.state_dict(), optimizer.state_dict(), optimizer.balance_state.state_dict()
        torch.save(saved, file)
        file.seek(0)
        net, state, balance = torch.load(file, weights_only=True)
        twin, other = setup(method)
        twin.load_state_dict(net)
        if form == "balance_state":
            del state["balance"]
            other.load_state_dict(state)
            other.balance_state.load_state_dict(balance)
        else:
            other.load_state_dict(state)
    train(twin, other, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert whole_state(twin, other) == whole_state(model, optimizer)


def test_a_plain_state_dict_keeps_what_is_committed():
    model, optimizer = setup(MoCo(lr=0.01))
    train(model, optimizer, range(2))
    before = snapshot(rows_in(optimizer))
    optimizer.load_state_dict(optimizer.optimizer.state_dict())
    assert snapshot(rows_in(optimizer)) == before


def broken(edit):
    model, optimizer = setup(MoCo(lr=0.01))
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    edit(state["balance"]["rows"])
    return model, optimizer, state


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.update({99: rows.pop(0)}), "positions below 8"),
        (lambda rows: rows.update({"0": rows.pop(0)}), "positions below 8"),
        (lambda rows: rows.update({0: []}), r"a mapping at `rows\[0\]`"),
        (lambda rows: rows[0].update({"d": rows[0].pop("a")}), "entries for the losses"),
        (lambda rows: rows[0]["a"].update(tracked=torch.zeros(3)), r"shape \(4, 3\)"),
        (lambda rows: rows[0]["a"].update(tracked="text"), "dense tensors"),
        (lambda rows: rows[0]["a"].update(tracked=torch.zeros(4, 3).long()), "floating-point"),
        (lambda rows: rows[0]["a"].update(other=rows[0]["a"].pop("tracked")), "`tracked`"),
        (lambda rows: rows[0]["a"].update(other=rows[0]["a"]["tracked"]), "`tracked`"),
        (lambda rows: rows[0]["a"].clear(), "`tracked`"),
        (lambda rows: rows[0]["a"]["tracked"].fill_(float("nan")), "finite numbers"),
    ],
    ids=range(11),
)
def test_a_malformed_entry_is_refused_before_anything_changes(edit, message):
    model, optimizer, state = broken(edit)
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceValueError, match=message):
        optimizer.load_state_dict(state)
    assert whole_state(model, optimizer) == before


@pytest.mark.parametrize(
    "method", [*KEEPING, ExcessMTL(every=3), MovingAverage(MoCo(lr=0.01))], ids=repr
)
def test_a_checkpoint_without_rows_is_refused(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    del state["balance"]["rows"]
    with pytest.raises(BalanceValueError, match="`rows`"):
        setup(method)[1].load_state_dict(state)


def test_nothing_is_kept_where_all_losses_were_satisfied():
    model, optimizer = setup(MoCo(lr=0.01))
    optimizer.backward({name: 0.0 * loss for name, loss in model.losses().items()})
    optimizer.step()
    other = setup(MoCo(lr=0.01))[1]
    other.load_state_dict(optimizer.state_dict())
    assert rows_in(other) == {}


def test_a_distributed_checkpoint_needs_names():
    model, optimizer = setup(MoCo(lr=0.01))
    train(model, optimizer, range(2))
    saved = optimizer.balance_state.state_dict()
    assert setup(MoCo(lr=0.01), loss_names=NAMES)[1].balance_state.state_dict()["rows"].keys() == (
        saved["rows"].keys()
    )
    with pytest.raises(BalanceValueError, match="loss_names"):
        optimizer.balance_state.load_state_dict({"balance": saved["balance"]})


# ---------------------------------------------------------------------- around other things


@pytest.mark.parametrize("inner", [MoCo(lr=0.01), GradDrop(), ExcessMTL()], ids=repr)
def test_a_moving_average_and_phases_pass_the_rows_on(inner):
    for method in (MovingAverage(inner), Sequential([Sum(), inner], [2])):
        model, optimizer = setup(method)
        train(model, optimizer, range(4))
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert ("rows" in optimizer.state_dict()["balance"]) == bool(inner.keeps)


@over_all
def test_other_engines_are_refused(method):
    name = type(method).__name__
    with pytest.raises(BalanceValueError, match=rf"`engine` should be PerLoss.*{name}"):
        setup(method, engine=Streaming())


def test_an_engine_that_fits_only_the_first_phase_is_refused_in_the_second():
    phases = Sequential([Sum(), GradDrop()], [1])
    model, optimizer = setup(phases, engine=Streaming())
    train(model, optimizer, [0])
    with pytest.raises(BalanceValueError, match=r"`engine` should be PerLoss.*GradDrop"):
        optimizer.backward(model.losses(1))


@over_all
def test_features_are_refused(method):
    model, optimizer = setup(method)
    features = torch.tanh(model.trunk(torch.ones(2, 3, dtype=torch.float64)))
    losses = {name: features[k % 2].sum() for k, name in enumerate(NAMES)}
    with pytest.raises(BalanceValueError, match=rf"`features`.*{type(method).__name__}"):
        optimizer.backward(losses, features=features)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = BalancedOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), GradDrop())
    outputs = table(torch.tensor([1, 3]))
    with pytest.raises(BalanceError, match="sparse=False"):
        optimizer.backward({"a": outputs.sum(), "b": outputs.square().sum()})


def test_complex_gradients_are_refused():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), GradDrop())
    with pytest.raises(BalanceError, match="real"):
        optimizer.backward({"a": w.abs().sum(), "b": w.real.sum()})


@over_all
def test_a_combined_loss_has_the_same_gradient(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for step in range(3):
        train(model, optimizer, [step])
        other.zero_grad()
        other.combined_loss(twin.losses(step)).backward()
        other.step()
    for one, another in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-10, atol=1e-12)


@over_all
def test_every_parameter_that_a_loss_reaches_moves(method):
    model, optimizer = setup(method)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(2))
    for own, start in zip(model.parameters(), before, strict=True):
        assert bool((own != start).any())


# ---------------------------------------------------------------------- satisfied losses


@pytest.mark.parametrize("method", [MoCo(lr=0.01), DBMTL(), ExcessMTL()], ids=repr)
def test_of_a_satisfied_loss_nothing_is_kept_as_of_an_absent_one(method):
    ends = []
    for present in (True, False):
        param = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = BalancedOptimizer(torch.optim.SGD([param], lr=1e-3), method)
        for step in range(4):
            losses = {"a": param.square().sum(), "b": param[1] ** 2}
            if step == 2:
                losses["b"] = 0.0 * losses["b"]
                if not present:
                    del losses["b"]
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        saved = optimizer.state_dict()["balance"]
        ends.append(snapshot([param, saved["rows"], saved["state"]]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "phases",
    [
        [DBMTL(), MoCo(lr=0.01)],
        [MoCo(lr=0.01), MoCo(lr=0.01)],
        [SeparateMoments(), ExcessMTL()],
        [MoCo(lr=0.01), SeparateMoments()],
    ],
    ids=repr,
)
def test_each_phase_keeps_rows_of_its_own(phases):
    def run(model, optimizer, steps):
        for step in steps:
            train(model, optimizer, [step])

    whole, parts, resumed = SmallModel(), SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(adam(whole), Sequential(phases, [3]))
    run(whole, optimizer, range(3))
    first = BalancedOptimizer(adam(parts), phases[0])
    run(parts, first, range(3))
    second = BalancedOptimizer(first.optimizer, phases[1])
    resumed.load_state_dict(whole.state_dict())
    other = BalancedOptimizer(adam(resumed), Sequential(phases, [3]))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(whole, optimizer, range(3, 6))
    run(parts, second, range(3, 6))
    run(resumed, other, range(3, 6))
    assert snapshot(whole.state_dict()) == snapshot(parts.state_dict())
    assert snapshot(whole.state_dict()) == snapshot(resumed.state_dict())


def test_a_phase_that_keeps_nothing_drops_what_the_one_before_has_kept():
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), Sequential([MoCo(lr=0.01), Sum()], [2]))
    train(model, optimizer, [0, 1])
    assert optimizer.state_dict()["balance"]["rows"]
    train(model, optimizer, [2])
    assert "rows" not in optimizer.state_dict()["balance"]
