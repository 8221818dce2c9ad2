"""Gradient accumulation: a window of micro-batches is one batch whose losses are their sums."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
from contextlib import nullcontext

import pytest
import torch

from moo_balance import BalancedOptimizer, BalanceError, NonFiniteError
from tests.support.problems import (
    SmallModel,
    assert_same_parameters,
    flat_gradient,
    gradients,
    setup,
    sgd,
    snapshot,
    sum_losses,
    train,
    whole_state,
)
from tests.support.registry import KINDS, NAMES, over, over_each_method, over_kinds, over_some

MICRO = 3


def part(model, number, names=NAMES):
    """A mean over one of several micro-batches counts for its part of the whole."""
    return {name: loss / MICRO for name, loss in model.losses(number, names).items()}


def numbers(step):
    return range(MICRO * step, MICRO * (step + 1))


def by_losses(optimizer, *batches):
    """The documented loop; a method that observes the step is given the sums by hand."""
    optimizer.zero_grad()
    for batch in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(batch())
    optimizer.backward(batches[-1]())
    optimizer.step()
    if optimizer.weighting.observes_step:
        optimizer.observe(sum_losses(batch() for batch in batches))


def by_closures(optimizer, *batches):
    """The step evaluates all of them again."""
    optimizer.zero_grad()
    for batch in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(batch)
    optimizer.backward(batches[-1])
    optimizer.step()


def at_once(optimizer, *batches):
    """The slow obvious twin: all micro-batches in one graph."""
    optimizer.step(lambda: sum_losses(batch() for batch in batches))


def run(method, form, steps=5, present=lambda number: NAMES, **arguments):
    """Train by windows; in micro-batch `number` only `present(number)` are there."""
    model, optimizer = setup(method, loss_names=NAMES, **arguments)
    for step in range(steps):
        batches = [
            lambda number=number: part(model, number, present(number)) for number in numbers(step)
        ]
        form(optimizer, *batches)
    return model, optimizer


def assert_same_run(actual, expected):
    """Equal but for the order in which sums are made."""
    (model, optimizer), (twin, other) = actual, expected
    assert_same_parameters(model, twin)
    own, theirs = (run.state_dict()["balance"] for run in (optimizer, other))
    torch.testing.assert_close(own["state"], theirs["state"], rtol=1e-9, atol=1e-12, equal_nan=True)
    rows = own.pop("rows", {}), theirs.pop("rows", {})
    torch.testing.assert_close(*rows, rtol=1e-9, atol=1e-12)
    assert {**own, "state": None} == {**theirs, "state": None}


def assert_same_as_at_once(method, present):
    """In micro-batch `number` only the losses `present(number)` are there."""
    assert_same_run(
        run(method, by_closures, present=present), run(method, at_once, present=present)
    )


@pytest.mark.capability("gradient accumulation")
@over_each_method
def test_a_window_is_one_big_batch(method):
    actual, expected = run(method, by_closures), run(method, at_once)
    assert_same_run(actual, expected)
    figures, whole = (optimizer.metrics.as_floats() for _, optimizer in (actual, expected))
    assert figures == pytest.approx(whole, rel=1e-6)


@over_kinds
def test_a_window_may_be_observed_by_hand(method):
    assert_same_run(run(method, by_losses), run(method, at_once))


@over_kinds
def test_a_window_of_one_is_a_step(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for number in range(3):
        by_closures(optimizer, lambda: model.losses(number))  # noqa: B023
        train(twin, other, [number])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
def test_a_loss_that_leaves_within_a_window(method):
    assert_same_as_at_once(method, lambda number: ("abc", "a", "b")[number % MICRO])


@over_kinds
def test_a_loss_that_joins_within_a_window(method):
    assert_same_as_at_once(method, lambda number: ("ab", "abc", "ab")[number % MICRO])


@over_some("RandomWeights", "OnlineTchebycheff")
def test_a_loss_that_joins_where_earlier_coefficients_depend_on_it_is_refused(method):
    """Known weights that are shared among the losses that are there have been used already."""
    with pytest.raises(BalanceError, match="same losses throughout"):
        run(method, by_closures, present=lambda number: ("ab", "abc", "ab")[number % MICRO])


@over_kinds
def test_a_loss_that_a_whole_window_lacks_keeps_its_state(method):
    assert_same_as_at_once(method, lambda number: ("a", "c") if number // MICRO == 2 else NAMES)


@over_kinds
def test_windows_and_steps_may_alternate(method):
    def alternate(form):
        model, optimizer = setup(method)
        for step in range(4):
            batches = [lambda number=number: part(model, number) for number in numbers(step)]
            if step % 2:
                form(optimizer, *batches)
            else:
                train(model, optimizer, [step])
        return model, optimizer

    assert_same_run(alternate(by_closures), alternate(at_once))


@over_kinds
def test_nested_windows_are_one(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    with optimizer.accumulate():
        with optimizer.accumulate():
            optimizer.backward(part(model, 0))
        optimizer.backward(part(model, 1))
    optimizer.backward(part(model, 2))
    optimizer.step()
    for number in range(2):
        with other.accumulate():
            other.backward(part(twin, number))
    other.backward(part(twin, 2))
    other.step()
    assert whole_state(model, optimizer) == whole_state(twin, other)


# ---------------------------------------------------------------------- what a window keeps


@over_kinds
def test_gradients_are_written_at_once_only_if_coefficients_are_known(method):
    """Such methods need no memory of their own; the others write when the window closes."""
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0))
    assert bool((flat_gradient(model).abs() > 1e-290).any()) == (method.kind == "known")


def live_elements():
    """Elements of all tensors that are alive, each piece of memory counted once."""
    gc.collect()  # what earlier tests have left
    tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in storages.values())


@over(lambda method: method in KINDS and method.kind != "known")
def test_a_window_keeps_one_gradient_per_loss_and_parameter_that_it_reaches(method):
    """K·P elements at most, however many micro-batches there are."""
    model, optimizer = setup(method)
    before, kept = live_elements(), []
    for number in range(3):
        with optimizer.accumulate():
            optimizer.backward(part(model, number))
        kept.append(live_elements() - before)
    head = sum(p.numel() for p in model.heads[0].parameters())
    trunk = sum(p.numel() for p in model.trunk.parameters())
    rows = len(NAMES) * (trunk + head)
    assert kept[0] == kept[1] == kept[2]
    assert rows <= kept[0] <= rows + 50  # and figures of the losses


@over_kinds
def test_graphs_are_freed_micro_batch_by_micro_batch(method):
    model, optimizer = setup(method)
    losses = part(model, 0)
    with optimizer.accumulate():
        optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses["a"].backward()


CLEAR = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


@over_kinds
@pytest.mark.parametrize("clear", CLEAR.values(), ids=list(CLEAR))
@pytest.mark.parametrize("earlier", [False, True], ids=["", "with gradients before"])
def test_clearing_gradients_drops_the_window(method, clear, earlier):
    model, optimizer = setup(method)
    twin, other = setup(method)
    if earlier:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 7))
    clear(model, optimizer)
    for number in range(MICRO):
        for net, run_ in ((model, optimizer), (twin, other)):
            with nullcontext() if number == MICRO - 1 else run_.accumulate():
                run_.backward(lambda number=number, net=net: part(net, number))
    optimizer.step()
    other.step()
    assert_same_run((model, optimizer), (twin, other))


@over_kinds
def test_a_step_after_gradients_were_cleared_has_no_window(method):
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 7))
    model.zero_grad()
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()
    optimizer.combined_loss(model.losses(0)).backward()
    optimizer.step()


@over_kinds
def test_cleared_gradients_of_another_scale_are_forgotten(method):
    model, optimizer = setup(method)
    scaler = torch.amp.GradScaler("cpu")
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 7), grad_scaler=scaler)
    model.zero_grad()
    optimizer.backward(lambda: model.losses(0))
    optimizer.step()


@over_kinds
def test_a_parameter_that_no_loss_reaches_keeps_no_gradient(method):
    """What tells that gradients were cleared is taken away again, in every case."""
    model, optimizer = setup(method)
    idle = torch.nn.Parameter(torch.ones((), dtype=torch.float64))  # the smallest
    optimizer.add_param_group({"params": [idle]})
    for clear in CLEAR.values():
        with optimizer.accumulate():
            optimizer.backward(lambda: part(model, 7))
        clear(model, optimizer)
        with optimizer.accumulate():
            optimizer.backward(lambda: part(model, 0))
        optimizer.backward(lambda: part(model, 1))
        assert idle.grad is None
        optimizer.step()


@over_kinds
@pytest.mark.parametrize("spoilt", range(2))
def test_a_window_that_is_skipped_leaves_no_gradient_of_its_own(method, spoilt):
    model, optimizer = setup(method, nonfinite="skip")
    idle = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer.add_param_group({"params": [idle]})
    for number in range(2):
        losses = part(model, number)
        with nullcontext() if number else optimizer.accumulate():
            optimizer.backward(spoil(losses, "nan") if number == spoilt else losses)
    assert idle.grad is None
    if method.kind != "known":
        assert gradients(model) == [None] * len(gradients(model))


@over_kinds
@pytest.mark.parametrize("what", ["gradients of one's own", "clipping", "another optimizer"])
def test_what_does_not_clear_gradients_leaves_the_window_open(method, what):
    model, optimizer = setup(method)
    twin, other = setup(method)
    elsewhere = torch.nn.Parameter(torch.ones(2))
    for net, run_ in ((model, optimizer), (twin, other)):
        run_.zero_grad()
        with run_.accumulate():
            run_.backward(lambda net=net: part(net, 0))
            if what.startswith("gradients") and net is model:
                net.trunk.weight.square().sum().backward()
                net.trunk.bias.square().sum().backward()
                net.heads[0].bias.square().sum().backward()
            elif what == "clipping" and net is model:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6)
            elif net is model:
                torch.optim.SGD([elsewhere], lr=0.1).zero_grad()
        run_.backward(lambda net=net: part(net, 1))
    if what.startswith("gradients"):
        for param in (twin.trunk.weight, twin.trunk.bias, twin.heads[0].bias):
            param.grad += 2 * param.detach()
    for own, expected in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- parameters that change


def weighted_gradient(optimizer, rows):
    """By parameter, sums of rows weighted by the coefficients; rows are (name, param, gradient)."""
    coefficients, total = optimizer.metrics.coefficients, {}
    for name, param, gradient in rows:
        total[param] = total.get(param, 0.0) + float(coefficients[name]) * gradient
    return total


def rows_of(losses, params):
    """(name, parameter, gradient) of each pair that meets, the slow obvious way."""
    for name, loss in losses.items():
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        yield from ((name, p, g) for p, g in zip(params, found, strict=True) if g is not None)


CHANGES = {
    "swap": lambda model: [
        model.heads[0].requires_grad_(False),
        model.heads[1].requires_grad_(True),
    ],
    "freeze": lambda model: model.heads[0].requires_grad_(False),
    "freeze a part": lambda model: model.trunk.bias.requires_grad_(False),
    "unfreeze": lambda model: model.heads[1].requires_grad_(True),
}


@over_kinds
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_belong_to_parameters_that_are_frozen_and_released(method, change, shared):
    """A parameter that is frozen within the window keeps the gradient that it got before."""
    model = SmallModel()
    model.heads[1].requires_grad_(False)
    arguments = {"shared_params": model.trunk} if shared else {}
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES), **arguments)
    rows = []
    for number in range(MICRO):
        params = [p for p in model.parameters() if p.requires_grad]
        rows += rows_of(part(model, number), params)
        with nullcontext() if number == MICRO - 1 else optimizer.accumulate():
            optimizer.backward(lambda number=number: part(model, number))
        if number == 0:
            change(model)
    expected = weighted_gradient(optimizer, rows)
    for param in model.parameters():
        torch.testing.assert_close(param.grad, expected.get(param))
    if optimizer.metrics.gramian is not None:
        matrix = torch.zeros(len(NAMES), 100, len(list(model.parameters())), dtype=torch.float64)
        for k, compared in enumerate(model.trunk.parameters() if shared else model.parameters()):
            for name, param, gradient in rows:
                if param is compared:
                    matrix[NAMES.index(name), : param.numel(), k] += gradient.reshape(-1)
        matrix = matrix.flatten(1)
        torch.testing.assert_close(optimizer.metrics.gramian, matrix @ matrix.T)


@over_kinds
def test_parameters_may_join_within_a_window(method):
    model, optimizer = setup(method)
    extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 0))
    optimizer.add_param_group({"params": [extra]})
    losses = part(model, 1)
    losses["a"] = losses["a"] + extra.square().sum()
    optimizer.backward(losses)
    torch.testing.assert_close(extra.grad, 2 * extra.detach() * optimizer.metrics.coefficients["a"])


# ---------------------------------------------------------------------- copies


@over_kinds
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_made_within_a_window_is_outside_of_it(method, duplicate):
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0))
        twin, other = duplicate((model, optimizer))
        other.zero_grad()
        other.backward(twin.losses(1))
        other.step()
        optimizer.backward(part(model, 1))  # which is still within
    assert other.state_dict()["balance"]["steps"] == 1
    with pytest.raises(BalanceError, match="Found it open"):
        optimizer.step()


@over_some("RandomWeights", "OnlineTchebycheff")
@pytest.mark.parametrize("closing", [False, True])
def test_a_loss_refused_for_joining_late_is_refused_again_and_changes_nothing(method, closing):
    model, optimizer = setup(method, loss_names=NAMES)
    train(model, optimizer, [0])
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 1, ("a", "b")))
    before, gradient = snapshot(optimizer.metrics.as_floats()), snapshot(gradients(model))
    for _ in range(2):
        window = nullcontext() if closing else optimizer.accumulate()
        with window, pytest.raises(BalanceError, match="same losses throughout"):
            optimizer.backward(lambda: part(model, 2))
        assert snapshot(optimizer.metrics.as_floats()) == before
        assert snapshot(gradients(model)) == gradient
    optimizer.backward(lambda: part(model, 2, ("a", "b")))
    twin, other = setup(method, loss_names=NAMES)
    train(twin, other, [0])
    with other.accumulate():
        other.backward(lambda: part(twin, 1, ("a", "b")))
    other.backward(lambda: part(twin, 2, ("a", "b")))
    assert snapshot(gradients(model)) == snapshot(gradients(twin))
    assert snapshot(optimizer.metrics.as_floats()) == snapshot(other.metrics.as_floats())


@over_kinds
def test_an_open_window_is_no_part_of_a_checkpoint(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    with optimizer.accumulate():
        optimizer.backward(part(model, 2))
    assert whole_state(model, optimizer) == before
    optimizer.load_state_dict(optimizer.state_dict())
    model.zero_grad()
    train(model, optimizer, [3])
    twin, other = setup(method)
    train(twin, other, [0, 1, 3])
    assert whole_state(model, optimizer) == whole_state(twin, other)


# ---------------------------------------------------------------------- errors within a window


@over_kinds
def test_a_step_that_does_not_close_the_window_is_refused(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    before = whole_state(model, optimizer)
    batches = [lambda number=number: part(model, number) for number in range(2)]
    with optimizer.accumulate():
        optimizer.backward(batches[0])
        with pytest.raises(BalanceError, match="Found it open"):
            optimizer.step()
    with pytest.raises(BalanceError, match=r"Found it open.*outside of `accumulate\(\)`"):
        optimizer.step()
    with pytest.raises(BalanceError, match="should only compute the losses"):
        optimizer.step(batches[1])
    assert whole_state(model, optimizer) == before
    optimizer.backward(batches[1])
    optimizer.step()
    by_closures(other, *(lambda number=number: part(twin, number) for number in range(2)))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
def test_a_step_with_a_window_opened_after_backward_is_refused(method):
    """It would apply the first gradient and leave the second to the next step."""
    model, optimizer = setup(method)
    optimizer.backward(model.losses(0))
    with optimizer.accumulate():
        optimizer.backward(model.losses(1))
    with pytest.raises(BalanceError, match="Found it open"):
        optimizer.step()


def spoil(losses, kind):
    """Something is wrong with loss "b"."""
    if kind == "nan":
        return {**losses, "b": losses["b"] * math.nan}
    if kind == "detached":
        return {**losses, "b": losses["b"].detach()}
    if kind == "unknown":
        return {**losses, "d": losses["a"] * 1.0}
    return {**losses, "b": losses["b"].expand(2)}


@over_kinds
@pytest.mark.parametrize("closing", [False, True])
def test_an_error_in_a_window_leaves_it_as_it_was(method, closing):
    model, optimizer = setup(method, loss_names=NAMES)
    twin, other = setup(method, loss_names=NAMES)
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 0))
    gradient = snapshot(gradients(model))
    for kind in ("nan", "detached", "unknown", "shape"):
        window = nullcontext() if closing else optimizer.accumulate()
        with window, pytest.raises(BalanceError, match=r"Loss `[bd]`"):
            optimizer.backward(spoil(part(model, 5), kind))
        assert snapshot(gradients(model)) == gradient, kind
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 1))
    optimizer.backward(lambda: part(model, 2))
    optimizer.step()
    by_closures(other, *(lambda number=number: part(twin, number) for number in range(MICRO)))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
@pytest.mark.parametrize("spoilt", range(MICRO))
def test_a_nan_in_a_window_skips_the_whole_window(method, spoilt):
    model, optimizer = setup(method, nonfinite="skip")
    before = whole_state(model, optimizer)

    def losses(number):
        values = part(model, number)
        return spoil(values, "nan") if number == spoilt else values

    optimizer.zero_grad()
    for number in range(MICRO - 1):
        with optimizer.accumulate():
            optimizer.backward(lambda: losses(number))  # noqa: B023
    optimizer.backward(lambda: losses(MICRO - 1))
    optimizer.step()
    after = whole_state(model, optimizer)
    assert after["model"] == before["model"]
    assert after["optimizer"]["balance"] == {**before["optimizer"]["balance"], "skipped": 1}

    twin, other = setup(method)
    for net, run_ in ((model, optimizer), (twin, other)):
        train(net, run_, [1])
    assert whole_state(model, optimizer)["model"] == whole_state(twin, other)["model"]


@over_some("SumLog", "FAMO-lagged", "FAMO-adam", "AnalyticQP-no-shift")
def test_a_bound_holds_for_the_window_not_for_each_micro_batch(method):
    """A batch may contribute nothing, or less than nothing, to a sum that is positive."""
    model, optimizer = setup(method)

    def shifted(number, by):
        return {name: loss - loss.detach() + by for name, loss in part(model, number).items()}

    with optimizer.accumulate():
        optimizer.backward(shifted(0, -0.5))
    optimizer.backward(shifted(1, 1.5))
    assert [float(loss) for loss in optimizer.metrics.losses.values()] == pytest.approx([1.0] * 3)
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(shifted(0, 0.5))
    with pytest.raises(BalanceError, match=r"Loss `a` should be at least 0.* Found -1\b"):
        optimizer.backward(shifted(1, -1.5))


@over_kinds
def test_combined_loss_in_a_window_is_refused(method):
    model, optimizer = setup(method)
    with optimizer.accumulate(), pytest.raises(BalanceError, match="Found a window"):
        optimizer.combined_loss(part(model, 0))
    with optimizer.accumulate():
        optimizer.backward(part(model, 0))
    with pytest.raises(BalanceError, match="Found a window"):
        optimizer.combined_loss(part(model, 1))


@over_some("SumLog")
def test_an_error_of_the_users_own_leaves_accumulate(method):
    model, optimizer = setup(method)
    with pytest.raises(KeyError), optimizer.accumulate():
        raise KeyError
    train(model, optimizer, [0])  # a step of its own, not a micro-batch
    twin, other = setup(method)
    train(twin, other, [0])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_some("FAMO-adam")
def test_a_window_observed_by_hand_needs_all_its_losses(method):
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0, ("a", "b")))
    optimizer.backward(part(model, 1, ("a", "c")))
    optimizer.step()
    with pytest.raises(BalanceError, match="losses of the last backward, `a`, `b`, `c`"):
        optimizer.observe(part(model, 1, ("a", "c")))


@over_some("MGDA-none")
def test_a_gradient_that_is_nan_in_a_window_is_named_when_it_closes(method):
    model, optimizer = setup(method, optimizer=sgd)
    losses = part(model, 0)
    losses["b"] = losses["b"] + (losses["b"] * 0.0).sqrt()
    with optimizer.accumulate():
        optimizer.backward(losses)
    with pytest.raises(NonFiniteError, match="gradient of loss `b`"):
        optimizer.backward(part(model, 1))


@over_kinds
def test_narrow_parameters_accumulate_in_their_own_precision(method):
    """As a plain loop does: the rows of a window have the dtype of their parameters."""
    model = SmallModel().to(torch.bfloat16)
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    by_closures(optimizer, *(lambda number=number: part(model, number) for number in range(MICRO)))
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert bool(flat_gradient(model).isfinite().all())


@over_some("FAMO-adam")
@pytest.mark.parametrize("closures", [(True, False), (False, True)])
def test_a_window_of_which_a_part_came_without_a_closure_waits_for_observe(method, closures):
    """A part of the window evaluated again is not the window."""
    model, optimizer = setup(method)
    twin, other = setup(method)
    for net, run, as_closure in ((model, optimizer, closures), (twin, other, (False, False))):
        parts = [functools.partial(part, net, number) for number in (0, 1)]
        first, last = (
            make if closure else make() for make, closure in zip(parts, as_closure, strict=True)
        )
        with run.accumulate():
            run.backward(first)
        run.backward(last)
        run.step()
        with pytest.raises(BalanceError, match="needs the losses of the same batch"):
            run.backward(net.losses())
        run.observe(sum_losses(make() for make in parts))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
def test_no_mark_of_a_window_stays_once_it_is_gone(method):
    """Neither after a skipped step, nor after a checkpoint is loaded in the middle."""
    model, optimizer = setup(method, nonfinite="skip")
    with optimizer.accumulate():
        optimizer.backward(part(model, 0))
    spoiled = {name: loss * math.nan for name, loss in part(model, 1).items()}
    optimizer.backward(spoiled)
    optimizer.step()
    if method.kind != "known":  # which has written the first gradients already
        assert all(parameter.grad is None for parameter in model.parameters())
    model, optimizer = setup(method, loss_names=NAMES)
    saved = optimizer.state_dict()
    with optimizer.accumulate():
        optimizer.backward(part(model, 0, ["a"]))
    optimizer.load_state_dict(saved)
    assert all(parameter.grad is None for parameter in model.heads[1].parameters())


@over_some("MGDA-none")
def test_clipping_within_a_window_leaves_no_mark(method):
    """It writes to every gradient; a parameter that no loss reaches must not move."""
    model, optimizer = setup(method, loss_names=NAMES)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0, ["a"]))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with optimizer.accumulate():
        optimizer.backward(part(model, 1, ["a"]))
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.backward(part(model, 2, ["a"]))
    assert all(parameter.grad is None for parameter in model.heads[1].parameters())
    assert all(parameter.grad is not None for parameter in model.heads[0].parameters())


@over_some("MGDA-none", "SumLog")
def test_gradients_that_are_cleared_by_way_of_data_give_the_window_up(method):
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward({name: 1e4 * loss for name, loss in part(model, 0).items()})
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()
    twin, other = setup(method)
    for net, run in ((model, optimizer), (twin, other)):
        run.backward(part(net, 1))
        run.step()
    assert_same_parameters(model, twin)


@over_kinds
def test_the_last_micro_batch_closes_the_window(method):
    """`last=` in place of the context manager, bit by bit."""
    model, optimizer = setup(method)
    twin, other = setup(method)
    for step in range(3):
        batches = [functools.partial(part, model, number) for number in numbers(step)]
        optimizer.zero_grad()
        for position, batch in enumerate(batches, 1):
            optimizer.backward(batch, last=position == MICRO)
        optimizer.step()
        by_closures(other, *(functools.partial(part, twin, number) for number in numbers(step)))
    assert whole_state(model, optimizer) == whole_state(twin, other)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0), last=True)  # the context manager has the last word
    with pytest.raises(BalanceError, match="closes a window"):
        optimizer.step()
