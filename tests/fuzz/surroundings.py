"""What happens around the steps of a run: hooks, freezing, checkpoints, copies, wrong calls."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.fuzz.sides import Sides
from tests.fuzz.wrong_calls import MALFORMED, WRONG_CALLS, malformed
from tests.support.registry import NAMES

batches = st.integers(0, 5)
positions = st.integers(0, 7)

HOOKS = {
    "triple": lambda gradient: gradient * 3,
    "clamp": lambda gradient: gradient.clamp(-0.1, 0.1),
}


class Surroundings(RuleBasedStateMachine):
    """Rules for everything but the gradients and the steps."""

    sides: Sides
    saved: Any
    is_scaled: bool

    @rule(position=positions)
    def freeze_or_release(self, position):
        """Not after a faulty gradient, which would no longer be found."""
        twin = self.sides.twin
        if twin.has_finite_gradients() and position not in (twin.shared or ()):
            for model in (self.sides.model, twin.model):
                param = list(model.parameters())[position]
                if param is not getattr(model, "average", None):
                    param.requires_grad_(not param.requires_grad)

    @rule(lr=st.sampled_from([0.0, 0.001, 0.003]))
    def change_lr(self, lr):
        self.sides.twin.lr = lr
        for group in self.sides.optimizer.param_groups:
            group["lr"] = lr

    @rule(position=positions, kind=st.sampled_from([*HOOKS, "observe"]))
    def add_hook(self, position, kind):
        sides, twin = self.sides, self.sides.twin
        param = list(sides.model.parameters())[position]
        if not param.requires_grad or position in twin.hooks or position in twin.observed:
            return
        if kind == "observe":
            twin.observed.add(position)
            log = sides.log
            param.register_post_accumulate_grad_hook(
                lambda p: log.append((position, p.grad.clone()))
            )
        else:
            twin.hooks[position] = [HOOKS[kind]]
            param.register_hook(HOOKS[kind])

    @rule()
    def save(self):
        self.saved = deepcopy(self.sides.optimizer.state_dict()), self.sides.remember()

    @precondition(lambda self: self.saved is not None)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        self.sides.load(*self.saved, fresh)
        self.is_scaled = False
        self.sides.compare()

    @rule(pickled=st.booleans(), accumulating=st.booleans())
    def copy(self, pickled, accumulating):
        sides = self.sides
        pair = sides.model, sides.optimizer
        if accumulating:
            with sides.optimizer.accumulate():
                pair = pickle.loads(pickle.dumps(pair)) if pickled else deepcopy(pair)
        else:
            pair = pickle.loads(pickle.dumps(pair)) if pickled else deepcopy(pair)
        sides.replace(*pair)
        self.is_scaled = False
        sides.compare()

    # ------------------------------------------------------------ wrong calls

    @rule(call=st.sampled_from(sorted(WRONG_CALLS)), batch=batches)
    def call_wrongly(self, call, batch):
        losses, _ = self.sides.model(batch, NAMES)
        self.sides.twin.model(batch, NAMES)
        self.sides.adopt(self.sides.model.written(), self.sides.twin.model.written())
        self.sides.refuse(lambda: WRONG_CALLS[call](self.sides.optimizer, losses))

    @rule(change=st.sampled_from(sorted(MALFORMED)))
    def load_what_is_malformed(self, change):
        optimizer = self.sides.optimizer
        self.sides.refuse(lambda: optimizer.load_state_dict(malformed(optimizer, change)))
