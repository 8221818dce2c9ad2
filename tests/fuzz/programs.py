"""Random programs: small differentiable computations with all that makes a graph difficult."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from moo_balance.engine import Problem
from tests.fuzz.operations import OPERATIONS, REDUCTIONS, WIDTHS
from tests.support.engine_graphs import drawn


class Step(NamedTuple):
    """One operation on earlier values; the numbers choose which, and how."""

    operation: str
    first: int
    second: int
    seed: int


class Program(NamedTuple):
    """Steps, and the reductions that make losses of values.

    Args:
        rows: Number of samples: the first dimension of every value.
        steps: The operations.
        losses: Name of a reduction, and the positions of two values, counted from the last one.
        frozen: Which parameters require no gradient, modulo 8.
        elsewhere: Which parameters belong to another optimizer, modulo 8.
    """

    rows: int
    steps: Sequence[Step]
    losses: Sequence[tuple[str, int, int]]
    frozen: Collection[int] = ()
    elsewhere: Collection[int] = ()


class Run:
    """A program that has run: its values, its losses, its parameters.

    Args:
        program: The program.
        params: Parameters of an earlier run, which this one uses again.
        batch: Which inputs it gets.
        leaves: Positions of values that are cut off: what follows starts from a leaf.
    """

    def __init__(
        self,
        program: Program,
        params: Sequence[nn.Parameter] = (),
        batch: int = 0,
        leaves: Collection[int] = (),
    ) -> None:
        self.program, self.rows, self.known = program, program.rows, list(params)
        self.all_params: list[nn.Parameter] = []
        self.layers: list[tuple[nn.Parameter, bool]] = []
        self.values: list[Tensor] = []
        self.leaves: dict[int, Tensor] = {}
        self._cut = leaves
        self._keep(drawn(program.rows, WIDTHS[2], seed=1000 + batch))
        for step in program.steps:
            first, second = self.value(step.first), self.value(step.second)
            results = OPERATIONS[step.operation](self, first, second, step.seed)
            for result in results if isinstance(results, tuple) else (results,):
                self._keep(result)
        anchor = self.param(3, seed=77).requires_grad_()
        self.losses = [self._loss(*loss, anchor) for loss in program.losses]

    @property
    def params(self) -> list[nn.Parameter]:
        """Those of the optimizer."""
        elsewhere = self.program.elsewhere
        return [
            p for k, p in enumerate(self.all_params) if p.requires_grad and k % 8 not in elsewhere
        ]

    def problem(self, **arguments: Any) -> Problem:
        names = [f"loss {k}" for k in range(len(self.losses))]
        return Problem(names=names, losses=self.losses, params=self.params, **arguments)

    def value(self, number: int) -> Tensor:
        return self.values[-1 - number % len(self.values)]

    def param(self, *shape: int, seed: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
        """A new parameter, or in a run with known ones the next of them."""
        position = len(self.all_params)
        if position < len(self.known):
            self.all_params.append(self.known[position])
        else:
            start = drawn(*shape, seed=seed).to(dtype) / max(shape[-1], 1) ** 0.5
            trains = position % 8 not in self.program.frozen
            self.all_params.append(nn.Parameter(start, requires_grad=trains))
        return self.all_params[-1]

    def weight(self, inputs: int, seed: int) -> tuple[Tensor, bool]:
        """A new or used weight for so many inputs, and whether it is [outputs, inputs]."""
        used = [(p, t) for p, t in self.layers if p.shape[1 if t else 0] == inputs]
        if used and seed % 3 == 0:
            return used[seed % len(used)]
        outputs, transposed = WIDTHS[seed % len(WIDTHS)], seed % 2 == 0
        shape = (outputs, inputs) if transposed else (inputs, outputs)
        dtype = torch.float32 if seed % 11 == 0 else torch.float64
        self.layers.append((self.param(*shape, seed=seed, dtype=dtype), transposed))
        return self.layers[-1]

    @property
    def is_narrow(self) -> bool:
        """Whether some of it is computed in single precision."""
        operations = {step.operation for step in self.program.steps}
        reductions = {loss[0] for loss in self.program.losses}
        narrow = any(param.dtype == torch.float32 for param in self.all_params)
        return narrow or "narrow" in operations | reductions

    def _keep(self, value: Tensor) -> None:
        if len(self.values) in self._cut:
            value = self.leaves[len(self.values)] = value.detach().clone().requires_grad_()
        self.values.append(value)

    def _loss(self, reduction: str, first: int, second: int, anchor: Tensor) -> Tensor:
        a, b = self.value(first), self.value(second)
        loss = REDUCTIONS[reduction](a, b)
        return loss if loss.requires_grad else loss + (first % 3 + 1) * anchor.square().sum()


# ------------------------------------------------------------ strategies

numbers = st.integers(0, 99)
few_numbers = st.sets(st.integers(0, 7), max_size=2)


def programs(without: Collection[str] = ()) -> st.SearchStrategy[Program]:
    """Programs without some operations and reductions."""
    names = [name for name in OPERATIONS if name not in without]
    reductions = [name for name in REDUCTIONS if name not in without]
    step = st.builds(Step, st.sampled_from(names), numbers, numbers, numbers)
    loss = st.tuples(st.sampled_from(reductions), numbers, numbers)
    return st.builds(
        Program,
        st.integers(1, 6),
        st.lists(step, max_size=14),
        st.lists(loss, min_size=1, max_size=6),
        st.just(set()) | few_numbers,
        st.just(set()) | few_numbers,
    )
