"""Constant terms around a method: the twin balances the other losses, and adds them by hand."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, strategies as st

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    BalanceValueError,
    FixedWeights,
    History,
    MovingAverage,
    NashMTL,
    RandomWeights,
    Rescaled,
    Sequential,
    Sum,
    SumLog,
    WithConstant,
)
from moo_balance._capture import CaptureWatch
from tests.support.internals import treat_cpu_as_device
from tests.support.problems import (
    Scene,
    SmallModel,
    change_value,
    flat_gradient,
    momentum,
    play,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import NAMES

INNER = [
    Sum(),
    SumLog(),
    FAMO(lr=1.0),
    MGDA(),
    NashMTL(),
    AnalyticQP(every=3),
    MovingAverage(MGDA()),
    Sequential([MGDA(), SumLog()], [2]),
    Rescaled(SumLog(), every=2),
    RandomWeights(seed=3),
]
inner = pytest.mark.parametrize("method", INNER, ids=repr)


def without(scene: Scene, position: int) -> Scene:
    """The scene as the method sees it, without one of the losses."""
    keep = [k for k in range(len(scene.names)) if k != position]
    return scene.permute(keep)


@inner
@given(seed=st.integers(0, 1000), position=st.integers(0, 2), value=st.floats(-10, 10))
def test_the_method_gives_what_it_gives_for_the_others(method, seed, position, value):
    scene = Scene.random(seed=seed)
    hidden = NAMES[position]
    answers = play(WithConstant(method, {hidden: value}), scene)
    expected = play(method, without(scene, position))
    keep = [k for k in range(3) if k != position]
    for answer, other in zip(answers, expected, strict=True):
        for own, plain in (
            (answer.weights, other.weights),
            (answer.coefficients, other.coefficients),
        ):
            assert own[position] == value
            assert torch.equal(own[keep], plain)


def term(model: SmallModel) -> torch.Tensor:
    """A regularizer that is negative, and of a parameter that the first loss does not reach."""
    return -model.heads[1].weight.square().sum() - model.trunk.weight.square().sum() - 5.0


def losses_with_term(model, batch):
    return {**model.losses(batch, NAMES[:2]), "term": term(model)}


def wrapped(method, **arguments):
    model = SmallModel()
    return model, BalancedOptimizer(
        momentum(model), WithConstant(method, {"term": 0.3}), **arguments
    )


@inner
def test_a_step_is_that_of_the_method_plus_the_term_by_hand(method):
    model, optimizer = wrapped(method)
    twin = SmallModel()
    other = BalancedOptimizer(momentum(twin), method)
    for batch in range(5):
        optimizer.zero_grad()
        optimizer.backward(lambda: losses_with_term(model, batch))  # noqa: B023
        other.zero_grad()
        other.backward(lambda: twin.losses(batch, NAMES[:2]))  # noqa: B023
        (0.3 * term(twin)).backward()
        torch.testing.assert_close(flat_gradient(model), flat_gradient(twin), rtol=1e-9, atol=1e-12)
        optimizer.step()
        other.step()


def by_backward(model, optimizer, batch):
    optimizer.zero_grad()
    optimizer.backward(lambda: losses_with_term(model, batch))
    optimizer.step()


def by_closure(model, optimizer, batch):
    optimizer.step(lambda: losses_with_term(model, batch))


def by_combined_loss(model, optimizer, batch):
    optimizer.zero_grad()
    optimizer.combined_loss(losses_with_term(model, batch)).backward()
    optimizer.step()
    optimizer.observe(losses_with_term(model, batch))


def by_window(model, optimizer, batch):
    half = lambda: {k: loss / 2 for k, loss in losses_with_term(model, batch).items()}  # noqa: E731
    optimizer.zero_grad()
    optimizer.backward(half, last=False)
    optimizer.backward(half)
    optimizer.step()


@inner
@pytest.mark.parametrize("form", [by_closure, by_combined_loss, by_window])
def test_every_form_of_a_step_is_the_same(form, method):
    runs = []
    for each in (by_backward, form):
        model, optimizer = wrapped(method)
        for batch in range(4):
            each(model, optimizer, batch)
        runs.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


@inner
def test_a_resumed_run_is_the_same_run(method):
    model, optimizer = wrapped(method)
    for batch in range(3):
        by_backward(model, optimizer, batch)
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    text = optimizer.balance_state.state_dict()
    twin, other = wrapped(method)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other.balance_state.load_state_dict(text)
    clone, cloned = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (twin, other), (clone, cloned)):
        for batch in range(3, 6):
            by_backward(*pair, batch)
    assert whole_state(model, optimizer) == whole_state(twin, other) == whole_state(clone, cloned)


# ---------------------------------------------------------------------- absent losses


@inner
def test_a_step_with_the_term_only_moves_by_it_and_keeps_the_state(method):
    model, optimizer = wrapped(method)
    by_backward(model, optimizer, 0)
    before = snapshot(optimizer.state_dict()["balance"]["state"])
    optimizer.zero_grad()
    optimizer.backward(lambda: {"term": term(model)})
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (0.3 * term(twin)).backward()
    torch.testing.assert_close(flat_gradient(model), flat_gradient(twin), rtol=1e-12, atol=0)
    optimizer.step()
    assert snapshot(optimizer.state_dict()["balance"]["state"]) == before


@inner
def test_a_step_without_the_term_is_one_of_the_method(method):
    model, optimizer = wrapped(method, loss_names=(*NAMES[:2], "term"))
    twin = SmallModel()
    other = BalancedOptimizer(momentum(twin), method)
    train(model, optimizer, range(4), NAMES[:2])
    train(twin, other, range(4), NAMES[:2])
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


def test_names_that_do_not_fit_are_refused():
    model = SmallModel()
    optimizer = BalancedOptimizer(momentum(model), WithConstant(MGDA(), {"d": 1.0}))
    with pytest.raises(BalanceValueError, match=r"`constants`.*Found `d`"):
        optimizer.backward(model.losses())
    optimizer = BalancedOptimizer(momentum(model), WithConstant(MGDA(), {"term": 1.0}))
    with pytest.raises(BalanceValueError, match=r"leave a loss to be balanced.*loss_names"):
        optimizer.backward({"term": term(model)})
    strict = SumLog(preference={"a": 1.0, "b": 2.0})  # arguments of the method name its losses only
    optimizer = BalancedOptimizer(momentum(model), WithConstant(strict, {"term": 0.3}))
    optimizer.backward(losses_with_term(model, 0))


# ---------------------------------------------------------------------- bounds, satisfied, capture


@pytest.mark.parametrize("on_device", [False, True])
def test_only_balanced_losses_have_bounds(on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    for method in (SumLog(), MovingAverage(SumLog()), Sequential([SumLog(), MGDA()], [5])):
        model, optimizer = wrapped(method)
        by_backward(model, optimizer, 0)
        assert optimizer.log_dict()["moo/coefficient/term"] == pytest.approx(0.3)
        if on_device:
            continue
        message = r"`b` should be at least 0, because WithConstant passes it to SumLog, which takes"
        with pytest.raises(BalanceValueError, match=message):
            optimizer.backward(change_value(losses_with_term(model, 1), -1.0))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("method", [MGDA(), NashMTL(), MovingAverage(MGDA())], ids=repr)
def test_a_term_counts_where_its_gradient_is_zero_over_what_is_compared(
    method, on_device, monkeypatch
):
    """A term of a head, and gradients compared over the trunk."""
    if on_device:
        treat_cpu_as_device(monkeypatch)
    model = SmallModel()
    optimizer = BalancedOptimizer(
        momentum(model), WithConstant(method, {"term": -0.5}), shared_params=model.trunk
    )
    losses = {**model.losses(0, NAMES[:2]), "term": model.heads[2].weight.sum()}
    optimizer.backward(losses)
    assert optimizer.metrics.satisfied == ()
    assert torch.equal(model.heads[2].weight.grad, torch.full_like(model.heads[2].weight, -0.5))
    optimizer.step()


@pytest.mark.parametrize("on_device", [False, True])
def test_balanced_losses_that_are_satisfied_leave_the_term(on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    for method in (MGDA(), SumLog()):
        model, optimizer = wrapped(method)
        by_backward(model, optimizer, 0)
        optimizer.zero_grad()
        zero = {name: 0 * loss for name, loss in model.losses(1, NAMES[:2]).items()}
        optimizer.backward({**zero, "term": term(model)})
        coefficients = {k: float(v) for k, v in optimizer.metrics.coefficients.items()}
        assert coefficients == pytest.approx({"a": 0.0, "b": 0.0, "term": 0.3})
        assert optimizer.metrics.satisfied == ("a", "b")
        optimizer.step()


def test_a_constant_term_neither_captures_a_run_nor_hides_that_a_loss_does():
    def figures(a, b):
        named = {"a": a, "b": b, "term": 0.3}
        return {
            **{f"coefficient/{k}": v for k, v in named.items()},
            **{f"loss/{k}": 1.0 for k in named},
        }

    watch = CaptureWatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(0, 600, 10):  # both coefficients fall alike
            watch.read(step, "M", figures(0.5 * 0.9**step, 0.5 * 0.9**step), {"term"})
    watch = CaptureWatch()
    watch.read(0, "M", figures(0.5, 0.5), {"term"})
    for step in range(10, 210, 10):
        watch.read(step, "M", figures(1.0, 1e-6), {"term"})
    with pytest.warns(UserWarning, match="Loss `a` has had more than"):
        watch.read(210, "M", figures(1.0, 1e-6), {"term"})


def test_log_dict_tells_the_watch_which_terms_are_constant():
    """A method whose coefficients fall to nothing compared with the constant."""
    model, optimizer = wrapped(FixedWeights({"a": 1e-9, "b": 1e-9}))
    by_backward(model, optimizer, 0)
    optimizer.log_dict()
    assert optimizer._balancer.record.capture.first.keys() == {"a", "b"}


# ---------------------------------------------------------------------- nesting


def test_two_layers_of_constants_add_up():
    scene = Scene.random(seed=4)
    nested = WithConstant(WithConstant(MGDA(), {"b": 2.0}), {"c": -1.0})
    flat = WithConstant(MGDA(), {"b": 2.0, "c": -1.0})
    assert set(nested.constant_losses) == {"b", "c"}
    for one, other in zip(play(nested, scene), play(flat, scene), strict=True):
        assert torch.equal(one.coefficients, other.coefficients)


def test_the_method_in_use_is_one_object_for_each_phase_also_in_a_copy():
    """Ranks that compare their states count steps from a change of it."""
    method = WithConstant(Sequential([MGDA(), SumLog()], [2]), {"c": 1.0})
    for each in (method, copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        used = [each.needs(step).method for step in range(4)]
        assert used[0] is used[1] is not used[2]
        assert used[2] is used[3] is each.needs(3).method
        assert [type(phase.weighting) for phase in used[1:3]] == [MGDA, SumLog]
        assert used[2].lower_bounds(NAMES) == [0.0, 0.0, -math.inf]


def test_a_history_shows_the_constant():
    model, optimizer = wrapped(MGDA())
    history = History()
    by_backward(model, optimizer, 0)
    history.append(optimizer.metrics)
    steps, values = history.series("coefficient/term")
    assert (steps, values) == ([0], [pytest.approx(0.3)])


def test_a_note_says_which_losses_the_method_inside_does_not_see():
    method = WithConstant(NashMTL(preference={"a": 1.0, "b": 1.0, "c": 2.0}), {"c": 0.1})
    with pytest.raises(BalanceValueError, match="Found `c`, which is none") as caught:
        method.init(["a", "b", "c"], torch.device("cpu"))
    assert caught.value.__notes__ == ["WithConstant hides `c` from NashMTL."]
