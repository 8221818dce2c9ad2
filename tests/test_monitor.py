"""Metrics of a step: by name, on the device, and as Python floats only when asked for."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pytest
import torch

from moo_balance import MGDA, BalancedOptimizer, History, StepMetrics, Sum
from moo_balance.functional import cosine_similarity
from moo_balance.monitor import to_floats
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
    else:
        torch.testing.assert_close(balance.gramian, rows @ rows.T, rtol=1e-10, atol=1e-12)
        assert list(balance.cosines) == PAIRS
        cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
        torch.testing.assert_close(balance.cosines["a", "b"], cosine)


def test_metrics_are_empty_before_the_first_backward():
    balance = StepMetrics()
    assert (balance.names, balance.gramian) == ((), None)
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
        expected |= {f"moo/cosine/{a},{b}" for a, b in PAIRS}
    assert set(figures) == expected | {"moo/skipped"}
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


def test_values_of_any_dtype_are_copied_to_the_host_at_once(monkeypatch):
    copies = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or tolist(self))
    values = {"a": torch.tensor(0.5, dtype=torch.float64), "b": torch.tensor(2.0)}
    assert to_floats(values) == {"a": 0.5, "b": 2.0}
    assert to_floats({}) == {}
    assert len(copies) == 1


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
    assert history.series("loss/d") == ([], [])
    assert history.keys()[:3] == ["loss/a", "loss/b", "loss/c"]
    cosines = {"Sum": [], "MGDA-none": [0, 2, 3], "MGDA-every": [0, 3]}[method.id]
    assert history.series("cosine/a,c")[0] == cosines


def test_a_history_is_not_changed_by_later_steps():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA())
    history = History()
    train(model, optimizer, [0])
    history.append(optimizer.metrics)
    before = {key: history.series(key) for key in history.keys()}  # noqa: SIM118
    train(model, optimizer, range(1, 4))
    assert {key: history.series(key) for key in before} == before


@over_some("MGDA-none")
@pytest.mark.parametrize(
    ("kind", "labels"),
    [("weight", [*NAMES]), ("loss", [*NAMES]), ("cosine", ["a,b", "a,c", "b,c"])],
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
