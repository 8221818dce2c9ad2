"""Test an installed package, without its checkout: ``python -I installed.py``.

It needs the package and what that requires, and no test runner.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata as metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import torch

import moo_balance
from moo_balance import MGDA, BalancedOptimizer, Sum, SumLog

IMPORTED = "import sys, moo_balance; print(*sys.modules)"


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> set[str]:
    """Distributions that one needs, and those that these need, without extras."""
    needed, open_names = set(), [name]
    while open_names:
        current = normalize(open_names.pop())
        if current in needed:
            continue
        try:
            listed = metadata.distribution(current).requires or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        needed.add(current)
        open_names += [
            re.match(r"[\w.-]+", requirement)[0]
            for requirement in listed
            if "extra ==" not in requirement
        ]
    return needed


def check_place() -> None:
    """The package comes from the environment, with its types and its version."""
    place = Path(moo_balance.__file__).parent
    assert place.is_relative_to(sys.prefix), f"{place} is not in {sys.prefix}"
    assert (place / "py.typed").is_file()
    assert metadata.version("moo-balance") == moo_balance.__version__


def check_imports() -> None:
    """In a fresh interpreter, the import loads PyTorch, what that needs, and NumPy."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    owners = metadata.packages_distributions()
    loaded = {
        normalize(owner)
        for module in {name.partition(".")[0] for name in run.stdout.split()}
        for owner in owners.get(module, ())
    }
    foreign = loaded - requirements("torch") - {"moo-balance", "numpy", "setuptools", "pip"}
    assert not foreign, f"the import also loads {sorted(foreign)}"


def check_training() -> None:
    """Two quadratics: the loss falls with each kind of method, and a checkpoint resumes."""
    for weighting in (Sum(), SumLog(), MGDA()):
        weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), weighting)
        totals = []
        for _ in range(20):
            losses = {"a": (weight[0] - 2) ** 2, "b": 4 * weight[1] ** 2}
            totals.append(sum(loss.item() for loss in losses.values()))
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        assert totals[-1] < totals[0], (weighting, totals)
        optimizer.load_state_dict(optimizer.state_dict())


def check_examples() -> int:
    """Run the docstrings of all modules but those of frameworks; return how many examples."""
    count = 0
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(moo_balance.__path__, "moo_balance."):
        if module.name.startswith("moo_balance.integrations."):
            continue
        torch.manual_seed(0)
        result = doctest.testmod(importlib.import_module(module.name))
        assert not result.failed, f"{module.name}: {result.failed} examples fail"
        count += result.attempted
    assert count
    return count


def main() -> None:
    check_place()
    check_imports()
    check_training()
    print(f"installed package: imports, training and {check_examples()} lines of examples pass")


if __name__ == "__main__":
    main()
