"""Random graphs: every engine agrees with one ``autograd.grad`` per loss."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor

from moo_balance import BalanceError
from moo_balance.engine import Engine, Linearization, PerLoss, Streaming
from tests.fuzz.amounts import over_amounts, settings_for
from tests.fuzz.programs import Program, Run, programs
from tests.support.engine_graphs import drawn
from tests.support.engines import CutAt, everywhere, in_little_memory

ENGINES: dict[str, Engine] = {
    "per_loss": PerLoss(),
    "streaming": Streaming(),
    "streaming-everywhere": CutAt(everywhere),
    "streaming-in_little_memory": CutAt(in_little_memory),
}

over_all_engines = pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))


def rows_of(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """One ``autograd.grad`` per loss."""
    return [
        list(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True))
        for loss in losses
    ]


def flat(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor:
    """Gradients as one vector of double precision, zero where there is none."""
    whole = [
        torch.zeros_like(like) if gradient is None else gradient
        for gradient, like in zip(gradients, inputs, strict=True)
    ]
    return torch.cat([g.detach().to_dense().double().reshape(-1) for g in whole])


def jacobian(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([flat(row, inputs) for row in rows_of(losses, inputs)])


def assert_close(actual: Tensor, expected: Tensor, narrow: bool) -> None:
    tolerance = 1e-4 if narrow else 1e-10
    size = 1.0 + float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * size)


def take_gradients(run: Run) -> Tensor:
    """``.grad`` of all parameters, which is cleared."""
    taken = flat([p.grad for p in run.params], run.params)
    for param in run.all_params:
        param.grad = None
    return taken


def reached(run: Run) -> list[bool]:
    return [param.grad is not None for param in run.params]


def check(linearization: Linearization, run: Run, expected: Tensor, combined: bool) -> None:
    """The weighted gradient is that of the expected rows."""
    coefficients = drawn(len(expected), seed=9)
    if combined:
        (2.0 * linearization.combined(coefficients)).backward()
        assert_close(take_gradients(run) / 2, coefficients @ expected, run.is_narrow)
    else:
        linearization.add_to_grad(coefficients)
        assert_close(take_gradients(run), coefficients @ expected, run.is_narrow)
    assert torch.equal(coefficients, drawn(len(expected), seed=9))


@over_amounts(few=20)
@over_all_engines
def test_engines_agree_with_the_naive_jacobian(engine: Engine, examples: int) -> None:
    @settings_for(examples)
    @given(programs(), st.booleans(), st.booleans())
    def agree(program: Program, combined: bool, scaled: bool) -> None:
        run = Run(program)
        assume(run.params)
        expected = jacobian(run.losses, run.params)
        scale = torch.tensor(4.0) if scaled and not combined else None
        problem = run.problem(scale=scale, retain_graph=True)
        linearization = engine.linearize(problem)
        assert_close(linearization.gramian(), expected @ expected.T, run.is_narrow)
        assert not any(reached(run))
        check(linearization, run, expected * (4 if problem.scale is not None else 1), combined)
        if not combined:  # the graph is as it was
            assert_close(jacobian(run.losses, run.params), expected, run.is_narrow)
        # Without a Gramian the gradient is the same.
        again = Run(program, run.all_params)
        check(engine.linearize(again.problem()), again, expected, combined)

    agree()


@over_amounts(few=20)
def test_parameters_that_are_reached_get_a_gradient_and_no_others(examples: int) -> None:
    @settings_for(examples)
    @given(programs(), st.sampled_from(list(ENGINES)))
    def agree(program: Program, name: str) -> None:
        run, plain = Run(program), Run(program)
        assume(run.params)
        torch.autograd.backward(plain.losses)
        linearization = ENGINES[name].linearize(run.problem())
        linearization.gramian()
        linearization.add_to_grad(drawn(len(run.losses), seed=9))
        assert reached(run) == reached(plain)

    agree()


@over_amounts(few=20)
def test_windows_add_up_the_rows_of_their_batches(examples: int) -> None:
    @settings_for(examples)
    @given(programs(), st.integers(1, 3), st.booleans())
    def agree(program: Program, count: int, combined: bool) -> None:
        run = Run(program)
        assume(run.params)
        expected, window = 0.0, PerLoss().window()
        for batch in range(count):
            window.add(run.problem(retain_graph=True))
            expected = expected + jacobian(run.losses, run.params)
            run = Run(program, run.all_params, batch + 1)
        expected = expected + jacobian(run.losses, run.params)
        closed = window.close(run.problem())
        assert_close(closed.gramian(), expected @ expected.T, run.is_narrow)
        check(closed, run, expected, combined=False)

    agree()


@over_amounts(few=30)
@pytest.mark.parametrize("engine", [PerLoss(), Streaming()], ids=["per_loss", "streaming"])
def test_features_at_random_cuts(engine: Engine, examples: int) -> None:
    @settings_for(examples)
    @given(programs(without={"hooked"}), st.sets(st.integers(0, 30), min_size=1, max_size=3))
    def agree(program: Program, chosen: set[int]) -> None:
        run = Run(program)
        cuts = sorted({number % len(run.values) for number in chosen})
        cuts = [cut for cut in cuts if run.values[cut].requires_grad]
        assume(cuts and run.params)
        features = [run.values[cut] for cut in cuts]
        # Cut off, each feature gets its own share: none by way of another one.
        split = Run(program, run.all_params, leaves=cuts)
        leaves = [split.leaves[cut] for cut in cuts]
        at_features = jacobian(split.losses, leaves)
        depends = [any(g is not None for g in row) for row in rows_of(split.losses, leaves)]
        problem = run.problem(features=features, retain_graph=True)
        linearization = engine.linearize(problem)
        if not all(depends):
            with pytest.raises(BalanceError, match="should be what every loss is computed from"):
                linearization.gramian()
            return
        expected = jacobian(run.losses, run.params)
        assert_close(linearization.gramian(), at_features @ at_features.T, run.is_narrow)
        check(linearization, run, expected, combined=False)

    agree()
