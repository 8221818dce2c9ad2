"""A BalancedOptimizer and its naive twin, which are given the same calls and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalancedOptimizer, BalanceError
from moo_balance.weighting import Weighting
from tests.fuzz.faults import add_fault
from tests.fuzz.models import FuzzModel, next_numbers, random_states, set_random_states
from tests.fuzz.twin import MOMENTUM, Failed, Refused, Twin
from tests.support.problems import snapshot, sum_losses

TINY = 1e-290
INIT_SCALE, GROWTH_INTERVAL = 1024.0, 3


class Sides:
    """Both sides of a run. Each public method is one call to the library.

    Args:
        traits: Of the model.
        weighting: The method.
        names: The argument ``loss_names``.
        shared: Whether inner products are taken over the trunk only.
        arguments: Others of BalancedOptimizer.
    """

    def __init__(
        self,
        traits: Sequence[str],
        weighting: Weighting,
        names: tuple[str, ...] | None = None,
        shared: bool = False,
        **arguments: Any,
    ) -> None:
        self.model, twin = FuzzModel(traits), FuzzModel(traits)
        self.arguments = {"loss_names": names, **arguments}
        self.weighting, self.shared = weighting, shared
        self.optimizer = self._wrap(0.002)
        self.twin = Twin(
            twin,
            weighting,
            lr=0.002,
            names=names,
            nonfinite=arguments.get("nonfinite", "raise"),
            shared=positions_of(twin.trunk, twin) if shared else None,
            allows_windows="engine" not in arguments,
        )
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL
        )
        self.scale, self.growth = INIT_SCALE, 0
        self.log: list[tuple[int, Tensor]] = []
        self.may_hold_mark = False
        """Whether a window was opened: by a gradient next to zero it finds out who clears them."""

    def _wrap(self, lr: float) -> BalancedOptimizer:
        plain = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=MOMENTUM)
        shared = {"shared_params": self.model.trunk} if self.shared else {}
        return BalancedOptimizer(plain, self.weighting, **shared, **self.arguments)

    # ------------------------------------------------------------ the same call on both sides

    def call(
        self, expected: Callable[[], None], actual: Callable[[], Any], clears: bool = False
    ) -> None:
        """Make a call on both sides; where the twin refuses, nothing may change.

        Args:
            expected: The call on the twin.
            actual: The call on the library.
            clears: It clears gradients, which it may have done before it is refused.
        """
        start, before = random_states(), self.picture()
        try:
            expected()
        except Refused:
            set_random_states(start)
            with pytest.raises(BalanceError):
                actual()
            has_changed = self.picture()[1] != before[1]
            if clears and has_changed and all(grad is None for grad in self.grads()):
                self.twin.model.zero_grad()
                before = [before[0], [None] * len(before[1]), *before[2:]]
            assert self.picture() == before
            self.adopt(self.model.written(), self.twin.model.written())
            return
        except Failed:
            set_random_states(start)
            with pytest.raises((Exception, KeyboardInterrupt)):
                actual()
            self.adopt_grads()
            self.compare()
            return
        end = random_states()
        set_random_states(start)
        actual()
        assert next_numbers(random_states()) == next_numbers(end)
        self.compare()

    def refuse(self, call: Callable[[], Any]) -> None:
        """Make a call that must be refused in any case."""
        before = self.picture()
        with pytest.raises(BalanceError):
            call()
        assert self.picture() == before

    def picture(self) -> Any:
        """All that a refused call must not change."""
        params = list(self.model.parameters())
        trained = [p for p in params if p is not getattr(self.model, "average", None)]
        metrics = self.optimizer.metrics
        return snapshot(
            [
                trained,
                self.grads(),
                self.optimizer.state_dict(),
                [metrics.losses, metrics.coefficients, metrics.gramian],
                [gradient for _, gradient in self.log],
            ]
        )

    def grads(self) -> list[Tensor | None]:
        """``.grad`` of all parameters, without the mark of a window."""
        return [
            None
            if self.may_hold_mark and p.grad is not None and p.grad.abs().max() < TINY
            else p.grad
            for p in self.model.parameters()
        ]

    def compare(self) -> None:
        """Everything that can be seen is the same on both sides."""
        twin, balance = self.twin, self.optimizer.state_dict()["balance"]
        grads = zip(self.grads(), [p.grad for p in twin.params], strict=True)
        for grad, expected in grads:
            if self.may_hold_mark and grad is None and expected is not None:
                grad = torch.zeros_like(expected)
            close(grad, expected)
        close(list(self.model.parameters()), twin.params)
        close(self.model.written(), twin.model.written())
        assert balance["names"] == list(twin.names or ())
        counters = (balance["steps"], balance["skipped"])
        assert counters == (twin.steps, twin.skipped)
        assert set(balance["satisfied"]) == twin.satisfied
        assert balance["awaiting"] == (None if twin.awaiting is None else list(twin.awaiting))
        close(balance["state"], twin.state or {})
        coefficients = self.optimizer.metrics.coefficients
        close({k: float(v) for k, v in coefficients.items()}, twin.coefficients)
        by_position = sorted(self.log, key=lambda entry: entry[0])
        close(by_position, sorted(twin.log, key=lambda entry: entry[0]))

    def adopt(self, own: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Go on from the library's values."""
        for source, target in zip(own, expected, strict=True):
            target.copy_(source)

    def adopt_grads(self) -> None:
        """Go on from the library's gradients, where they are not specified."""
        for own, expected in zip(self.grads(), self.twin.params, strict=True):
            expected.grad = None if own is None else own.clone()

    # ------------------------------------------------------------ losses

    def forward(
        self, model: FuzzModel, batch: int, names: Sequence[str], fault: str | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        losses, features = model(batch, names)
        return add_fault(losses, fault), features

    def closure(
        self, batch: int, names: Sequence[str], fault: str | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        return lambda: self.forward(self.model, batch, names, fault)[0]

    def repeat(self, batch: int, names: Sequence[str]) -> Callable[[], dict[str, Tensor]]:
        """How the twin evaluates a closure again: as it ran from here, without a trace."""
        start, model = random_states(), self.twin.model
        written = [tensor.clone() for tensor in model.written()]

        def run() -> dict[str, Tensor]:
            with without_a_trace(model):
                set_random_states(start)
                self.adopt(written, model.written())
                return model(batch, names)[0]

        return run

    # ------------------------------------------------------------ steps

    def take_step(self, unscaled: bool = False, mishap: str | None = None) -> None:
        """The twin's step, and its second evaluation where closures were given.

        Whatever goes wrong in that one, the method does not wait for losses any more.
        """
        repeats = [] if self.twin.staged is None else self.twin.staged.repeats
        if self.twin.step(unscaled):
            if mishap is not None:
                self.twin.awaiting = None
                raise Failed
            self.twin.observe(sum_losses([repeat() for repeat in repeats]))

    def take_scaled_step(self) -> None:
        """What a GradScaler does in ``step`` and ``update``."""
        grads = [p.grad for p in self.twin.params if p.grad is not None]
        for grad in grads:
            grad /= self.scale
        if all(bool(grad.isfinite().all()) for grad in grads):
            self.take_step(unscaled=True)
            self.growth += 1
        else:
            self.scale, self.growth = self.scale / 2, 0
        if self.growth == GROWTH_INTERVAL:
            self.scale, self.growth = self.scale * 2, 0

    def step_by_scaler(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    # ------------------------------------------------------------ copies

    def replace(self, model: FuzzModel, optimizer: BalancedOptimizer) -> None:
        """Go on with a copy, which has neither gradients nor hooks."""
        self.model, self.optimizer, self.may_hold_mark = model, optimizer, False
        twin = self.twin
        for param in twin.params:
            param.grad = None
        twin.window = twin.staged = None
        twin.hooks, twin.observed, twin.log, self.log = {}, set(), [], []

    def load(self, saved: Mapping[str, Any], memory: dict[str, Any], fresh: bool) -> None:
        """Load a checkpoint, perhaps into a new optimizer of the same parameters."""
        self.may_hold_mark = False
        if fresh:
            # The mark of a window would stay in `.grad` with the optimizer gone.
            self.optimizer._balancer.record.drop_window()
            self.optimizer = self._wrap(0.5)
            self.twin.names = self.arguments["loss_names"]
        self.optimizer.load_state_dict(deepcopy(saved))  # PyTorch goes on in its tensors
        for name, value in deepcopy(memory).items():
            if name != "names" or value is not None:  # names that are known stay known
                setattr(self.twin, name, value)
        self.twin.window = self.twin.staged = None
        self.twin.coefficients = {}

    def remember(self) -> dict[str, Any]:
        """What a checkpoint holds, on the side of the twin."""
        names = ("names", "state", "steps", "skipped", "awaiting", "satisfied", "velocity", "lr")
        return deepcopy({name: getattr(self.twin, name) for name in names})


def positions_of(part: nn.Module, model: nn.Module) -> set[int]:
    """Where the parameters of a part stand among those of the model."""
    own = set(map(id, part.parameters()))
    return {k for k, param in enumerate(model.parameters()) if id(param) in own}


@contextmanager
def without_a_trace(model: FuzzModel):
    end, written = random_states(), [tensor.clone() for tensor in model.written()]
    try:
        yield
    finally:
        set_random_states(end)
        for tensor, before in zip(model.written(), written, strict=True):
            tensor.copy_(before)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8, equal_nan=True)
