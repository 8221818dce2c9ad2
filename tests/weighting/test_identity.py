"""How a method is named in checkpoints, and described to the other ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    BalanceValueError,
    FixedWeights,
    MovingAverage,
    Sequential,
    Sum,
)
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput
from moo_balance.weighting._identity import describe, method_name
from tests.support.registry import NAMES, over_all_methods


@dataclass(frozen=True)
class Holder(Weighting):
    """A method of a user, with one hyper-parameter of any type."""

    value: Any = None
    cache: list[int] = field(default_factory=list, compare=False)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        return WeightingOutput(statistics.losses, statistics.losses, state)


class Schedule:
    def at(self, step: int) -> float:
        return 0.5


def half(step: int, power: float = 1.0) -> float:
    return 0.5**power


# ---------------------------------------------------------------------- names


@over_all_methods
def test_a_method_is_named_by_its_class(method: Any) -> None:
    weighting = method.make(NAMES)
    name = method_name(weighting)
    inner = getattr(weighting, "weightings", [getattr(weighting, "weighting", None)])
    names = ", ".join(method_name(each) for each in inner if each is not None)
    assert name == type(weighting).__name__ + (f"({names})" if names else "")


@pytest.mark.parametrize(
    ("weighting", "name"),
    [
        (MovingAverage(MGDA(normalize="l2"), beta=0.5), "MovingAverage(MGDA)"),
        (MovingAverage(MovingAverage(Sum())), "MovingAverage(MovingAverage(Sum))"),
        (Holder(Sum()), "Holder(Sum)"),
        (Holder([AnalyticQP(), FAMO()]), "Holder(AnalyticQP, FAMO)"),
        (Holder({"first": MovingAverage(Sum()), "then": 3}), "Holder(MovingAverage(Sum))"),
        (Holder(half), "Holder"),
    ],
)
def test_nested_methods_are_named_without_their_hyper_parameters(
    weighting: Weighting, name: str
) -> None:
    assert method_name(weighting) == name


# ---------------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        ("mean", "'mean'"),
        ({"b": 1.0, "a": None}, "{'b': 1, 'a': None}"),
        ((1, (2.5, "x")), "[1, [2.5, 'x']]"),
        ({"b", "a", "c"}, "{'a', 'b', 'c'}"),
        (torch.tensor([1.0, 0.5]), "[1, 0.5]"),
        (half, f"{__name__}.half"),
        (torch.nn.ReLU, "torch.nn.modules.activation.ReLU"),
        (partial(half, power=2.0), f"partial({__name__}.half, [], {{'power': 2}})"),
        (Schedule(), f"<{__name__}.Schedule object>"),
        (Schedule().at, f"<{__name__}.Schedule object>.at"),
        (MGDA(normalize="log"), "MGDA(normalize='log', preference=None, every=1)"),
        ([Sum()], "[Sum()]"),
        (torch.float16, "torch.float16"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_description_has_all_hyper_parameters_and_no_address(value: object, text: str) -> None:
    assert describe(Holder(value)) == f"Holder(value={text})"


@over_all_methods
def test_methods_that_differ_are_described_differently(method: Any) -> None:
    weighting = method.make(NAMES)
    assert describe(weighting) == describe(method.make(NAMES))
    assert describe(Sequential([weighting], [])) != describe(weighting)
    assert describe(FixedWeights({"a": 1.0, "b": 2.0})) != describe(FixedWeights({"a": 1.0}))


def test_a_method_that_is_no_dataclass_is_described_by_its_attributes() -> None:
    class Bare(Holder.__base__):  # type: ignore[misc, name-defined]
        def __init__(self, rate: float) -> None:
            self.rate = rate

        weights = Holder.weights

    assert describe(Bare(0.5)) == "Bare(rate=0.5)"


def test_a_description_is_the_same_in_a_new_process() -> None:
    script = """
from dataclasses import dataclass
from functools import partial
from typing import Any
from operator import mul
from moo_balance import MGDA, MovingAverage
from moo_balance.weighting._identity import describe

@dataclass(frozen=True)
class Scheduled(MovingAverage):
    value: Any = None

def schedule(step):
    return 0.5

print(describe(Scheduled(MGDA(), value=[schedule, partial(mul, 2), {"z", "y", "x"}])))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert "__main__.schedule" in runs[0]
    assert "0x" not in runs[0]


def test_a_checkpoint_of_another_nested_method_is_refused() -> None:
    def optimizer_with(weighting: Weighting) -> BalancedOptimizer:
        return BalancedOptimizer(torch.optim.SGD([parameter], lr=0.1), weighting)

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_with(MovingAverage(MGDA()))
    optimizer.backward({"a": parameter.square().sum(), "b": parameter.sum()})
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.warns(UserWarning, match="normalize"):
        optimizer_with(MovingAverage(MGDA(normalize="l2"))).load_state_dict(saved)
    with pytest.raises(BalanceValueError, match=r"MovingAverage\(AnalyticQP\)"):
        optimizer_with(MovingAverage(AnalyticQP())).load_state_dict(saved)
