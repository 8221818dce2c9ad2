"""The promises of all methods, by the rows of the registry."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import get_args

import pytest
import torch
from hypothesis import given, strategies as st

import moo_balance
from examples import own_methods
from moo_balance import BalancedOptimizer, BalanceError, BalanceValueError
from moo_balance.weighting import Statistics, Weighting
from tests.support.naive_rows import NaiveRows
from tests.support.problems import (
    Scene,
    SmallModel,
    flat_gradient,
    jacobian,
    play,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import (
    KINDS,
    METHODS,
    NAMES,
    REFUSALS,
    Kind,
    over_all,
    over_all_methods,
    over_methods,
    over_some,
)


def weightings() -> set[type[Weighting]]:
    """The methods that the package exports."""
    public = [getattr(moo_balance, name) for name in moo_balance.__all__]
    exported = {cls for cls in public if Weighting in getattr(cls, "__mro__", ())}
    return {cls for cls in exported if not inspect.isabstract(cls)}


def close(a, b, rtol=1e-9, atol=0.0):
    assert torch.allclose(a, b, rtol=rtol, atol=atol), (a, b)


# ---------------------------------------------------------------------- the registry itself


def test_every_public_weighting_is_in_the_registry():
    assert {type(method.make(NAMES)) for method in METHODS} == weightings()


def test_every_weighting_with_hyper_parameters_refuses_some():
    configurable = {cls for cls in weightings() if dataclasses.fields(cls)}
    refused = set()
    for refusal in REFUSALS:
        cells = inspect.getclosurevars(refusal.make).nonlocals
        refused.add(cells["cls"])
    assert refused == configurable


def test_ids_are_unique():
    assert len({method.id for method in METHODS}) == len(METHODS)


def test_there_is_one_representative_of_each_kind():
    assert [row.kind for row in KINDS] == list(get_args(Kind))
    assert {row.kind for row in METHODS} == set(get_args(Kind))


@over_all_methods
def test_a_row_states_the_needs_and_bounds_of_its_method(method):
    weighting = method.make(NAMES)
    needs = [weighting.needs(step) for step in range(60)]
    assert weighting.uses_gramian == any(each.compares for each in needs) == method.gramian
    assert weighting.observes_step == any(each.observes for each in needs) == method.observes
    known = not any(each.losses or each.compares for each in needs)
    assert known == (method.kind == "known")
    assert (method.kind == "gramian-every") == (
        method.gramian and not all(each.gramian for each in needs)
    )
    assert needs[0].method.lower_bounds(NAMES) == method.bounds(NAMES)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.argument)
def test_refused_configurations_name_the_argument(refusal):
    if refusal.with_names:
        weighting = refusal.make()
        with pytest.raises(BalanceValueError, match=rf"`{refusal.argument}\b"):
            weighting.init(("a", "b"), torch.device("cpu"))
    else:
        with pytest.raises(BalanceValueError, match=rf"`{refusal.argument}\b"):
            refusal.make()


# ---------------------------------------------------------------------- configurations are values


@over_all_methods
def test_a_configuration_is_a_frozen_value(method):
    weighting = method.make(NAMES)
    assert weighting == method.make(NAMES)
    names = {**vars(own_methods), **vars(moo_balance)}
    assert eval(repr(weighting), names) == weighting
    assert pickle.loads(pickle.dumps(weighting)) == weighting
    for field in dataclasses.fields(weighting):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(weighting, field.name, None)


@over_all_methods
def test_a_state_has_entries_for_each_loss_or_one_for_all(method):
    weighting = method.make(NAMES)
    states = [weighting.init(NAMES, torch.device("cpu"))]
    states += [answer.state for answer in play(weighting, Scene.random())]
    for state in states:
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        assert shapes == {key: tuple(value.shape) for key, value in states[0].items()}
        assert set(shapes.values()) <= {(), (len(NAMES),), (len(NAMES),) * 2}
        assert {value.dtype for value in state.values()} <= {torch.float64}


@over_all_methods
def test_float32_statistics_are_taken_in_every_step(method):
    """As in a method with a Gramian that contains another one, some in float64 in between."""
    weighting, scene = method.make(NAMES), Scene.random()
    naive = NaiveRows(weighting)
    state = weighting.init(NAMES, torch.device("cpu"))
    for step, losses in enumerate(scene.losses):
        dtype = torch.float64 if step == 2 else torch.float32
        gramian = None
        if weighting.needs(step).gramian:
            gramian = (scene.jacobians[step] @ scene.jacobians[step].T).to(dtype)
        statistics = Statistics(NAMES, losses.to(dtype), gramian, step)
        statistics = naive.tell(statistics, scene.jacobians[step])
        _, coefficients, state = weighting.weights(statistics, state)
        state = weighting.observe(Statistics(NAMES, scene.after[step].to(dtype)), state)
        assert bool(coefficients.isfinite().all())


@over_all_methods
def test_a_state_that_was_passed_in_stays_as_it_was(method):
    weighting = method.make(NAMES)
    scene = Scene.random()
    state = play(weighting, scene)[0].state
    before = snapshot(state)
    rows = scene.jacobians[0]
    gramian = rows @ rows.T if weighting.needs(1).gramian else None
    statistics = Statistics(NAMES, scene.losses[1], gramian, step=1)
    weighting.weights(NaiveRows(weighting).tell(statistics, rows), state)
    weighting.observe(Statistics(NAMES, scene.after[1], step=2), state)
    assert snapshot(state) == before


# ---------------------------------------------------------------------- coefficients


@over_all_methods
@given(seed=st.integers(0, 10_000), count=st.integers(1, 3))
def test_coefficients_are_finite_and_keep_sum_and_sign(method, seed, count):
    names = NAMES[:count]
    scene = Scene.random(names, seed)
    for losses, answer in zip(scene.losses, play(method.make(names), scene), strict=True):
        for values in (answer.weights, answer.coefficients):
            assert values.shape == (count,)
            assert values.dtype == torch.float64
            assert bool(values.isfinite().all())
            assert method.negative or bool((values >= 0).all())
        if method.total is not None:
            total = answer.coefficients.sum().item()
            assert total == pytest.approx(method.total(names, losses), rel=1e-12)


@over_all(lambda method: method.equivariant)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)))
def test_permuting_the_losses_permutes_the_weights(method, seed, order):
    scene = Scene.random(seed=seed)
    permuted = scene.permute(order)
    straight = play(method.make(NAMES), scene)
    crossed = play(method.make(permuted.names), permuted)
    for one, other in zip(straight, crossed, strict=True):
        close(other.weights, one.weights[list(order)], rtol=1e-7)
        close(other.coefficients, one.coefficients[list(order)], rtol=1e-7)


@over_all(lambda method: method.never_rises)
@given(seed=st.integers(0, 10_000))
def test_the_direction_conflicts_with_no_gradient(method, seed):
    scene = Scene.random(seed=seed)
    for rows, answer in zip(scene.jacobians, play(method.make(NAMES), scene), strict=True):
        slopes = rows @ (answer.coefficients @ rows)
        assert bool((slopes >= -1e-9 * slopes.abs().max()).all())


@over_all(lambda method: method.scaling is not None)
@given(seed=st.integers(0, 10_000), which=st.integers(0, 2), decades=st.floats(-6, 6))
def test_scaling_one_loss_has_the_stated_effect(method, seed, which, decades):
    factors = [10**decades if k == which else 1.0 for k in range(3)]
    scene = Scene.random(seed=seed)
    plain = play(method.make(NAMES), scene)
    scaled = play(method.make(NAMES), scene.scale(factors))
    for one, other in zip(plain, scaled, strict=True):
        expected = one.coefficients
        if method.scaling != "unchanged":
            expected = expected / torch.tensor(factors, dtype=torch.float64)
        if method.scaling == "shares":
            expected = expected / expected.sum()
        actual = other.coefficients
        if method.scaling == "direction":
            actual, expected = actual / actual.norm(), expected / expected.norm()
        close(actual, expected, rtol=1e-6, atol=1e-12)


@over_all(lambda method: method.scaling is None)
def test_the_stated_effect_of_scaling_is_not_a_coincidence(method):
    """The scaling of a row is None only where none of the stated effects holds."""
    factors = torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64)
    scene = Scene.random(seed=1)
    plain = play(method.make(NAMES), scene)
    scaled = play(method.make(NAMES), scene.scale(factors.tolist()))
    pairs = [(p.coefficients, s.coefficients) for p, s in zip(plain, scaled, strict=True)]
    inverse = [(p / factors, s) for p, s in pairs]
    shares = [(p / p.sum(), s) for p, s in inverse]
    for expected in (pairs, inverse, shares):
        assert not all(torch.allclose(p, s, rtol=1e-6) for p, s in expected)


@over_methods
def test_a_single_loss_has_the_stated_coefficient(method):
    names = NAMES[:1]
    model, optimizer = setup(method, names)
    (loss,) = model.losses(0, names).values()
    (plain,) = jacobian({"a": loss}, list(model.parameters()))
    optimizer.backward({"a": loss})
    coefficient = optimizer.metrics.coefficients["a"].item()
    expected = coefficient if method.alone is None else method.alone(loss.item())
    assert coefficient == pytest.approx(expected, rel=1e-12)
    rows = optimizer.weighting.needs(0).rows
    if rows is None or rows.combines != "kept":  # which is not the gradient of this batch
        close(flat_gradient(model), expected * plain, rtol=1e-12)


@over_all(lambda method: method.equivariant)
def test_equal_losses_have_equal_coefficients(method):
    """The Gramian of two copies of a loss is singular."""
    scene = Scene.random(seed=3)
    for tensor in (scene.losses, scene.after, scene.jacobians):
        tensor[:, 1] = tensor[:, 0]
    swapped = scene.permute((1, 0, 2))
    for one, other in zip(
        play(method.make(scene.names), scene),
        play(method.make(swapped.names), swapped),
        strict=True,
    ):
        assert bool(one.coefficients.isfinite().all())
        close(other.coefficients, one.coefficients[[1, 0, 2]], rtol=1e-7)


@over_methods
@pytest.mark.parametrize("dead", [("a",), NAMES], ids=lambda dead: "".join(dead))
def test_a_zero_gradient_leaves_all_coefficients_finite(method, dead):
    model, optimizer = setup(method)

    def losses():
        return {
            name: loss.detach() + 0 * model.trunk.weight.sum() if name in dead else loss
            for name, loss in model.losses().items()
        }

    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses)
        coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
        assert bool(coefficients.isfinite().all())
        assert bool(flat_gradient(model).isfinite().all())
        optimizer.step()


@over_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_parameters_get_finite_gradients_of_their_own_dtype(method, dtype):
    model = SmallModel().to(dtype)
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    train(model, optimizer, range(2))
    assert bool(torch.stack([*optimizer.metrics.coefficients.values()]).isfinite().all())
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in model.parameters())


# ---------------------------------------------------------------------- gradients


@over_methods
def test_the_gradient_is_the_combination_of_the_naive_jacobian(method):
    """Against a dense Jacobian, the formula and a matrix product, step by step."""
    model, optimizer = setup(method)
    weighting = method.make(NAMES)
    naive = NaiveRows(weighting)
    state = weighting.init(NAMES, torch.device("cpu"))
    for step in range(5):
        losses = model.losses(step)
        rows = jacobian(losses, list(model.parameters()))
        needs = weighting.needs(step)
        gramian = rows @ rows.T if needs.gramian else None
        values = torch.stack([*losses.values()]).detach()
        statistics = naive.tell(Statistics(NAMES, values, gramian, step), rows)
        answer = weighting.weights(statistics, state)
        optimizer.zero_grad()
        optimizer.backward(lambda: model.losses(step))  # noqa: B023
        coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
        close(coefficients, answer.coefficients, rtol=1e-8)
        expected = naive.combine(coefficients, NAMES, rows)
        if expected is not None:
            atol = 1e-12 * float(rows.abs().max())
            close(flat_gradient(model), expected, rtol=1e-10, atol=atol)
        optimizer.step()
        state = answer.state
        if needs.observes:
            seen = torch.stack([*model.losses(step).values()]).detach()
            state = weighting.observe(Statistics(NAMES, seen, step=step + 1), state)


@over_methods
def test_gradients_accumulate_as_autograd_does(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses())
    once = flat_gradient(model)
    optimizer.backward(model.losses())
    close(flat_gradient(model), 2 * once, rtol=1e-12)


@over_methods
def test_the_combined_loss_has_the_gradient_of_backward(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        other.zero_grad()
        other.combined_loss(twin.losses(step)).backward()
        close(flat_gradient(twin), flat_gradient(model), rtol=1e-9, atol=1e-12)
        for run, net in ((optimizer, model), (other, twin)):
            run.step()
            if run.weighting.observes_step:
                run.observe(net.losses(step))
    assert snapshot(other.metrics.names) == snapshot(optimizer.metrics.names)


@over_methods
def test_the_combined_loss_is_the_weighted_sum_of_the_losses(method):
    model, optimizer = setup(method)
    losses = model.losses()
    combined = optimizer.combined_loss(losses)
    expected = sum(c * losses[name] for name, c in optimizer.metrics.coefficients.items())
    assert combined.shape == ()
    close(combined, expected, rtol=1e-12)


# ---------------------------------------------------------------------- steps


@over_methods
def test_all_forms_of_a_step_are_the_same_step(method):
    def by_hand(model, optimizer, step):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        optimizer.step()
        if method.observes:
            optimizer.observe(model.losses(step))

    def by_closure(model, optimizer, step):
        optimizer.step(lambda: model.losses(step))

    def by_backward(model, optimizer, step):
        train(model, optimizer, [step])

    ends = []
    for form in (by_hand, by_closure, by_backward):
        model, optimizer = setup(method)
        for step in range(6):
            form(model, optimizer, step)
        ends.append(whole_state(model, optimizer))
    assert ends[0] == ends[1]
    assert ends[0] == ends[2]


@over_methods
def test_every_parameter_that_a_loss_reaches_moves(method):
    """The trunk, which all losses reach, and the head of each loss with a coefficient."""
    model, optimizer = setup(method, optimizer=sgd)
    before = snapshot(model.state_dict())
    train(model, optimizer, [0])
    moved = {key for key, value in snapshot(model.state_dict()).items() if value != before[key]}
    coefficients = optimizer.metrics.coefficients.values()
    weighted = [k for k, c in enumerate(coefficients) if abs(c) > 1e-12]  # larger than rounding
    expected = {f"heads.{k}.{name}" for k in weighted for name in ("weight", "bias")}
    assert moved >= expected | {"trunk.weight", "trunk.bias"}
    assert weighted


@over_methods
def test_backward_changes_no_state_and_step_commits_it(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(3))
    before = whole_state(model, optimizer)
    optimizer.backward(lambda: model.losses(3))
    assert whole_state(model, optimizer) == before
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == before["optimizer"]["balance"]["steps"] + 1


@over_methods
def test_a_step_that_raises_commits_nothing(method, monkeypatch):
    model, optimizer = setup(method)
    train(model, optimizer, range(3))
    before = whole_state(model, optimizer)
    optimizer.zero_grad()

    def fail(*_):
        raise RuntimeError("out of memory")

    optimizer.backward(lambda: model.losses(3))
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.optimizer, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert whole_state(model, optimizer) == before
    optimizer.step()
    twin, other = setup(method)
    train(twin, other, range(4))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
def test_zero_grad_discards_what_was_staged(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    optimizer.backward(lambda: model.losses(17))
    train(model, optimizer, [2])
    train(twin, other, range(3))
    assert whole_state(model, optimizer) == whole_state(twin, other)


# ---------------------------------------------------------------------- copies


copied = pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)


@copied
@over_methods
def test_a_copy_trains_on_identically_and_independently(method, duplicate):
    pair = setup(method)
    train(*pair, range(3))
    model, optimizer = duplicate(pair)
    before = whole_state(*pair)
    train(model, optimizer, range(3, 6))
    assert whole_state(*pair) == before
    train(*pair, range(3, 6))
    assert whole_state(model, optimizer) == whole_state(*pair)
    assert repr(optimizer) == repr(pair[1])


@copied
@over_some("Sum", "FAMO-adam", "MGDA-none")
def test_a_copy_made_within_a_step_begins_a_new_one(method, duplicate):
    """Gradients are not copied, so a step that was staged on them is not copied either."""
    pair = setup(method)
    train(*pair, range(2))
    before = whole_state(*pair)
    pair[1].zero_grad()
    pair[1].backward(lambda: pair[0].losses(2))
    model, optimizer = duplicate(pair)
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()
    assert whole_state(model, optimizer) == before
    train(model, optimizer, range(2, 4))
    pair[1].step()
    train(*pair, [3])
    assert whole_state(model, optimizer) == whole_state(*pair)
