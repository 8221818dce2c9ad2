"""Every scheduler in torch.optim.lr_scheduler takes the wrapper for the optimizer it wraps."""

from __future__ import annotations

import copy
import inspect
from types import MethodType

import pytest
from torch.optim import SGD, lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from moo_balance import BalancedOptimizer, BalanceValueError, Sum
from tests.support.problems import SmallModel, grouped, setup, snapshot, train, whole_state
from tests.support.registry import over_some

pytestmark = pytest.mark.capability("every scheduler of torch.optim")

STEPS = 12


def chained(optimizer):
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(optimizer), schedules.ExponentialLR(optimizer, 0.9)], optimizer
    )


def sequential(optimizer):
    warm_up = schedules.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return schedules.SequentialLR(
        optimizer, [warm_up, schedules.CosineAnnealingLR(optimizer, T_max=8)], milestones=[4]
    )


SCHEDULERS = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda optimizer: schedules.ConstantLR(optimizer, total_iters=4),
    "CosineAnnealingLR": lambda optimizer: schedules.CosineAnnealingLR(optimizer, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(
        optimizer, T_0=5
    ),
    "CyclicLR": lambda optimizer: schedules.CyclicLR(
        optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3
    ),
    "ExponentialLR": lambda optimizer: schedules.ExponentialLR(optimizer, gamma=0.9),
    "LambdaLR": lambda optimizer: schedules.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1.0]),
    "LinearLR": lambda optimizer: schedules.LinearLR(optimizer),
    "MultiStepLR": lambda optimizer: schedules.MultiStepLR(optimizer, milestones=[3, 7]),
    "MultiplicativeLR": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda n: 0.9),
    "OneCycleLR": lambda optimizer: schedules.OneCycleLR(
        optimizer, max_lr=[0.1, 0.2], total_steps=STEPS + 1
    ),
    "PolynomialLR": lambda optimizer: schedules.PolynomialLR(optimizer, total_iters=8, power=2.0),
    "ReduceLROnPlateau": lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=1),
    "SequentialLR": sequential,
    "StepLR": lambda optimizer: schedules.StepLR(optimizer, step_size=3),
    "SWALR": lambda optimizer: SWALR(optimizer, swa_lr=0.05, anneal_epochs=5),
}


def test_every_public_scheduler_has_a_row():
    public = {
        name
        for name, cls in vars(schedules).items()
        if inspect.isclass(cls)
        and issubclass(cls, schedules.LRScheduler)
        and not name.startswith("_")
        and cls is not schedules.LRScheduler
    }
    assert public | {"SWALR"} == set(SCHEDULERS)


def advance(scheduler, step):
    """ReduceLROnPlateau is given a loss that stops falling."""
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(max(1.0, 3.0 - step))
    else:
        scheduler.step()


def rates(optimizer):
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_the_same_as_on_the_plain_optimizer(name):
    """Rates, momenta and parameters, step by step; and no warning, which would be an error here."""
    model, twin = SmallModel(), SmallModel()
    optimizer, plain = BalancedOptimizer(grouped(model), Sum()), grouped(twin)
    scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    seen = set()
    for step in range(STEPS):
        train(model, optimizer, [step], ("a", "b"))
        plain.zero_grad()
        sum(twin.losses(step, ("a", "b")).values()).backward()
        plain.step()
        advance(scheduler, step)
        advance(other, step)
        seen.add(tuple(rates(optimizer)))
        assert rates(optimizer) == rates(plain)
        assert rates(optimizer.optimizer) == rates(plain)
        assert scheduler.get_last_lr() == other.get_last_lr()
    assert len(seen) > 1
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"ReduceLROnPlateau"}))
@over_some("FAMO-adam", "MGDA-every")
def test_a_schedule_resumes_to_the_last_bit(method, name):
    def run(model, optimizer, scheduler, steps):
        for step in steps:
            train(model, optimizer, [step])
            advance(scheduler, step)

    def fresh():
        model, optimizer = setup(method, optimizer=grouped)
        return model, optimizer, SCHEDULERS[name](optimizer)

    model, optimizer, scheduler = fresh()
    run(model, optimizer, scheduler, range(5))
    saved = copy.deepcopy([part.state_dict() for part in (model, scheduler, optimizer)])
    run(model, optimizer, scheduler, range(5, STEPS))

    twin, other, second = fresh()
    for part, state in zip((twin, second, other), saved, strict=True):
        part.load_state_dict(state)
    run(twin, other, second, range(5, STEPS))
    assert whole_state(twin, other) == whole_state(model, optimizer)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_may_be_made_before_the_wrapper(name):
    """PyTorch has then replaced the step of the wrapped optimizer by a function of its own."""
    model, twin = SmallModel(), SmallModel()
    inner, plain = grouped(model), BalancedOptimizer(grouped(twin), Sum())
    scheduler, other = SCHEDULERS[name](inner), SCHEDULERS[name](plain)
    optimizer = BalancedOptimizer(inner, Sum())
    for step in range(STEPS):
        for each, wrapper, schedule in ((model, optimizer, scheduler), (twin, plain, other)):
            train(each, wrapper, [step], ("a", "b"))
            advance(schedule, step)
        assert rates(optimizer) == rates(plain)
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


def test_a_scheduler_may_be_made_on_a_replaced_step():
    model = SmallModel()
    inner = grouped(model)
    inner.step = MethodType(lambda self, closure=None: None, inner)
    schedules.StepLR(inner, 3)
    BalancedOptimizer(inner, Sum())


def test_a_step_that_needs_a_closure_is_refused_also_with_a_scheduler():
    class Asks(SGD):
        def step(self, closure):
            return super().step(closure)

    inner = Asks(SmallModel().parameters(), lr=0.1)
    schedules.StepLR(inner, step_size=3)
    with pytest.raises(BalanceValueError, match="Asks, whose `step` needs `closure`"):
        BalancedOptimizer(inner, Sum())


def test_a_scheduler_that_steps_first_warns_as_ever():
    """PyTorch watches the step of the wrapper."""
    optimizer = BalancedOptimizer(grouped(SmallModel()), Sum())
    scheduler = schedules.StepLR(optimizer, step_size=3)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()


def test_a_scheduler_on_a_copy_does_not_change_the_original():
    optimizer = BalancedOptimizer(grouped(SmallModel()), Sum())
    schedules.ExponentialLR(optimizer, 0.5)
    twin = copy.deepcopy(optimizer)
    second = schedules.ExponentialLR(twin, 0.5)
    twin.param_groups[0]["params"][0].grad = None
    twin.step(lambda: {"a": sum(p.sum() for p in twin.param_groups[0]["params"])})
    second.step()
    assert rates(optimizer)[0][0] == 0.01
    assert rates(twin)[0][0] == 0.005
