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
EVERYBODY = {"moo_balance._lazy", "moo_balance.errors"}
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


def output_of(script):
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return run.stdout


def test_importing_the_package_loads_torch_alone():
    """In a fresh interpreter where nobody but torch has loaded anything."""
    script = """
import sys, torch
before = set(sys.modules)
import moo_balance, moo_balance.engine, moo_balance.functional, moo_balance.weighting
for package in moo_balance, moo_balance.engine, moo_balance.functional, moo_balance.weighting:
    for name in package.__all__:
        getattr(package, name)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    loaded = set(output_of(script).split())
    assert "moo_balance" in loaded
    assert loaded <= {"moo_balance", "torch"} | sys.stdlib_module_names


@pytest.mark.parametrize("package", ["moo_balance", "moo_balance.weighting"])
def test_a_package_shows_type_checkers_the_names_that_it_reads_when_asked(package):
    block = next(
        node for node in ast.parse(MODULES[package].read_text()).body if isinstance(node, ast.If)
    )
    shown = {
        alias.asname: statement.module.removeprefix(f"{package}.")
        for statement in block.body
        for alias in statement.names
    }
    module = importlib.import_module(package)
    tops = ast.parse(MODULES[package].read_text()).body
    # A type checker that sees `__getattr__` believes in any name.
    assert not [n for n in tops if isinstance(n, ast.Assign) and "__getattr__" in ast.unparse(n)]
    assert shown == module._HOMES
    assert set(module.__all__) == set(shown)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["engine", "errors", "functional", "monitor", "weighting"])
def test_modules_are_found_without_being_imported(module):
    assert output_of(f"import moo_balance; print(moo_balance.{module}.__name__)").split() == [
        f"moo_balance.{module}"
    ]


def test_asking_for_one_method_reads_no_other():
    script = """
import sys
from moo_balance import BalancedOptimizer, FAMO
print(*(name for name in sys.modules if name.startswith("moo_balance.weighting.")))
"""
    assert set(output_of(script).split()) == {
        "moo_balance.weighting.base",
        "moo_balance.weighting.famo",
    }


# ---------------------------------------------------------------------- documentation

# test_docs.py asks each public name for a docstring; here is what has to be in it.
PUBLIC = {
    getattr(module, name)
    for module in (moo_balance, moo_balance.functional, moo_balance.weighting)
    for name in module.__all__
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
