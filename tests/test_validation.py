"""Arguments, losses and calls that do not fit are refused by name, and change nothing."""

from __future__ import annotations

import ast
import dataclasses
import math
import re

import pytest
import torch
from torch import nn

import moo_balance
from moo_balance import (
    FAMO,
    MGDA,
    BalancedOptimizer,
    BalancedTrajectory,
    BalanceError,
    BalanceValueError,
    FixedWeights,
    MovingAverage,
    NashMTL,
    OnlineTchebycheff,
    SmoothTchebycheff,
    Sum,
    SumLog,
    Tchebycheff,
    WithConstant,
)
from moo_balance.engine import PerLoss
from moo_balance.errors import NonFiniteError
from tests.support.problems import (
    SmallModel,
    adam,
    gradients,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import METHODS, NAMES, over, over_kinds, over_some


def tensor(value, **arguments):
    return torch.tensor(value, requires_grad=True, **arguments)


def replace(name, value):
    """All losses, one of them replaced by what `value` makes of it."""

    def edit(losses):
        return {**losses, name: value(losses[name])}

    return edit


# A fault, and what the message must say: the loss at fault, the value found.
FAULTS = {
    "a list": (
        lambda losses: list(losses.values()),
        r'`losses`.*Found list.*`\{"a": losses\[0\], "b": losses\[1\], "c": losses\[2\]\}`\.',
    ),
    "a tensor": (lambda losses: losses["a"], r"`losses`.*Found Tensor.*the terms of a sum"),
    "none": (lambda losses: None, r"`losses`.*Found NoneType"),
    "empty": (lambda losses: {}, r"`losses`.*Found none"),
    "a number as name": (lambda losses: {**losses, 1: losses["a"]}, r"names. Found 1\b"),
    "an empty name": (lambda losses: {**losses, "": losses["a"]}, r"names. Found ''"),
    "undeclared": (lambda losses: {**losses, "rat": losses["a"]}, r"`rat`.*`a`, `b`, `c`"),
    "a float": (replace("b", lambda loss: loss.item()), r"`b`.*Found float.*`\.item\(\)`"),
    "none inside": (replace("b", lambda loss: None), r"`b`.*Found NoneType.*Leave it out"),
    "zero": (replace("b", lambda loss: 0.0), r"`b`.*Found float \(0.0\).*Leave it out"),
    "a whole zero": (replace("b", lambda loss: 0), r"`b`.*Found int \(0\).*Leave it out"),
    "a zero tensor": (
        replace("b", lambda loss: torch.tensor(0.0)),
        r"`b`.*attached.*Found a zero.*Leave it out",
    ),
    "a whole zero tensor": (replace("b", lambda loss: torch.tensor([0])), r"int64.*Leave it out"),
    "a list inside": (
        replace("b", lambda loss: [loss, loss]),
        r"`b`.*list.*Give each entry a name",
    ),
    "a vector": (replace("b", lambda loss: loss.repeat(3)), r"`b`.*shape \(3,\)"),
    "nothing": (replace("b", lambda loss: loss.repeat(0)), r"`b`.*shape \(0,\)"),
    "a whole number": (replace("b", lambda loss: loss.long()), r"`b`.*torch.int64"),
    "complex": (replace("b", lambda loss: loss + 0j), r"`b`.*torch.complex128"),
    "detached": (replace("b", lambda loss: loss.detach()), r"`b`.*attached.*Was it detached"),
    "not a number": (replace("b", lambda loss: loss * math.nan), r"`b`.*finite. Found nan"),
    "infinite": (replace("c", lambda loss: loss / 0), r"`c`.*finite. Found inf"),
    "minus infinite": (replace("c", lambda loss: -loss / 0), r"`c`.*finite. Found -inf"),
}


@over_kinds
def test_bad_losses_are_refused_and_change_nothing(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    grads = snapshot(gradients(model))
    figures = snapshot(optimizer.metrics.as_dict())
    for fault, (edit, message) in FAULTS.items():
        for call in (optimizer.backward, optimizer.combined_loss, by_closure(optimizer)):
            with pytest.raises(BalanceValueError, match=message):
                call(edit(model.losses(2)))
        assert whole_state(model, optimizer) == before, fault
        assert snapshot(gradients(model)) == grads, fault
        assert snapshot(optimizer.metrics.as_dict()) == figures, fault


def test_losses_without_names_lead_to_a_mapping_of_them():
    one, other = (tensor(value) for value in (1.0, 2.0))
    pair = '{"first": losses[0], "second": losses[1]}'
    many = '{"first": losses[0], "second": losses[1], "third": losses[2], …}'
    shown = {
        f"Found list. Write `{pair}`.": [one, other],
        f"Found tuple. Write `{pair}`.": (one, other),
        f"Found Tensor. Write `{pair}`.": torch.stack([one, other]),
        f"Found list. Write `{many}`.": [one] * 4,
        "Found list. Write `dict(losses)`.": [("a", one), ("b", other)],
        f"Found list. Write `{pair}`": [(one, other), (other, one)],
        'Found list. Write `{"rate": rate, "distortion": distortion}`.': [],
        'Found float. Write `{"rate": rate, "distortion": distortion}`.': 1.0,
    }
    optimizer = BalancedOptimizer(torch.optim.SGD([one, other]), Sum())
    for message, losses in shown.items():
        with pytest.raises(BalanceValueError, match=re.escape(message)):
            optimizer.backward(losses)
    named = eval(pair, {"losses": [one, other]})
    assert optimizer.backward(named) == {"first": one, "second": other}


def by_closure(optimizer):
    return lambda losses: optimizer.backward(lambda: losses)


@over_kinds
def test_training_goes_on_after_refused_losses(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for step in range(4):
        optimizer.zero_grad()
        with pytest.raises(BalanceValueError):
            optimizer.backward(replace("a", lambda loss: loss * math.nan)(model.losses(step)))
        train(model, optimizer, [step])
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_some("SumLog-bounds", "FAMO-lagged", "FAMO-adam", "AnalyticQP", "MGDA-log-every")
def test_a_loss_below_its_bound_is_refused_by_name_value_and_method(method):
    bounds = dict(zip(NAMES, method.bounds(NAMES), strict=True))
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    grads = snapshot(gradients(model))
    for name, bound in bounds.items():
        value = bound - 1.5
        at_fault = replace(name, lambda loss, value=value: loss - loss.detach() + value)
        named = type(optimizer.weighting).__name__
        message = f"`{name}` should be at least {bound:g}, because {named} takes the logarithm of"
        with pytest.raises(BalanceValueError, match=message) as caught:
            optimizer.backward(at_fault(model.losses(2)))
        assert f"Found {value:g}. If this batch has no such loss" in str(caught.value)
    assert whole_state(model, optimizer) == before
    assert snapshot(gradients(model)) == grads


@pytest.mark.parametrize(
    ("weighting", "reason"),
    [
        (MGDA("loss"), "MGDA divides by it."),
        (MGDA("log"), "MGDA takes the logarithm of"),
        (MovingAverage(MGDA("loss+")), "MGDA divides by it."),
        (SmoothTchebycheff(log=True), "SmoothTchebycheff takes the logarithm of"),
    ],
    ids=repr,
)
def test_the_reason_for_a_bound_is_what_the_method_does(weighting, reason):
    model = SmallModel()
    at_fault = replace("a", lambda loss: loss - loss.detach() - 1.0)
    with pytest.raises(BalanceValueError, match=f"at least 0, because {reason}"):
        BalancedOptimizer(sgd(model), weighting).backward(at_fault(model.losses()))


@over(lambda method: max(method.bounds(NAMES)) == -math.inf)
def test_a_negative_loss_is_accepted_where_no_logarithm_is_taken(method):
    model, optimizer = setup(method)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward({name: -loss for name, loss in model.losses().items()})
        optimizer.step()


@over_kinds
def test_the_first_step_declares_the_names(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses(0, ["c"]) if method.kind != "known" else model.losses())
    optimizer.zero_grad()
    train(model, optimizer, [0], ["a", "b"] if method.kind != "known" else NAMES)
    name = "c" if method.kind != "known" else "d"
    with pytest.raises(BalanceValueError, match=f"`{name}` is none of.*first step declares"):
        optimizer.backward({**model.losses(1), name: model.losses(1)["c"]})


@over_kinds
def test_a_refused_first_call_declares_no_loss_name(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceValueError):
        optimizer.backward({"a": model.losses()["a"], "d": tensor(math.nan)})
    assert whole_state(model, optimizer) == before
    train(model, optimizer, [0])
    assert optimizer.state_dict()["balance"]["names"] == list(NAMES)


# ---------------------------------------------------------------------- calls in the wrong order


@over_kinds
def test_step_before_backward_is_refused(method):
    model, optimizer = setup(method)
    for steps in range(2):
        before = whole_state(model, optimizer)
        with pytest.raises(
            BalanceError, match="should follow `backward` or `combined_loss`"
        ) as caught:
            optimizer.step()
        assert "Call `optimizer.backward(losses)`, in place of `loss.backward()`" in str(
            caught.value
        )
        assert "micro-batch" not in str(caught.value)
        assert whole_state(model, optimizer) == before
        train(model, optimizer, [steps])


@over_kinds
def test_observe_before_step_is_refused(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)
    optimizer.observe(model.losses())  # as after a first step that GradScaler skipped
    assert whole_state(model, optimizer) == before
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(model.losses(1))
    with pytest.raises(BalanceError, match="`observe` should follow `step`"):
        optimizer.observe(model.losses(1))
    assert whole_state(model, optimizer) == before


@over_kinds
def test_observe_without_need_does_nothing(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)
    optimizer.observe(model.losses())
    assert whole_state(model, optimizer) == before


@over_some("FAMO-adam", "MovingAverage-FAMO")
def test_observing_other_losses_is_refused_and_can_be_repeated(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    train(twin, other, [0])
    optimizer.backward(model.losses())
    optimizer.step()
    before = whole_state(model, optimizer)
    after = model.losses()
    faults = {
        r"`losses`.*Found `a`, `b`": {name: after[name] for name in "ab"},
        r"`d`.*none of the declared ones": {**after, "d": after["a"]},
        r"`b`.*Found float": {**after, "b": 1.0},
        r"`b`.*shape \(2,\)": {**after, "b": torch.ones(2)},
        r"`losses`.*Found list": list(after.values()),
    }
    for message, losses in faults.items():
        with pytest.raises(BalanceValueError, match=message):
            optimizer.observe(losses)
        assert whole_state(model, optimizer) == before
    optimizer.observe({name: loss.detach() for name, loss in after.items()})
    assert snapshot(optimizer.state_dict()) == snapshot(other.state_dict())


@over_some("FAMO-adam", "BalancedTrajectory-defaults", "MovingAverage-FAMO")
def test_a_missing_observation_is_named_with_three_ways_to_make_it(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses())
    optimizer.step()
    before = whole_state(model, optimizer)
    grads = snapshot(gradients(model))
    for call in (optimizer.backward, optimizer.combined_loss):
        with pytest.raises(BalanceError) as caught:
            call(model.losses(1))
        for way in (
            "closure",
            "`observe(losses)`",
            "lagged=True",
            type(optimizer.weighting).__name__,
        ):
            assert way in str(caught.value)
    assert whole_state(model, optimizer) == before
    assert snapshot(gradients(model)) == grads
    optimizer.observe(model.losses())
    train(model, optimizer, [1])


@over_kinds
def test_a_closure_that_has_called_backward_itself_is_refused(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)

    def closure():
        optimizer.zero_grad()
        losses = model.losses(1)
        optimizer.backward(losses)
        return losses

    with pytest.raises(BalanceError, match="only compute the losses"):
        optimizer.step(closure)
    assert whole_state(model, optimizer) == before


@over_kinds
def test_a_closure_that_has_called_backward_and_returns_a_scalar(method):
    """As that of a plain optimizer. Nothing can be evaluated again after its step."""
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)

    def closure():
        optimizer.zero_grad()
        return sum(optimizer.backward(model.losses(1)).values())

    if method.kind == "observing":
        for _ in range(2):
            with pytest.raises(BalanceError, match=r"Found a closure of `step` that has called"):
                optimizer.step(closure)
        assert whole_state(model, optimizer) == before
        optimizer.step(lambda: model.losses(1))
    else:
        assert optimizer.step(closure).requires_grad
    assert optimizer.state_dict()["balance"]["steps"] == 2


@over_kinds
def test_a_closure_that_returns_no_losses_changes_nothing(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)
    losses = model.losses()
    for result in (None, 1.0, losses["a"], list(losses.values())):
        message = rf"closure given to `step` should return a dict.*Found {type(result).__name__}\."
        with pytest.raises(BalanceValueError, match=message):
            optimizer.step(lambda result=result: result)
    assert whole_state(model, optimizer) == before


@over_kinds
def test_losses_where_a_function_belongs_or_the_other_way_round_are_refused(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)
    for losses in (model.losses(), list(model.losses().values())):
        message = rf"takes a function.*Found {type(losses).__name__}. Call `backward\(losses\)`"
        with pytest.raises(BalanceValueError, match=message):
            optimizer.step(losses)
    with pytest.raises(BalanceValueError, match=r"Found a closure. Call it: `combined_loss\("):
        optimizer.combined_loss(model.losses)
    assert whole_state(model, optimizer) == before


@over_kinds
def test_a_combined_loss_without_its_backward_is_no_step(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = snapshot(model.state_dict())
    for clears in (False, True):  # gradients of the step before are no substitute
        if clears:
            optimizer.zero_grad()
        combined = optimizer.combined_loss(model.losses(1))
        with pytest.raises(BalanceError, match="should follow a backward pass of"):
            optimizer.step()
        assert snapshot(model.state_dict()) == before
        assert optimizer.state_dict()["balance"]["steps"] == 1
    combined.backward()
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 2


@over_kinds
def test_an_error_of_a_closure_passes_through_and_changes_nothing(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    before = whole_state(model, optimizer)

    def closure():
        raise KeyError("batch")

    for call in (optimizer.step, optimizer.backward):
        with pytest.raises(KeyError, match="batch"):
            call(closure)
    assert whole_state(model, optimizer) == before


@over_kinds
def test_backward_through_a_freed_graph_stages_nothing(method):
    """Autograd's own error, which comes late: no step may be made of what it left."""
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    losses = model.losses(1)
    optimizer.backward(losses)
    optimizer.zero_grad()
    before = whole_state(model, optimizer)
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(losses)
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()
    assert whole_state(model, optimizer) == before


# ---------------------------------------------------------------------- construction


def arguments_at_fault():
    stranger = nn.Parameter(torch.zeros(2))
    model = SmallModel()
    inner = sgd(model)
    line_search = torch.optim.LBFGS(model.parameters())
    yield "optimizer", (None, Sum()), {}, "NoneType"
    yield "optimizer", (model, Sum()), {}, "SmallModel"
    yield "optimizer", (line_search, Sum()), {}, "line search"
    wrapped = BalancedOptimizer(inner, Sum())
    yield "optimizer", (wrapped, Sum()), {}, "BalancedOptimizer: it is already wrapped"
    yield "optimizer", (torch.optim.SGD, Sum()), {}, "Found the class SGD. Pass an instance"
    yield (
        "optimizer",
        (model.parameters(), Sum()),
        {},
        r"generator\. Pass an opt.*`torch\.optim\.Adam\(",
    )
    yield "optimizer", (list(model.parameters()), Sum()), {}, "Found Parameter. Pass an optimizer"
    yield "weighting", (inner, NashMTL), {}, r"Found the class NashMTL\. Pass .*, `NashMTL\(\)`\.$"
    yield "weighting", (inner, FixedWeights), {}, r"the class FixedWeights.*`FixedWeights\(…\)`\.$"
    yield "engine", (inner, Sum()), {"engine": PerLoss}, r"the class PerLoss\..*`PerLoss\(\)`\.$"
    yield "weighting", (inner, PerLoss), {}, r"Found <class '.*PerLoss'>\.$"
    yield "engine", (inner, Sum()), {"engine": NashMTL}, r"Found <class '.*NashMTL'>\.$"
    yield "weighting", (inner, "famo"), {}, "'famo'"
    yield "weighting", (inner, dict), {}, "Found <class 'dict'>"
    yield "engine", (inner, Sum()), {"engine": "rows"}, "'rows'"
    yield "nonfinite", (inner, Sum()), {"nonfinite": "ignore"}, "'ignore'"
    yield "loss_names", (inner, Sum()), {"loss_names": "rate"}, "'rate'"
    yield "loss_names", (inner, Sum()), {"loss_names": []}, r"\[\]"
    yield "loss_names", (inner, Sum()), {"loss_names": ["a", "a"]}, r"\['a', 'a'\]"
    yield "loss_names", (inner, Sum()), {"loss_names": ["a", ""]}, "''"
    yield "loss_names", (inner, Sum()), {"loss_names": ["a", 1]}, "1"
    yield "shared_params", (inner, MGDA()), {"shared_params": []}, "none"
    yield "shared_params", (inner, MGDA()), {"shared_params": [stranger]}, r"shape \(2,\)"
    yield "shared_params", (inner, MGDA()), {"shared_params": nn.Linear(2, 3)}, r"shape \(3, 2\)"
    yield "shared_params", (inner, MGDA()), {"shared_params": "trunk"}, "module.*Found 'trunk'"
    yield "shared_params", (inner, MGDA()), {"shared_params": stranger}, "Found a single tensor"
    yield "shared_params", (inner, MGDA()), {"shared_params": 3}, "Found 3"
    yield "check_ranks_every", (inner, Sum()), {"check_ranks_every": -1}, "-1"
    yield "process_group", (inner, Sum()), {"process_group": "gloo"}, "'gloo'"
    yield "bounds", (inner, FAMO(bounds={"d": 1.0})), {"loss_names": ["a"]}, "`d`"


@pytest.mark.parametrize(
    ("argument", "positional", "keywords", "found"),
    list(arguments_at_fault()),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_the_optimizer_are_checked(argument, positional, keywords, found):
    with pytest.raises(BalanceValueError, match=rf"`{argument}`.*{found}"):
        BalancedOptimizer(*positional, **keywords)


def test_named_arguments_are_checked_with_the_first_losses():
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), FAMO(bounds={"d": 1.0}))
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceValueError, match=r"`bounds`.*`d`"):
        optimizer.backward(model.losses())
    assert whole_state(model, optimizer) == before


BY_NAME = {
    "values": FixedWeights({"a": 1.0, "b": 1.0, "c": 1.0}),
    "bounds": SumLog(bounds={"b": -1.0}),
    "shift": FAMO(shift={"b": 1.0}),
    "preference": OnlineTchebycheff(preference={"a": 1.0, "b": 2.0, "c": 1.0}),
    "ideal": Tchebycheff(ideal={"b": -1.0}),
    "nadir": SmoothTchebycheff(nadir={"a": 50.0, "b": 50.0, "c": 500.0}),
    "inner": MovingAverage(FixedWeights({"a": 1.0, "b": 1.0, "c": 1.0})),
}


@pytest.mark.parametrize("weighting", BY_NAME.values(), ids=BY_NAME)
def test_a_first_batch_that_lacks_a_loss_leads_to_the_argument_that_declares_it(weighting):
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), weighting)
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceValueError, match=r"Found `b`, which is none.*`loss_names=\[…\]`"):
        optimizer.backward(model.losses(0, ("a", "c")))
    assert whole_state(model, optimizer) == before
    optimizer = BalancedOptimizer(sgd(model), weighting, loss_names=NAMES)
    train(model, optimizer, [0], ("a", "c"))
    train(model, optimizer, [1])


@over(lambda method: method in METHODS and max(method.bounds(NAMES)) > -math.inf)
def test_a_loss_below_its_bound_leads_to_arguments_that_the_method_has(method):
    model, optimizer = setup(method)
    at_fault = replace("a", lambda loss: loss - loss.detach() - 5.0)
    with pytest.raises(BalanceValueError, match="should be at least") as caught:
        optimizer.backward(at_fault(model.losses()))
    advice = str(caught.value).partition("Otherwise: ")[2]
    bounded = optimizer.weighting.needs(0).method
    if advice.startswith("Give a loss that stays"):
        assert not {"shift", "bounds"} & {field.name for field in dataclasses.fields(bounded)}
        return
    name, arguments = re.match(r"Give (\w+) (.*), or a loss that stays above", advice).groups()
    cls = getattr(moo_balance, name)
    fields = {field.name for field in dataclasses.fields(cls)}
    named = re.findall(r"`(\w+)", arguments)
    assert named
    assert set(named) <= fields
    if isinstance(bounded, WithConstant):
        bounded = bounded.weighting
    assert isinstance(bounded, cls)
    settings = re.findall(r"`(\w+)=([^`]*)`", arguments)
    helped = {key: ast.literal_eval(value) for key, value in settings}
    for key, change in (("shift", 10.0), ("bounds", -10.0), ("ideal", -10.0)):
        if key in named and not helped:
            helped = {key: change}
    changed = dataclasses.replace(bounded, **helped)
    BalancedOptimizer(sgd(model), changed).backward(at_fault(model.losses()))


def test_a_method_of_ones_own_may_say_what_helps():
    class Roots(Sum):
        def lower_bounds(self, names):
            return [0.0] * len(names)

    class Helpful(Roots):
        bound_advice = "Give Helpful a `floor`."

    model = SmallModel()
    at_fault = replace("a", lambda loss: loss - loss.detach() - 1.0)
    for weighting, advice in ((Roots(), "Give a loss that stays above"), (Helpful(), "`floor`")):
        with pytest.raises(BalanceValueError, match=advice):
            BalancedOptimizer(sgd(model), weighting).backward(at_fault(model.losses()))


@pytest.mark.parametrize(
    ("weighting", "lagged"),
    [
        (FAMO(), " FAMO(lagged=True),"),
        (BalancedTrajectory(), " BalancedTrajectory(lagged=True),"),
        (MovingAverage(FAMO()), " MovingAverage(FAMO(lagged=True)),"),
    ],
)
def test_the_method_that_a_missing_observation_leads_to_exists(weighting, lagged):
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), weighting)
    optimizer.backward(model.losses())
    optimizer.step()
    with pytest.raises(BalanceError, match=re.escape(lagged)):
        optimizer.backward(model.losses())
    other = eval(lagged.strip(" ,"), vars(moo_balance))
    train(model, BalancedOptimizer(sgd(model), other), range(2))


def test_a_method_without_such_a_form_is_not_said_to_have_one():
    class Watching(Sum):
        observes_step = True

    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Watching())
    optimizer.backward(model.losses())
    optimizer.step()
    with pytest.raises(BalanceError, match=r"`observe\(losses\)` after `step`\.$"):
        optimizer.backward(model.losses())


def test_errors_tell_bad_values_from_calls_in_the_wrong_order():
    assert issubclass(BalanceValueError, (BalanceError, ValueError))
    assert issubclass(NonFiniteError, BalanceValueError)
    assert not issubclass(BalanceError, ValueError)
