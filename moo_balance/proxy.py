"""An optimizer that is another one to everybody who asks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class OptimizerProxy(Optimizer):
    """Forwards groups, state and defaults to a wrapped optimizer, and owns none of them.

    They are properties, because a copied reference goes stale when a state dict is loaded or a
    framework prepares the optimizer anew. Nothing is ever written into the wrapped ``state``.
    """

    _kept: tuple[str, ...] = ("_wrapped",)
    """Attributes that survive a copy or a pickle: not ``step``, which schedulers patch."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._wrapped = optimizer
        # Hooks and the profiling of `step`, without a second copy of groups and state.
        super().__setstate__({})

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._wrapped

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self._wrapped.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._wrapped.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self._wrapped.state

    @state.setter
    def state(self, state: Any) -> None:
        self._wrapped.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self._wrapped.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._wrapped.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self._wrapped.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Attributes first: the parent reads `defaults`, which lives in the wrapped optimizer.
        self.__dict__.update(state)
        super().__setstate__({})
