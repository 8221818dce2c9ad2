"""What methods have in common that change or combine other methods."""

from __future__ import annotations

from collections.abc import Collection

from moo_balance._hints import describe_value
from moo_balance.errors import BalanceValueError
from moo_balance.weighting.base import Needs, State, Statistics, Weighting


class WrappingWeighting(Weighting):
    """A method around another one, its field ``weighting``, whose needs and bounds it has.

    The state of the other method is part of its own.
    """

    weighting: Weighting

    def needs(self, step: int) -> Needs:
        return self.weighting.needs(step)

    @property
    def uses_gramian(self) -> bool:
        return self.weighting.uses_gramian

    @property
    def uses_losses(self) -> bool:
        return self.weighting.uses_losses

    @property
    def observes_step(self) -> bool:
        return self.weighting.observes_step

    @property
    def uses_independent_batches(self) -> bool:
        return self.weighting.uses_independent_batches

    @property
    def every(self) -> int:
        return self.weighting.every

    @property
    def constant_losses(self) -> Collection[str]:
        return self.weighting.constant_losses

    def observe(self, statistics: Statistics, state: State) -> State:
        inner = self.weighting.observe(statistics, inner_state(state))
        return {**state, **as_inner(inner)}


def check_weighting(owner: Weighting, argument: str, value: object) -> None:
    """Refuse what is no method."""
    if not isinstance(value, Weighting):
        raise BalanceValueError(
            f"Parameter `{argument}` of {type(owner).__name__} should be an instance of a method "
            f"such as `MGDA()`. Found {describe_value(value, Weighting)}."
        )


def inner_state(state: State, prefix: str = "inner/") -> State:
    """The part of a state that belongs to a method inside another one."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def as_inner(state: State, prefix: str = "inner/") -> State:
    """The state of a method as a part of that of the method around it."""
    return {prefix + key: value for key, value in state.items()}
