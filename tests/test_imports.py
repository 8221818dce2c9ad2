"""Imports run one way, load torch alone, and every public name is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moo_balance

PACKAGE = Path(moo_balance.__file__).parent
SOURCES = {
    ".".join(("moo_balance", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}

# What the modules of a folder may import of the package, besides their own folder. The modules
# at the top compose these, and nobody below knows them.
LAYERS = {
    "functional": set(),
    "weighting": {"functional"},
    "engine": {"functional"},
}
EVERYBODY = {"moo_balance.errors"}
OWN_LIBRARIES = {"torch", "moo_balance"}


def imported(nodes):
    """Absolute names of the modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module


def anywhere(path):
    """What a module imports at the top, inside a function, or for type checkers."""
    return imported(ast.walk(ast.parse(path.read_text())))


def at_the_top(path):
    """What it imports when it is imported itself."""
    return imported(ast.parse(path.read_text()).body)


def layer(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name)])
def test_imports_run_one_way(module):
    own = layer(module)
    for name in anywhere(MODULES[module]):
        if name.startswith("moo_balance") and name not in EVERYBODY:
            assert layer(name) in {own} | LAYERS[own], f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if "integrations" not in name])
def test_the_package_imports_torch_and_the_standard_library(module):
    allowed = sys.stdlib_module_names | OWN_LIBRARIES
    foreign = set(at_the_top(MODULES[module])) - EVERYBODY
    assert {name.split(".")[0] for name in foreign} <= allowed


def test_no_module_imports_itself_in_a_circle():
    graph = {
        name: {other for other in at_the_top(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_layers_exist():
    assert {layer(name) for name in MODULES} == {*LAYERS, None}


def test_importing_the_package_loads_torch_alone():
    """In a fresh interpreter where nobody but torch has loaded anything."""
    script = """
import sys, torch
before = set(sys.modules)
import moo_balance
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    loaded = set(run.stdout.split())
    assert "moo_balance" in loaded
    assert loaded <= {"moo_balance", "torch"} | sys.stdlib_module_names


# ---------------------------------------------------------------------- documentation

# test_docs.py asks each public name for a docstring; here is what has to be in it.
PUBLIC = {
    value
    for module in ("moo_balance", "moo_balance.functional", "moo_balance.weighting")
    for name, value in vars(importlib.import_module(module)).items()
    if name in importlib.import_module(module).__all__
}
DATACLASSES = [value for value in PUBLIC if inspect.isclass(value) and is_dataclass(value)]
FUNCTIONS = [value for value in PUBLIC if inspect.isfunction(value)]


def by_name(values):
    return {"argvalues": sorted(values, key=lambda v: v.__name__), "ids": lambda v: v.__name__}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


@pytest.mark.parametrize("cls", **by_name(DATACLASSES))
def test_every_field_is_explained(cls):
    for field in fields(cls):
        if not field.name.startswith("_"):
            described = rf"^\s*{field.name}: |``{field.name}``"
            assert re.search(described, inspect.getdoc(cls), re.MULTILINE), field.name


@pytest.mark.parametrize("function", **by_name(FUNCTIONS))
def test_every_argument_is_explained(function):
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^\s*{name}: ", inspect.getdoc(function), re.MULTILINE), name
