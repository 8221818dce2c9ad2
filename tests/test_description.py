"""What the representation of an optimizer says."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from moo_balance import MGDA, AnalyticQP, BalancedOptimizer, Sum
from moo_balance.engine import Streaming
from tests.support.problems import SmallModel, adam, sgd, train


def lines_of(optimizer: BalancedOptimizer) -> dict[str, str]:
    """The first line of each entry, by what it describes."""
    return dict(re.findall(r"^    (\w+): (.*)$", repr(optimizer), re.MULTILINE))


def test_each_part_has_a_line_and_the_wrapped_optimizer_is_indented() -> None:
    model = SmallModel()
    base = adam(model)
    optimizer = BalancedOptimizer(base, AnalyticQP(projection="simplex"), engine=Streaming())
    lines = lines_of(optimizer)
    assert list(lines)[:6] == ["weighting", "losses", "engine", "compared", "steps", "optimizer"]
    assert lines["weighting"] == repr(optimizer.weighting)
    assert lines["engine"] == repr(Streaming())
    assert repr(optimizer).startswith("BalancedOptimizer(\n")
    plain = "\n".join("    " + line for line in repr(base).splitlines())
    assert plain.removeprefix("    ") in repr(optimizer)


def test_losses_are_named_with_their_last_coefficients() -> None:
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    assert lines_of(optimizer)["losses"] == "none so far"
    train(model, optimizer, range(2), ["a", "b", "c"])
    assert lines_of(optimizer)["losses"] == "a × 1, b × 1, c × 1"
    assert lines_of(optimizer)["steps"] == "2"
    train(model, optimizer, [2], ["b"])
    assert lines_of(optimizer)["losses"] == "a, b × 1, c"
    fresh = BalancedOptimizer(sgd(SmallModel()), Sum(), loss_names=["b", "a"])
    assert lines_of(fresh)["losses"] == "b, a"


@pytest.mark.parametrize("shared", [False, True])
def test_it_says_which_parameters_are_compared(shared: bool) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 2))
    model[1].bias.requires_grad_(False)
    arguments = {"shared_params": model[0]} if shared else {}
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), 0.1), MGDA(), **arguments)
    expected = "2 of 3 parameters, 1,240 of 1,320 elements"
    if not shared:
        expected = "all 3 parameters of 1,320 elements"
    assert lines_of(optimizer)["compared"] == expected


def test_parameters_that_have_no_shape_yet_have_no_elements() -> None:
    lazy = nn.LazyLinear(2)
    optimizer = BalancedOptimizer(torch.optim.SGD(lazy.parameters(), lr=0.1), Sum())
    assert lines_of(optimizer)["compared"] == "all 2 parameters of 0 elements"
