"""Random sequences of calls agree with the naive mathematics, and wrong calls change nothing."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moo_balance.engine import Streaming
from tests.fuzz.amounts import over_amounts, settings_for
from tests.fuzz.faults import FAULTS, MISHAPS, add_mishap
from tests.fuzz.models import TRAITS
from tests.fuzz.sides import Sides
from tests.fuzz.surroundings import Surroundings, batches
from tests.fuzz.twin import Failed, Refused
from tests.support.registry import KINDS, METHODS, NAMES, Method

some_names = st.lists(st.sampled_from(NAMES), min_size=1, unique=True).map(tuple) | st.just(NAMES)
rarely = st.integers(0, 9).map(lambda number: number == 0)
faults = st.none() | st.none() | st.none() | st.sampled_from(FAULTS)


class CallSequences(Surroundings):
    """Calls in any order, by a user who may have misread the manual."""

    method: Method

    @initialize(
        traits=st.sets(st.sampled_from(TRAITS)),
        names=st.sampled_from([None, None, NAMES]),
        nonfinite=st.sampled_from(["raise", "skip"]),
        shared=rarely,
        streaming=rarely,
    )
    def start(self, traits, names, nonfinite, shared, streaming):
        weighting, arguments = self.method.make(NAMES), {}
        if self.method.gramian:
            arguments = {"engine": Streaming()} if streaming else {}
        shared = shared and self.method.gramian
        self.sides = Sides(
            sorted(traits), weighting, names, shared, nonfinite=nonfinite, **arguments
        )
        self.saved = None
        self.is_scaled = False  # whether `.grad` carries a scale

    # ------------------------------------------------------------ gradients

    @rule(
        batch=batches,
        names=some_names,
        fault=faults,
        closure=st.booleans(),
        accumulate=st.booleans(),
        scaled=rarely,
        with_features=rarely,
    )
    def backward(self, batch, names, fault, closure, accumulate, scaled, with_features):
        sides, twin, optimizer = self.sides, self.sides.twin, self.sides.optimizer
        with_features = with_features and self.method.gramian
        scaled = scaled or (self.is_scaled and twin.staged is not None)
        scale = sides.scale if scaled else None

        def expected():
            repeat = sides.repeat(batch, names) if closure else None
            losses, features = sides.forward(twin.model, batch, names, fault)
            features = features if with_features else None
            sums = twin.read(losses, features, scale, repeat, accumulate)
            (twin.accumulate if accumulate else twin.backward)(sums, scale)
            self.is_scaled, sides.may_hold_mark = scaled, accumulate

        def actual():
            kept = []

            def run():
                losses, features = sides.forward(sides.model, batch, names, fault)
                kept[:] = [features]
                return losses

            arguments = {"grad_scaler": sides.scaler} if scaled else {}
            if with_features:
                arguments["features"] = lambda: kept[0]
            call = partial(optimizer.backward, run if closure else run(), **arguments)
            if accumulate:
                with optimizer.accumulate():
                    call()
            else:
                call()

        sides.call(expected, actual)

    @rule(batch=batches, names=some_names, fault=faults, factor=st.sampled_from([1.0, 0.5]))
    def combined_loss(self, batch, names, fault, factor):
        sides, twin = self.sides, self.sides.twin

        def expected():
            losses, _ = sides.forward(twin.model, batch, names, fault)
            twin.combined(twin.read(losses), factor)
            self.is_scaled = False

        def actual():
            losses, _ = sides.forward(sides.model, batch, names, fault)
            (sides.optimizer.combined_loss(losses) * factor).backward()

        if not (twin.nonfinite == "skip" and fault):  # `.grad` is not specified then
            sides.call(expected, actual)

    @rule(set_to_none=st.booleans(), of_model=rarely)
    def zero_grad(self, set_to_none, of_model):
        sides, twin = self.sides, self.sides.twin
        staged = twin.staged
        twin.zero_grad(set_to_none)
        if of_model:
            sides.model.zero_grad(set_to_none)
            twin.staged = staged
        else:
            sides.optimizer.zero_grad(set_to_none)
        self.sides.compare()

    # ------------------------------------------------------------ steps

    @rule()
    def step(self):
        # With NaN gradients, a learning rate of zero gives NaN with and without balancing, and a
        # scaler's step that is taken without the scaler may be refused or skipped.
        twin = self.sides.twin
        if twin.has_finite_gradients() or (twin.lr and not self.is_scaled):
            self.sides.call(self.sides.take_step, self.sides.optimizer.step)

    @rule(
        batch=batches,
        names=some_names,
        fault=faults,
        mishap=st.none() | st.none() | st.sampled_from(MISHAPS),
    )
    def step_with_closure(self, batch, names, fault, mishap):
        sides, twin = self.sides, self.sides.twin

        def expected():
            repeat = sides.repeat(batch, names)
            losses, _ = sides.forward(twin.model, batch, names, fault)
            if twin.staged is not None or twin.window is not None:
                raise Refused("gradients are there")
            sums = twin.read(losses, repeat=repeat)
            twin.weigh(sums)
            twin.zero_grad()
            twin.backward(sums)
            self.is_scaled = False
            try:
                sides.take_step(mishap=mishap)
            except Refused as error:  # of gradients that are written: nothing is left of them
                twin.staged = None
                raise Failed from error

        closure = add_mishap(sides.closure(batch, names, fault), mishap)
        sides.call(expected, lambda: sides.optimizer.step(closure), clears=True)

    @precondition(lambda self: self.is_scaled and self.sides.twin.staged is not None)
    @rule(unscale=st.booleans())
    def step_by_scaler(self, unscale):
        sides, twin = self.sides, self.sides.twin
        if twin.window is not None or all(p.grad is None for p in twin.params):
            return

        def actual():
            if unscale:
                sides.scaler.unscale_(sides.optimizer)
            sides.step_by_scaler()

        sides.call(sides.take_scaled_step, actual)
        sides.optimizer.zero_grad()
        twin.zero_grad()
        self.is_scaled = False

    @precondition(lambda self: self.sides.twin.steps or self.sides.twin.skipped)
    @rule(batch=batches, names=some_names, awaited=st.booleans())
    def observe(self, batch, names, awaited):
        sides, twin = self.sides, self.sides.twin
        names = twin.awaiting or names if awaited else names
        sides.call(
            lambda: twin.observe(twin.model(batch, names)[0]),
            lambda: sides.optimizer.observe(sides.model(batch, names)[0]),
        )


def machine(method: Method) -> type[CallSequences]:
    return type(
        f"CallSequences_{method.id}".replace("-", "_"), (CallSequences,), {"method": method}
    )


ROWS = [*KINDS, *(row for row in METHODS if row.id in ("OnlineTchebycheff", "FAMO-every"))]


# Two calls of `backward` before a step are what some users do, and are told about.
@pytest.mark.filterwarnings("ignore:Losses that are to be balanced:UserWarning")
@over_amounts(few=4)
@pytest.mark.parametrize("method", ROWS, ids=repr)
def test_calls_in_any_order(method, examples):
    run_state_machine_as_test(
        machine(method), settings=settings_for(examples, stateful_step_count=20)
    )
