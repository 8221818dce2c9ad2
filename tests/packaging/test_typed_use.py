"""The program that Pyright reads runs, and uses the whole public interface."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

import moo_balance
from moo_balance import functional
from tests.packaging import typed_use

# What shows something to a person: these return an object of a library that may be missing.
SHOWN = {"plot", "figure", "to_pandas"}


@pytest.mark.parametrize("weighting", typed_use.methods(), ids=lambda each: type(each).__name__)
def test_every_kind_of_method_trains_and_can_be_read(weighting, tmp_path):
    history = typed_use.train(weighting)
    assert len(history) == 1
    typed_use.read(history, tmp_path)


@pytest.mark.parametrize(
    "program",
    [typed_use.every_form, typed_use.observe, typed_use.without_an_optimizer, typed_use.measure],
)
def test_the_program_runs(program):
    program()


def test_mathematics_is_finite():
    results = typed_use.mathematics()
    assert len(results) == len(functional.__all__)
    assert all(torch.isfinite(result).all() for result in results)


def test_errors_have_a_common_class():
    assert typed_use.refuse()


def used_names() -> set[str]:
    tree = ast.parse(Path(typed_use.__file__).read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_public_function_is_used():
    public = {
        name
        for module in (moo_balance, functional)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    assert public <= used_names()


@pytest.mark.parametrize(
    "owner", [moo_balance.BalancedOptimizer, moo_balance.History, moo_balance.ConflictReport]
)
def test_every_public_method_is_used(owner):
    public = {
        name
        for name, value in vars(owner).items()
        if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    }
    assert public - SHOWN <= used_names()
