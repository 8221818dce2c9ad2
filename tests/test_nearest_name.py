"""Messages about an unknown name tell the nearest known one."""

from __future__ import annotations

import pytest

from moo_balance import BalancedOptimizer, BalanceValueError, History, Sum
from moo_balance._validation import name_nearest
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
