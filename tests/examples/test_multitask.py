"""The example on digits has every method, and its table shows what was measured."""

from __future__ import annotations

import pytest
import torch

from examples import multitask
from examples.multitask import METHODS, Scores
from tests.support import registry


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return multitask.load()


def mean_log_loss(model, data):
    return sum(loss.log().item() for loss in multitask.losses(model, data).values()) / 3


def test_every_method_of_the_package_has_a_row():
    expected = {type(row.make(registry.NAMES)) for row in registry.METHODS}
    assert set(map(type, METHODS.values())) == expected


def test_arguments_are_those_of_methods():
    assert set(multitask.ARGUMENTS) <= set(METHODS)


def test_the_losses_differ_by_a_factor_of_a_thousand(digits):
    values = multitask.losses(multitask.ThreeHeads(), digits[0])
    assert values["reconstruction"] > 1000 * max(values["digit"], values["parity"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(digits, name):
    training, test = digits
    early, late = (multitask.train(METHODS[name], training, steps, seed=0) for steps in (1, 40))
    # In the mean of the logarithms, that is: no method has to improve each loss so early.
    assert mean_log_loss(late, test) < mean_log_loss(early, test)


def test_a_seed_fixes_a_run(digits):
    training, test = digits
    runs = [multitask.train(METHODS["FAMO"], training, 5, seed) for seed in (3, 3, 4)]
    first, same, other = (multitask.evaluate(model, test) for model in runs)
    assert first == same != other


def test_the_table_stars_the_best_of_each_column():
    results = {"a": [Scores(90, 50, 3.0), Scores(92, 50, 3.0)], "b": [Scores(80, 60, 4.0)] * 2}
    _, a, b = multitask.report(results, {"a": 1.0, "b": 2.0}).splitlines()
    assert "91.00 ± 1.00*" in a
    assert "50.00 ± 0.00 " in a
    assert "3.00 ± 0.00*" in a
    assert b.count("*") == 1


def test_one_method_is_compared_with_the_sum(capsys):
    multitask.main(["--method", "FAMO", "--steps", "2", "--seeds", "2"])
    rows = capsys.readouterr().out.splitlines()[1:3]
    assert [row.split()[0] for row in rows] == ["Sum", "FAMO"]


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--method", "unknown"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        multitask.main(arguments)
    assert "error: " in capsys.readouterr().err
