"""Every optimizer in torch.optim can be wrapped; LBFGS says why it cannot."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceValueError, Sum
from tests.support.problems import snapshot, whole_state

pytestmark = pytest.mark.capability("every optimizer of torch.optim but LBFGS")

PUBLIC = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer
}
WRAPPABLE = sorted(set(PUBLIC) - {"LBFGS"})

TARGET = torch.tensor([2, 0, 1, 2])


class Embedded(nn.Module):
    """Two losses of matrices only, which every optimizer takes; sparse gradients for SparseAdam.

    In float32: some of torch's optimizers cast their own state when they load a float64 one.
    """

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        table, head = torch.randn(5, 4, generator=generator).split([3, 2])
        self.table = nn.Embedding(3, 4, sparse=sparse, _weight=table.clone())
        self.head = nn.Embedding(2, 4, sparse=sparse, _weight=head.clone())

    def losses(self, step=0):
        rows = self.table(TARGET.roll(step)[:3])
        scores = rows @ self.head(torch.tensor([0, 1])).T
        return {"fit": (scores - 1).square().mean(), "size": 10 * rows.square().mean()}


def embedded(name):
    return Embedded(sparse=name == "SparseAdam")


def settings(cls):
    """The variants that matter to a wrapper: momentum, schedules of their own, in-place kernels."""
    known = inspect.signature(cls).parameters
    yield {"lr": 0.01}
    for flag in ("foreach", "fused", "maximize", "amsgrad", "nesterov"):
        if flag in known and not (cls is torch.optim.Adagrad and flag == "fused"):
            more = {"momentum": 0.9} if flag == "nesterov" and "momentum" in known else {}
            yield {"lr": 0.01, flag: True, **more}


CASES = [(name, arguments) for name in WRAPPABLE for arguments in settings(PUBLIC[name])]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_training_with_sum_is_plain_training_to_the_last_bit(name, arguments):
    model, twin = embedded(name), embedded(name)
    optimizer = BalancedOptimizer(PUBLIC[name](model.parameters(), **arguments), Sum())
    plain = PUBLIC[name](twin.parameters(), **arguments)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        optimizer.step()
        plain.zero_grad()
        sum(twin.losses(step).values()).backward()
        plain.step()
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())
    assert snapshot(optimizer.optimizer.state_dict()) == snapshot(plain.state_dict())


@pytest.mark.parametrize("name", WRAPPABLE)
@pytest.mark.parametrize("weighting", [MGDA(), FAMO()], ids=["MGDA", "FAMO"])
def test_balanced_training_lowers_the_losses_and_resumes(name, weighting):
    def fresh():
        model = embedded(name)
        base = PUBLIC[name](model.parameters(), lr=0.01)
        return model, BalancedOptimizer(base, weighting)

    model, optimizer = fresh()
    first = {key: loss.item() for key, loss in model.losses().items()}
    for step in range(10):
        optimizer.step(lambda: model.losses(step))  # noqa: B023
    middle = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(10, 20):
        optimizer.step(lambda: model.losses(step))  # noqa: B023
    assert all(loss.item() < first[key] for key, loss in model.losses().items())

    twin, other = fresh()
    twin.load_state_dict(middle[0])
    other.load_state_dict(middle[1])
    for step in range(10, 20):
        other.step(lambda: twin.losses(step))  # noqa: B023
    assert whole_state(twin, other) == whole_state(model, optimizer)


def test_sparse_gradients_stay_sparse():
    model = Embedded(sparse=True)
    for weighting in (Sum(), MGDA()):
        base = torch.optim.SparseAdam(model.parameters(), lr=0.01)
        optimizer = BalancedOptimizer(base, weighting)
        optimizer.zero_grad()
        optimizer.backward(model.losses())
        assert all(p.grad.is_sparse for p in model.parameters())


def test_sparse_rows_have_the_gramian_of_dense_ones():
    gramians = []
    for sparse in (True, False):
        model = Embedded(sparse)
        optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), MGDA())
        optimizer.backward(model.losses())
        gramians.append(optimizer.metrics.gramian)
    torch.testing.assert_close(*gramians, rtol=1e-6, atol=0)


def test_lbfgs_is_refused_with_the_reason():
    model = Embedded(sparse=False)
    with pytest.raises(BalanceValueError, match=r"`optimizer`.*LBFGS.*line search"):
        BalancedOptimizer(torch.optim.LBFGS(model.parameters()), Sum())


def test_an_optimizer_of_the_users_own_can_be_wrapped():
    """Anything that derives from Optimizer, with state of any name."""

    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
                    p -= group["lr"] * p.grad.sign()

    model = Embedded(sparse=False)
    optimizer = BalancedOptimizer(Signs(model.parameters(), lr=0.01), MGDA())
    before = snapshot(model.state_dict())
    optimizer.step(model.losses)
    assert snapshot(model.state_dict()) != before
    assert all(entry == {"seen": 1} for entry in optimizer.state.values())
