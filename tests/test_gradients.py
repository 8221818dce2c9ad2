"""Functional use, against the optimizer and against a dense Jacobian by torch.autograd.grad."""

from __future__ import annotations

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    BalancedOptimizer,
    BalancedTrajectory,
    BalanceValueError,
    NashMTL,
    SeparateMoments,
    Sum,
    WithConstant,
    balanced_backward,
    gramian,
)
from moo_balance.engine import PerLoss, Streaming
from tests.support.problems import (
    SmallModel,
    as_vector,
    flat_gradient,
    jacobian,
    setup,
    snapshot,
)
from tests.support.registry import NAMES, over


def is_functional(method):
    weighting = method.make(NAMES)
    rows = weighting.needs(0).rows
    return not weighting.observes_step and not (rows and rows.steps_apart)


@over(is_functional)
def test_a_balanced_backward_is_the_first_one_of_an_optimizer(method):
    model, twin = SmallModel(), setup(method)
    metrics = balanced_backward(model.losses(), model, method.make(NAMES))
    twin[1].backward(twin[0].losses())
    assert snapshot(flat_gradient(model)) == snapshot(flat_gradient(twin[0]))
    assert snapshot(metrics.as_dict()) == snapshot(twin[1].metrics.as_dict())


@pytest.mark.parametrize("method", [Sum(), MGDA(), NashMTL(), WithConstant(MGDA(), {"c": -1.0})])
def test_the_gradient_is_the_combination_of_the_naive_jacobian(method):
    model = SmallModel()
    losses = model.losses()
    rows = jacobian(losses, list(model.parameters()))
    metrics = balanced_backward(losses, model.parameters(), method)
    expected = as_vector(metrics.coefficients).to(rows) @ rows
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-10, atol=1e-12)


def test_gradients_add_up_and_frozen_parameters_get_none():
    model = SmallModel()
    model.trunk.bias.requires_grad_(False)
    balanced_backward(model.losses(), model, MGDA())
    once = flat_gradient(model)
    balanced_backward(model.losses(), model, MGDA())
    torch.testing.assert_close(flat_gradient(model), 2 * once)
    assert model.trunk.bias.grad is None


def test_a_retained_graph_can_be_used_again():
    model = SmallModel()
    losses = model.losses()
    balanced_backward(losses, model, MGDA(), retain_graph=True)
    once = flat_gradient(model)
    balanced_backward(losses, model, MGDA())
    torch.testing.assert_close(flat_gradient(model), 2 * once)


def test_shared_parameters_engine_and_features_are_those_of_the_optimizer():
    model, twin = SmallModel(), SmallModel()
    metrics = balanced_backward(
        model.losses(), model, MGDA(), shared_params=model.trunk, engine=Streaming()
    )
    base = torch.optim.SGD(twin.parameters(), lr=0.1)
    other = BalancedOptimizer(base, MGDA(), shared_params=twin.trunk)
    other.backward(twin.losses())
    torch.testing.assert_close(metrics.gramian, other.metrics.gramian)
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    feature = 3 * w
    losses = {"a": feature[0], "b": 2 * feature[1]}
    at_feature = balanced_backward(losses, [w], MGDA(), features=feature).gramian
    torch.testing.assert_close(at_feature, torch.diag(torch.tensor([1.0, 4.0])))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (FAMO(), "needs the losses after"),
        (BalancedTrajectory(), "needs the losses after"),
        (WithConstant(FAMO(), {"c": 1.0}), "needs the losses after"),
        (SeparateMoments(), "takes steps of its own"),
    ],
)
def test_methods_that_need_more_than_one_backward_pass_are_refused(method, reason):
    model = SmallModel()
    with pytest.raises(BalanceValueError, match=rf"`weighting`.*{reason}.*Use BalancedOptimizer"):
        balanced_backward(model.losses(), model, method)
    assert all(param.grad is None for param in model.parameters())


def test_other_arguments_that_do_not_fit_are_refused():
    model = SmallModel()
    with pytest.raises(BalanceValueError, match="`weighting`"):
        balanced_backward(model.losses(), model, MGDA)
    for call in (lambda *args: balanced_backward(*args, MGDA()), gramian):
        with pytest.raises(BalanceValueError, match="`params`"):
            call(model.losses(), model.trunk.weight)
        with pytest.raises(BalanceValueError, match="`losses`"):
            call([*model.losses().values()], model)
        with pytest.raises(BalanceValueError, match="Loss `a`"):
            call({"a": model.losses()["a"].detach()}, model)
    with pytest.raises(BalanceValueError, match="`engine`"):
        gramian(model.losses(), model, engine="fast")


# ---------------------------------------------------------------------- Gramian


@pytest.mark.parametrize("engine", [None, PerLoss(torch.float64), Streaming(dtype=torch.float64)])
@pytest.mark.parametrize("part", ["all", "trunk"])
def test_the_gramian_is_that_of_the_naive_jacobian(engine, part):
    model = SmallModel()
    params = model if part == "all" else model.trunk
    losses = model.losses()
    rows = jacobian(losses, list(params.parameters()))
    products = gramian(losses, params, engine=engine)
    torch.testing.assert_close(products, rows @ rows.T, rtol=1e-9, atol=1e-9)
    assert torch.equal(products, products.T)
    assert not products.requires_grad
    assert all(param.grad is None for param in model.parameters())


def test_the_graph_is_kept_if_wanted():
    model = SmallModel()
    losses = model.losses()
    first = gramian(losses, model, retain_graph=True)
    assert torch.equal(gramian(losses, model), first)
    with pytest.raises(RuntimeError, match="second time"):
        gramian(losses, model)


def test_hooks_do_not_run_and_gradients_that_are_there_stay():
    model = SmallModel()
    balanced_backward(model.losses(), model, Sum())
    before = snapshot(flat_gradient(model))
    for param in model.parameters():
        param.register_hook(lambda _: pytest.fail("a hook ran"))
    gramian(model.losses(), model)
    assert snapshot(flat_gradient(model)) == before


def test_a_loss_that_reaches_nothing_has_products_of_zero():
    w, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    losses = {"a": w.sum(), "b": other.sum()}
    torch.testing.assert_close(gramian(losses, [w]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
