"""Messages tell the nearest known name, and how to make an instance of a class."""

from __future__ import annotations

import pytest
import torch

from moo_balance import (
    MGDA,
    BalancedOptimizer,
    BalanceValueError,
    FixedWeights,
    History,
    MovingAverage,
    Sum,
    Weighting,
)
from moo_balance._hints import describe_value, name_nearest
from tests.support.problems import SmallModel, sgd


def test_the_nearest_name_is_told_only_if_one_is_like_it() -> None:
    known = ["rate", "distortion"]
    assert name_nearest("rat", known) == " The nearest known name is 'rate'."
    assert name_nearest("Distortions", known) == " The nearest known name is 'distortion'."
    for other in ("xyz", "", 3, None):
        assert name_nearest(other, known) == ""
    assert name_nearest("rate", []) == ""


def test_backward_observe_and_history_tell_it() -> None:
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    losses = dict(zip(("rate", "distortion"), model.losses().values(), strict=False))
    optimizer.backward(losses)
    optimizer.step()
    wrong = {"rate": losses["rate"], "distorsion": losses["distortion"]}
    with pytest.raises(BalanceValueError, match=r"`distorsion`.*nearest known name is 'distor"):
        optimizer.backward(wrong)
    history = History()
    history.append(optimizer.metrics)
    with pytest.raises(BalanceValueError, match=r"nearest known name is 'loss/rate'\."):
        history.series("loss/rat")


def test_arguments_of_methods_tell_it() -> None:
    names = ["rate", "distortion"]
    with pytest.raises(BalanceValueError, match=r"`rat`, which is none\. The nearest.*'rate'\. G"):
        MGDA(preference={"rat": 1.0, "distortion": 2.0}).init(names, torch.device("cpu"))
    with pytest.raises(BalanceValueError, match=r"Found nothing for `rate`\. Give"):
        MGDA(preference={"distortion": 2.0}).init(names, torch.device("cpu"))


def test_a_class_in_place_of_an_instance_is_told() -> None:
    with pytest.raises(
        BalanceValueError, match=r"the class MGDA\. Pass an instance, `MGDA\(\)`\.$"
    ):
        MovingAverage(MGDA)
    assert describe_value(FixedWeights, Weighting).endswith("`FixedWeights(…)`")
    assert describe_value(Weighting, Weighting) == repr(Weighting)
    assert describe_value(dict, Weighting) == "<class 'dict'>"
    assert describe_value(3, Weighting) == "3"
