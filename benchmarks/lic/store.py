"""Results in JSON files, one for each experiment, found again by all that they depend on.

The key of a result is a digest of the job's settings, of the images, of the versions of library
and PyTorch, and of the source code: the modules of ``examples/lic`` and of this folder that jobs
use, and those of the weightings. Comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import moo_balance
from benchmarks.lic import jobs
from benchmarks.lic.jobs import Context, Job, Result
from benchmarks.settings import Settings, environment
from benchmarks.sources import dump_code
from examples.lic.checkpoint import write_atomically

DIGITS = 7
"""Significant digits that are kept."""

CODE = ("examples.lic", "benchmarks.lic")
LIBRARY = ("moo_balance.weighting", "moo_balance.functional")
"""Packages whose modules count."""


class StoreError(Exception):
    """Results that cannot be read or written; the message names the file and says what to do."""


class Store:
    """The results of all experiments, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
        self._results: dict[str, Result] = {}
        for content in self._files.values():
            self._results |= content["runs"]

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Result:
        return self._results[key]

    def add(self, experiment: str, key: str, result: Result) -> None:
        """Keep a result, rounded, in the file of an experiment."""
        self._results[key] = _round(result)
        content = self._files.setdefault(experiment, {"runs": {}})
        content["runs"][key] = self._results[key]
        self._write(experiment)

    def finish(self, experiment: str, keys: Collection[str], summary: Mapping[str, Any]) -> int:
        """Keep the results with these keys, and a summary of them; how many others were dropped."""
        before = self._files.get(experiment, {"runs": {}})["runs"]
        self._files[experiment] = {
            "code": describe_code(),
            "environment": environment(Settings()),
            "summary": _round(summary),
            "runs": {key: self._results[key] for key in keys},
        }
        self._write(experiment)
        return len(set(before) - set(keys))

    def _write(self, experiment: str) -> None:
        content = self._files[experiment]
        runs = ",\n".join(f'"{k}": {_dump(run)}' for k, run in sorted(content["runs"].items()))
        head = "".join(f'"{k}": {_dump(v)},\n' for k, v in content.items() if k != "runs")
        path = self._folder / f"{experiment}.json"
        try:
            write_atomically(path, f'{{{head}"runs": {{\n{runs}\n}}}}\n'.encode())
        except OSError as error:
            raise StoreError(
                f"{path} should be written. Found {error.strerror}. Make room, and start again: "
                "finished runs are kept."
            ) from error


def read(path: Path) -> dict[str, Any]:
    """The content of a file of results.

    Raises:
        StoreError: It is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        dict(content["runs"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path} should hold results of an experiment. Found {error}. Remove it."
        ) from error
    return content


def make_key(job: Job, context: Context) -> str:
    """What a result is found by."""
    about = [describe(job), context.identity, describe_code(), _digest(frozenset(_modules(job)))]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]


def describe_code() -> dict[str, str]:
    """Versions, and a digest of the code that all jobs share."""
    return {
        "moo_balance": moo_balance.__version__,
        "torch": torch.__version__,
        "sources": _digest(frozenset({jobs.__name__})),
    }


def describe(value: Any) -> Any:
    """A job or a part of it in types that JSON has: of a file its content counts, not its name."""
    if isinstance(value, Path):
        return _digest_file(value, value.stat().st_mtime_ns)
    if is_dataclass(value):
        content = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"class": type(value).__name__, **content}
    if isinstance(value, Mapping):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"A job should consist of dataclasses and JSON's types. Found {value!r}.")


def _modules(value: Any) -> Iterator[str]:
    """The modules of all classes in a job."""
    if is_dataclass(value):
        yield from (base.__module__ for base in type(value).__mro__)
        yield from _modules([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, Mapping):
        yield from _modules(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _modules(item)


@cache
def _digest(modules: frozenset[str]) -> str:
    """Of the code of these modules, and of what they import from the same packages."""
    code: dict[str, str] = {}
    for packages in (CODE, LIBRARY):
        left = [name for name in modules if name.startswith(packages)]
        while left:
            if (name := left.pop()) in code or not name.startswith(packages):
                continue
            code[name], imported = _read_module(name)
            left += imported
    return hashlib.sha256(json.dumps(sorted(code.items())).encode()).hexdigest()[:16]


@cache
def _read_module(name: str) -> tuple[str, list[str]]:
    """A module's code, and the modules that its names come from."""
    module = sys.modules[name]
    homes = [
        value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
        for value in vars(module).values()
    ]
    code = dump_code(ast.parse(Path(str(module.__file__)).read_text("utf-8")))
    return code, [home for home in homes if isinstance(home, str)]


@cache
def _digest_file(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round(item) for item in value]
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
