"""The warning of one loss that holds all the weight while the others no longer fall."""

from __future__ import annotations

import warnings

import pytest
import torch

from moo_balance import BalancedOptimizer, SumLog
from moo_balance._capture import CaptureWatch


def figures(coefficients, **losses):
    return {
        **{f"coefficient/{name}": value for name, value in coefficients.items()},
        **{f"loss/{name}": value for name, value in losses.items()},
    }


CAPTIVE = {"kl": 0.999, "rest": 0.001}


def read(values, coefficients=CAPTIVE, every=10):
    watch = CaptureWatch()
    watch.read(0, "SumLog", figures({"kl": 0.5, "rest": 0.5}, kl=1.0, rest=1.0))
    for step, value in enumerate(values):
        watch.read(every * step, "SumLog", figures(coefficients, kl=1e-9, rest=value))
    return watch


def test_it_names_the_loss_and_the_remedy_once():
    with pytest.warns(UserWarning, match="Loss `kl` .* 200 steps.*SumLog.*`preference`") as caught:
        read([1.0] * 100)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("values", "coefficients", "every"),
    [
        ([0.9**k for k in range(100)], CAPTIVE, 10),  # the other falls
        ([1.0] * 100, {"kl": 0.9, "rest": 0.1}, 10),
        ([1.0] * 100, {"kl": 1.0, "rest": 0.0}, 10),  # satisfied, or zero by choice
        ([1.0] * 20, CAPTIVE, 1),  # too few steps
        ([1.0] * 10, CAPTIVE, 100),  # too few readings
    ],
)
def test_there_is_no_warning_without_a_reason(values, coefficients, every):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(values, coefficients, every)


def test_constant_weights_capture_nothing_whatever_the_units():
    watch = CaptureWatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(0, 1000, 10):
            watch.read(step, "FixedWeights", figures(CAPTIVE, kl=1.0, rest=1.0))


def test_a_change_of_the_loss_begins_anew():
    watch = read([1.0] * 15)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(150, 300, 10):
            watch.read(step, "SumLog", figures({"kl": 0.0005, "rest": 1.0}, kl=1.0, rest=1.0))
    assert watch.name == "rest"


def test_log_dict_warns_of_a_captured_run():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), SumLog(floor=0))

    def run():
        for _ in range(230):
            optimizer.zero_grad()
            optimizer.backward({"cheap": 1e-6 + weight[0] ** 2, "rest": 3.0 + 0.0 * weight[1]})
            optimizer.step()
            optimizer.log_dict()

    with pytest.warns(UserWarning, match="Loss `cheap` has had more than 99%"):
        run()
