"""Rules for names and sentences that a program can check: plain English, and where names may be."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("moo_balance", "examples", "benchmarks", "tests")

PERSONS = re.compile(r"\b(nobody|somebody|anybody|everybody|whoever|no one|someone)\b", re.I)
WORDS = re.compile(r"\b(beside|let go|shall)\b", re.I)

# Names that end in -ed and are no participles, or stand for what the field or users call so.
ALLOWED_NAMES = {"satisfied", "combined", "seed", "need", "embed", "feed", "speed"}

PRIVATE = re.compile(
    r"torch\._\w+|\._saved_\w+|_per_optimizer_states|_sequence_nr|_input_metadata|_backward_hooks"
    r"|_optimizer_\w+_hooks|ddp_weakref|require_forward_param_sync|_fsdp_flattened"
    r"|nn\.Module\.__call__"
)
# Optimizers of PyTorch and others are built on these.
FOREACH = {"torch._foreach_mul", "torch._foreach_mul_", "torch._foreach_add_"}
MAY_USE_PRIVATE_NAMES = {
    "moo_balance/engine/autograd.py",
    "moo_balance/_torch_internals.py",
    "moo_balance/_reevaluation/writes.py",
}


def files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


@cache
def definitions(file: Path) -> list[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The module itself, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Each with the line of what it documents."""
    for node in definitions(file):
        text = ast.get_docstring(node)
        if text:
            yield getattr(node, "lineno", 1), text


def comments(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def prose(file: Path) -> Iterable[tuple[int, str]]:
    return (*docstrings(file), *comments(file))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_opens_with_a_question(folder: str) -> None:
    questions = [
        place(file, line)
        for file in files(folder)
        for line, text in docstrings(file)
        if text.split("\n\n")[0].rstrip().endswith("?")
    ]
    assert not questions


@pytest.mark.parametrize("folder", FOLDERS)
def test_sentences_use_no_persons_and_no_rare_words(folder: str) -> None:
    odd_words = [
        f"{place(file, line)}: {match[0]}"
        for file in files(folder)
        for line, text in prose(file)
        for match in (*PERSONS.finditer(text), *WORDS.finditer(text))
    ]
    assert not odd_words


def test_functions_of_the_package_are_not_named_by_a_participle() -> None:
    participles = [
        f"{place(file, node.lineno)}: {node.name}"
        for file in files("moo_balance")
        for node in definitions(file)
        if isinstance(node, ast.FunctionDef)
        and re.fullmatch(r"_*[a-z]+ed", node.name)
        and node.name.strip("_") not in ALLOWED_NAMES
    ]
    assert not participles


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_has_a_docstring(folder: str) -> None:
    without = [
        place(file, 1)
        for file in files(folder)
        if file.read_text().strip() and not ast.get_docstring(definitions(file)[0])
    ]
    assert not without


def code_lines(file: Path) -> Iterator[tuple[int, str]]:
    """All lines but those of docstrings."""
    documented: set[int] = set()
    for node in definitions(file):
        if ast.get_docstring(node):
            text = node.body[0]
            documented.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    for line, text_of_line in enumerate(file.read_text().splitlines(), 1):
        if line not in documented:
            yield line, text_of_line


def test_private_names_of_pytorch_are_kept_in_two_files() -> None:
    elsewhere = [
        f"{place(file, line)}: {name}"
        for file in files("moo_balance")
        if str(file.relative_to(ROOT)) not in MAY_USE_PRIVATE_NAMES
        for line, text in code_lines(file)
        for name in PRIVATE.findall(text)
        if name not in FOREACH
    ]
    assert not elsewhere


def test_tests_import_helpers_and_no_other_test() -> None:
    importing = [
        f"{place(file, node.lineno)}: {node.module}"
        for file in files("tests")
        for node in definitions(file)[0].body
        if isinstance(node, ast.ImportFrom)
        and re.match(r"tests(\..*)?\.(test_\w+|conftest)$", node.module or "")
    ]
    assert not importing
