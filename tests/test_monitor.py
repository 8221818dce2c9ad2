"""Metrics of a step: by name, on the device, and as Python floats only when asked for."""

from __future__ import annotations

import dataclasses
import math

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from moo_balance import (
    MGDA,
    BalancedOptimizer,
    BalanceValueError,
    History,
    StepMetrics,
    Sum,
)
from moo_balance.functional import cosine_similarity
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.problems import SmallModel, jacobian, setup, sgd, snapshot, train
from tests.support.registry import NAMES, over_kinds, over_some

PAIRS = [("a", "b"), ("a", "c"), ("b", "c")]


@over_kinds
def test_the_metrics_are_those_of_the_last_backward(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    losses = model.losses(2)
    rows = jacobian(losses, list(model.parameters()))
    optimizer.backward(losses)
    balance = optimizer.metrics
    assert balance.names == NAMES
    assert snapshot(balance.losses) == snapshot({n: loss.detach() for n, loss in losses.items()})
    for figures in (balance.losses, balance.weights, balance.coefficients):
        assert tuple(figures) == NAMES
        assert all(value.shape == () and not value.requires_grad for value in figures.values())
    if balance.gramian is None:
        assert balance.cosines == {}
        assert balance.alignment is None
    else:
        torch.testing.assert_close(balance.gramian, rows @ rows.T, rtol=1e-10, atol=1e-12)
        assert list(balance.cosines) == PAIRS
        cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
        torch.testing.assert_close(balance.cosines["a", "b"], cosine)
        torch.testing.assert_close(balance.alignment, naive_alignment(rows))


def test_metrics_are_empty_before_the_first_backward():
    balance = StepMetrics()
    assert (balance.names, balance.gramian, balance.alignment) == ((), None, None)
    assert balance.losses == balance.weights == balance.coefficients == balance.cosines == {}
    assert balance.as_floats() == {}
    assert BalancedOptimizer(sgd(SmallModel()), Sum()).log_dict() == {"moo/skipped": 0.0}


def test_metrics_are_those_of_one_backward():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    train(model, optimizer, [0])
    before, value = optimizer.metrics, optimizer.metrics.losses["a"].item()
    losses = model.losses(1)
    optimizer.backward(losses)
    assert optimizer.metrics.losses["a"].item() == losses["a"].item() != value
    assert before.losses["a"].item() == value


@over_kinds
def test_log_dict_is_flat_floats(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    figures = optimizer.log_dict()
    expected = {f"moo/{kind}/{n}" for kind in ("loss", "weight", "coefficient") for n in NAMES}
    if method.gramian:
        expected |= {f"moo/cosine/{a},{b}" for a, b in PAIRS} | {"moo/alignment"}
    assert set(figures) == expected | {"moo/satisfied", "moo/skipped"}
    assert all(type(value) is float and math.isfinite(value) for value in figures.values())
    for name in NAMES:
        loss = optimizer.metrics.losses[name].item()
        assert figures[f"moo/loss/{name}"] == pytest.approx(loss, rel=1e-6)
    assert set(optimizer.log_dict(prefix="")) == {key.removeprefix("moo/") for key in figures}


def test_cosines_are_free_of_scale_and_nan_where_a_gradient_is_not_finite():
    gramian = torch.tensor([[4.0, -3.0, 1.0], [-3.0, 9.0, 2.0], [1.0, 2.0, 1.0]])
    balance = StepMetrics(NAMES, gramian)
    expected = cosine_similarity(gramian)
    assert snapshot(balance.cosines) == snapshot(
        {("a", "b"): expected[0, 1], ("a", "c"): expected[0, 2], ("b", "c"): expected[1, 2]}
    )
    gramian[1, 1] = math.inf
    broken = balance.cosines
    assert broken["a", "b"].isnan()
    assert broken["b", "c"].isnan()
    assert torch.equal(broken["a", "c"], expected[0, 2])


class Operations(TorchDispatchMode):
    """Counts what is computed, and how many numbers or tensors it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def random_metrics(count, names=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 2 * count, generator=generator, dtype=dtype)
    names = tuple(f"loss {k}" for k in range(count)) if names is None else names
    return StepMetrics(names, rows @ rows.T, *rows.abs()[:, :3].unbind(1))


@pytest.mark.parametrize("pairs", [None, True, False])
def test_metrics_take_as_many_operations_for_many_losses_as_for_few(pairs, monkeypatch):
    copies = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or tolist(self))
    counts = []
    for count in (9, 50):
        metrics = random_metrics(count)
        with Operations() as operations:
            metrics.as_floats(pairs)
            History().append(metrics)
        counts.append(len(operations.names))
    assert len(copies) == 2
    assert counts[0] == counts[1] < 40


def test_values_of_any_dtype_are_copied_together():
    vector = torch.tensor([0.5, 0.25])
    metrics = StepMetrics(("a", "b"), None, vector.double(), vector.bfloat16(), vector)
    assert metrics.as_floats() == {
        f"{kind}/{name}": value
        for kind in ("loss", "weight", "coefficient")
        for name, value in (("a", 0.5), ("b", 0.25))
    } | {"satisfied": 0.0}


def cosine_keys(figures):
    return [key.removeprefix("cosine/") for key in figures if key.startswith("cosine/")]


@pytest.mark.parametrize("count", [1, 2, 8, 9, 200])
def test_cosines_are_listed_for_few_losses_and_summarized_for_many(count):
    metrics = random_metrics(count)
    cosines = torch.tensor([value.item() for value in metrics.cosines.values()])
    assert len(cosines) == math.comb(count, 2)
    if count == 1:
        assert cosine_keys(metrics.as_floats(True)) == cosine_keys(metrics.as_floats(False)) == []
        return
    whole, short = metrics.as_floats(True), metrics.as_floats(False)
    pairs = [whole[f"cosine/{label}"] for label in cosine_keys(whole)]
    assert pairs == cosines.tolist()
    assert cosine_keys(short) == ["min", "mean"]
    assert short["cosine/min"] == cosines.min().item()
    assert short["cosine/mean"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert metrics.as_floats() == (whole if count <= 8 else short)
    history = History()
    history.append(metrics)
    for key, value in {**whole, **short}.items() if count < 10 else short.items():
        assert history.series(key) == ([0], [pytest.approx(value, abs=1e-6)])
    for pairs in (None, True, False):
        assert history.keys(pairs) == list(metrics.as_floats(pairs))


def test_log_dict_passes_the_choice_of_cosines_on():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA())
    train(model, optimizer, [0])
    assert cosine_keys(optimizer.log_dict("")) == ["a,b", "a,c", "b,c"]
    assert cosine_keys(optimizer.log_dict("", pairs=True)) == ["a,b", "a,c", "b,c"]
    assert cosine_keys(optimizer.log_dict("", pairs=False)) == ["min", "mean"]


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b,c", "a,b", "c"),
        ("a", "a,b", "b", ""),
        ("a\\", "b", "a\\,b", ",b"),
        ("a/b", "a", "b/a,b", "cosine/a"),
        ("min", "mean", "skipped", "loss/min"),
    ],
    ids=str,
)
def test_names_of_any_characters_have_keys_of_their_own(names):
    metrics = random_metrics(4, names)
    whole = metrics.as_floats(True)
    assert len(whole) == 3 * 4 + 6 + 2
    assert not whole.keys() & {"cosine/min", "cosine/mean", "skipped"}
    history = History()
    history.append(metrics)
    for key, value in whole.items():
        assert history.series(key) == ([0], [value])


def test_the_cosine_of_names_with_commas_is_that_of_their_gradients():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([parameter], lr=0.1), MGDA())
    x, y = parameter
    optimizer.backward({"a": x, "b,c": x + y, "a,b": y, "c": -x})
    figures = optimizer.log_dict("")
    assert figures[r"cosine/a,b\,c"] == pytest.approx(math.sqrt(0.5))
    assert figures[r"cosine/a\,b,c"] == 0.0
    assert figures["cosine/a,c"] == -1.0


# ---------------------------------------------------------------------- alignment


def naive_alignment(rows):
    """The score from the gradients, of which none is zero."""
    units = rows / rows.norm(dim=1, keepdim=True)
    return 2 * units.mean(0).square().sum() - 1


def metrics_of(rows):
    return StepMetrics(tuple(f"loss {k}" for k in range(len(rows))), gramian_of(rows))


@property_test
@given(jacobians(counts=(2, 12), decades=3.0, degenerate=True))
def test_the_alignment_is_that_of_the_unit_gradients(rows):
    # In place of a zero gradient stands one in a direction that no other gradient has.
    apart = torch.cat([rows, (rows == 0).all(1, keepdim=True).diag_embed()[:, 0].to(rows)], dim=1)
    metrics = metrics_of(rows)
    score = metrics.alignment
    assert score.shape == ()
    torch.testing.assert_close(score, naive_alignment(apart), rtol=0, atol=1e-12)
    assert -1.0 <= score.item() <= 1.0
    if len(rows) == 2:
        assert torch.equal(score, metrics.cosines["loss 0", "loss 1"])
    for pairs in (None, True, False):
        assert torch.equal(metrics.as_dict(pairs)["alignment"], score)
        assert metrics.as_floats(pairs)["alignment"] == pytest.approx(score.item(), abs=1e-6)
    history = History()
    history.append(metrics)
    assert history.series("alignment") == ([0], [pytest.approx(score.item(), abs=1e-6)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_gradients_along_one_line_or_perpendicular_have_known_alignments(count, dtype):
    names = tuple(map(str, range(count)))
    equal, diagonal = torch.ones(count, count, dtype=dtype), torch.eye(count, dtype=dtype)
    assert StepMetrics(names, equal).alignment.item() == pytest.approx(1.0, abs=1e-6)
    assert StepMetrics(names, diagonal).alignment.item() == pytest.approx(2 / count - 1, abs=1e-6)
    # Unit vectors to the corners of a regular simplex cancel.
    simplex = (count * diagonal.double() - equal.double()) / (count - 1)
    assert StepMetrics(names, simplex).alignment.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("pairs", [None, True, False])
def test_one_loss_has_no_alignment(pairs):
    metrics = random_metrics(1)
    assert metrics.alignment is None
    assert list(metrics.as_floats(pairs)) == ["loss/loss 0", "weight/loss 0"]
    history = History()
    history.append(metrics)
    with pytest.raises(BalanceValueError, match="Found 'alignment'"):
        history.series("alignment")


def test_a_zero_gradient_counts_as_perpendicular_to_the_others():
    along = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    assert metrics_of(along[1:]).alignment == 0.0
    assert metrics_of(along).alignment.item() == pytest.approx(1 / 9)
    assert metrics_of(torch.zeros(3, 2)).alignment.item() == pytest.approx(-1 / 3)
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([parameter], lr=0.1), MGDA())
    x, y = parameter
    optimizer.backward({"a": x, "b": 3 * x, "c": 0 * y})
    assert optimizer.metrics.satisfied == ("c",)
    assert optimizer.log_dict("")["alignment"] == pytest.approx(1 / 9)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_alignment_is_nan_where_a_gradient_is_not_finite(value):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    metrics = StepMetrics(NAMES, gramian)
    assert metrics.alignment.isnan()
    for pairs in (True, False):
        assert math.isnan(metrics.as_floats(pairs)["alignment"])


@pytest.mark.parametrize(
    ("pairs", "cosines"),
    [
        (None, ["cosine/a,b", "cosine/a,c", "cosine/b,c"]),
        (True, ["cosine/a,b", "cosine/a,c", "cosine/b,c"]),
        (False, ["cosine/min", "cosine/mean"]),
    ],
)
def test_the_keys_of_a_step_with_a_gramian_in_order(pairs, cosines):
    metrics = dataclasses.replace(random_metrics(3, NAMES), projected=torch.tensor(0.25))
    vectors = [f"{kind}/{name}" for kind in ("loss", "weight", "coefficient") for name in NAMES]
    expected = [*vectors, *cosines, "alignment", "gramian/projected", "satisfied"]
    assert list(metrics.as_dict(pairs)) == list(metrics.as_floats(pairs)) == expected
    values = metrics.as_floats(pairs)
    assert values["alignment"] == metrics.alignment.item()
    assert (values["gramian/projected"], values["satisfied"]) == (0.25, 0.0)
    history = History()
    history.append(metrics)
    assert history.keys(pairs) == expected


# ---------------------------------------------------------------------- history


def record(method):
    model, optimizer = setup(method)
    history = History()
    for step, names in enumerate((NAMES, ("a", "b"), NAMES, NAMES)):
        train(model, optimizer, [step], names)
        history.append(optimizer.metrics)
    return optimizer, history


@over_some("Sum", "MGDA-none", "MGDA-every")
def test_a_history_keeps_the_steps_at_which_a_figure_was_present(method):
    optimizer, history = record(method)
    assert len(history) == 4
    assert history.series("loss/a")[0] == [0, 1, 2, 3]
    steps, values = history.series("loss/c")
    assert steps == [0, 2, 3]
    assert values[-1] == pytest.approx(optimizer.metrics.losses["c"].item(), rel=1e-6)
    with pytest.raises(BalanceValueError, match=r"`key` should be one of .*'loss/d'\. The nearest"):
        history.series("loss/d")
    assert history.keys()[:3] == ["loss/a", "loss/b", "loss/c"]
    if method.id == "Sum":
        with pytest.raises(BalanceValueError, match="Found 'cosine/a,c'"):
            history.series("cosine/a,c")
    else:
        cosines = {"MGDA-none": [0, 2, 3], "MGDA-every": [0, 3]}[method.id]
        assert history.series("cosine/a,c")[0] == cosines
        steps, values = history.series("alignment")
        assert steps == {"MGDA-none": [0, 1, 2, 3], "MGDA-every": [0, 3]}[method.id]
        assert values[-1] == pytest.approx(optimizer.metrics.alignment.item(), rel=1e-6)


def test_a_history_is_not_changed_by_later_steps():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA())
    history = History()
    train(model, optimizer, [0])
    history.append(optimizer.metrics)
    before = {key: history.series(key) for key in history.keys()}  # noqa: SIM118
    train(model, optimizer, range(1, 4))
    assert {key: history.series(key) for key in before} == before


def test_a_bounded_history_keeps_the_last_steps_and_their_numbers():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA())
    whole, last = History(), History(maxlen=3)
    for step in range(7):
        train(model, optimizer, [step], "abc" if step != 5 else "ab")
        whole.append(optimizer.metrics)
        last.append(optimizer.metrics)
    assert (len(whole), len(last)) == (7, 3)
    for key in whole.keys():  # noqa: SIM118
        steps, values = whole.series(key)
        kept = [index for index, step in enumerate(steps) if step >= 4]
        assert last.series(key) == ([steps[k] for k in kept], [values[k] for k in kept])
    assert last.series("loss/c")[0] == [4, 6]


@pytest.mark.parametrize("maxlen", [0, -1, 2.0, "all", True])
def test_a_bound_that_is_no_number_of_steps_is_refused(maxlen):
    with pytest.raises(BalanceValueError, match=f"`maxlen`.*Found {maxlen!r}"):
        History(maxlen)


@pytest.mark.parametrize("metrics", [None, {"loss/a": 1.0}, Sum()], ids=["none", "dict", "other"])
def test_a_history_takes_metrics_only(metrics):
    history = History()
    with pytest.raises(BalanceValueError, match=f"`metrics`.*Found {type(metrics).__name__}"):
        history.append(metrics)
    assert len(history) == 0


def test_a_history_refuses_the_metrics_from_before_the_first_step():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    history = History()
    message = r"`metrics` should be those of a step\. Found none.*after `optimizer\.step\(\)`"
    with pytest.raises(BalanceValueError, match=message):
        history.append(optimizer.metrics)
    assert (len(history), history.keys()) == (0, [])
    train(model, optimizer, [0])
    history.append(optimizer.metrics)
    assert history.series("loss/a")[0] == [0]
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(BalanceValueError, match="or loaded a state"):
        history.append(optimizer.metrics)
    assert len(history) == 1


def test_a_history_says_what_it_has():
    history = History()
    assert (repr(history), history.series("loss/a")) == ("History(0 steps)", ([], []))
    history.append(random_metrics(3))
    assert repr(history) == "History(1 step)"
    assert repr(History(maxlen=5)) == "History(0 steps, maxlen=5)"
    for kind in ("weigth", "los"):
        with pytest.raises(BalanceValueError, match=f"`kind` .* 'loss', 'weight', .*'{kind}'"):
            history.plot(kind)


def test_metrics_are_shown_by_name_in_few_digits():
    losses, weights = torch.tensor([1 / 3, 2e5]), torch.tensor([0.25, math.nan])
    assert repr(StepMetrics()) == "StepMetrics()"
    assert repr(StepMetrics(("a", "b"), None, losses, weights)) == (
        "StepMetrics(a: loss 0.3333, weight 0.25; b: loss 2e+05, weight nan)"
    )


def test_metrics_as_a_string_are_one_line():
    losses, factors = torch.tensor([0.314, 0.12]), torch.tensor([0.62, 0.38])
    gramian = torch.tensor([[1.0, -0.8], [-0.8, 4.0]])
    metrics = StepMetrics(("rate", "distortion"), gramian, losses, factors, factors)
    assert str(metrics) == "rate 0.314 ×0.62  distortion 0.12 ×0.38  cos -0.4"
    assert str(StepMetrics(("a", "b"), None, losses)) == "a 0.314  b 0.12"
    assert str(StepMetrics()) == ""
    many = StepMetrics(tuple("abcdefghi"), torch.eye(9), torch.arange(9.0), None, torch.ones(9))
    assert str(many) == "9 losses 0 to 8 ×1 to 1  cos 0 to 0"


def test_a_history_keeps_no_more_than_the_metrics_of_each_step():
    history, metrics = History(), random_metrics(50)
    with Operations() as operations:
        for _ in range(10):
            history.append(metrics)
    assert operations.names == []


@over_some("MGDA-none")
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("weight", [*NAMES]),
        ("loss", [*NAMES]),
        ("cosine", ["a,b", "a,c", "b,c"]),
        ("alignment", ["alignment"]),
        ("satisfied", ["satisfied"]),
    ],
)
def test_a_plot_has_a_line_for_each_series(method, kind, labels):
    plt.switch_backend("Agg")
    _, history = record(method)
    axes = history.plot(kind)
    assert sorted(line.get_label() for line in axes.get_lines()) == labels
    assert axes.get_ylabel() == kind
    assert history.plot(kind, ax=axes) is axes
    assert len(axes.get_lines()) == 2 * len(labels)
    plt.close(axes.figure)
