"""Imports run one way and load nothing but torch; every public name is documented."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import moo_balance

PACKAGE = Path(moo_balance.__file__).parent
SOURCES = {
    ".".join(("moo_balance", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}

# What the modules of a folder may import of the package, besides their own folder. The modules
# at the top combine these, and are imported by none of them.
LAYERS = {
    "functional": set(),
    "weighting": {"functional"},
    "engine": {"functional"},
}
ANYWHERE = {"moo_balance.errors", "moo_balance._hints"}


def names_imported_by(nodes):
    """Absolute names of the modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"A relative import of {node.module}"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module


def anywhere(path):
    """What a module imports: at the top, inside a function, or for type checkers."""
    return names_imported_by(ast.walk(ast.parse(path.read_text())))


def at_the_top(path):
    """What it imports when it is imported itself."""
    return names_imported_by(ast.parse(path.read_text()).body)


def layer(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


def test_imports_run_one_way():
    crossing = [
        f"{module} imports {name}"
        for module in MODULES
        if layer(module)
        for name in anywhere(MODULES[module])
        if name.startswith("moo_balance")
        and name not in ANYWHERE
        and layer(name) not in {layer(module)} | LAYERS[layer(module)]
    ]
    assert not crossing


def test_the_package_imports_torch_numpy_and_the_standard_library():
    """NumPy only where matrices are solved on the host; integrations import their framework."""
    allowed = sys.stdlib_module_names | {"torch", "moo_balance"}
    foreign = [
        f"{module} imports {name}"
        for module in MODULES
        if "integrations" not in module
        for name in at_the_top(MODULES[module])
        if name.split(".")[0] not in allowed
        and not (name.startswith("numpy") and layer(module) == "functional")
    ]
    assert not foreign


def test_no_module_imports_itself_in_a_circle():
    graph = {
        name: {other for other in at_the_top(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_layers_exist():
    assert {layer(name) for name in MODULES} == {*LAYERS, None}


def test_importing_the_package_loads_nothing_that_torch_has_not_loaded():
    """In a fresh interpreter. NumPy is loaded by torch."""
    script = """
import sys, torch
before = set(sys.modules)
import moo_balance
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded - sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("moo_balance.")))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    loaded, modules = run.stdout.splitlines()
    assert loaded.split() == ["moo_balance"]
    for name in ("engine", "errors", "functional", "monitor", "weighting"):
        assert f"moo_balance.{name}" in modules.split()


# ---------------------------------------------------------------------- documentation

# test_docs.py checks that each public name has a docstring; here is what the docstring contains.
PUBLIC = {
    getattr(module, name)
    for module in (moo_balance, moo_balance.functional, moo_balance.weighting)
    for name in module.__all__
}


def test_every_field_of_a_public_dataclass_is_explained():
    unexplained = [
        f"{cls.__name__}.{field.name}"
        for cls in PUBLIC
        if inspect.isclass(cls) and is_dataclass(cls)
        for field in fields(cls)
        if not field.name.startswith("_")
        and not re.search(
            rf"^\s*{field.name}: |``{field.name}``", inspect.getdoc(cls), re.MULTILINE
        )
    ]
    assert not unexplained


def test_every_argument_of_a_public_function_is_explained():
    unexplained = [
        f"{function.__name__}({name})"
        for function in PUBLIC
        if inspect.isfunction(function)
        for name in inspect.signature(function).parameters
        if not re.search(rf"^\s*{name}: ", inspect.getdoc(function), re.MULTILINE)
    ]
    assert not unexplained
