"""How far a reader has to go to follow a step: calls between modules, and modules met.

Measured for one ``backward`` and ``step`` with MGDA and PerLoss, in one process, on two linear
layers. The bounds keep the ordinary path from growing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import moo_balance
from moo_balance import FAMO, MGDA, BalancedOptimizer, Sum, Weighting

PACKAGE = str(Path(moo_balance.__file__).parent)


class Structure(NamedTuple):
    calls: int
    crossings: list[str]
    modules: set[str]


def module_of(frame: FrameType | None) -> str | None:
    file = "" if frame is None else frame.f_code.co_filename
    return file.removeprefix(PACKAGE) if file.startswith(PACKAGE) else None


def structure_of_a_step(weighting: Weighting) -> Structure:
    """Calls inside the package, and those whose nearest caller inside lies in another module."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), weighting)
    inputs = torch.randn(4, 8)
    calls, crossings, modules = 0, list[str](), set[str]()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        module = module_of(frame)
        if event != "call" or module is None:
            return
        calls += 1
        modules.add(module)
        caller = frame.f_back
        while caller is not None and module_of(caller) is None:
            caller = caller.f_back
        origin = module_of(caller)
        if origin not in (None, module):
            crossings.append(f"{origin} -> {module}: {frame.f_code.co_name}")

    for step in range(3):
        optimizer.zero_grad()
        outputs = model(inputs).square().mean(0)
        losses = {"a": outputs[0], "b": outputs[1]}
        if step == 2:
            sys.setprofile(profile)
        try:
            optimizer.backward(losses)
            optimizer.step()
        finally:
            sys.setprofile(None)
    return Structure(calls, crossings, modules)


def test_a_step_with_a_gramian_crosses_few_modules() -> None:
    calls, crossings, modules = structure_of_a_step(MGDA())
    assert len(crossings) <= 50, "\n".join(crossings)
    assert len(modules) <= 17, sorted(modules)
    assert calls <= 160, calls


def test_the_ordinary_path_meets_no_module_of_a_system_that_is_not_there() -> None:
    for weighting in (MGDA(), Sum(), FAMO(lagged=True)):
        _, _, modules = structure_of_a_step(weighting)
        unused = ("accumulation", "grad_scaler", "reevaluation", "engine/distributed", "streaming")
        assert not [module for module in modules if any(name in module for name in unused)]
