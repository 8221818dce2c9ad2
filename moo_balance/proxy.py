"""An optimizer that is another one to everybody who asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch.optim import Optimizer

Step = TypeVar("Step", bound=Callable[..., Any])


def with_own_hooks(step: Step) -> Step:
    """Run the step hooks that were registered on a proxy.

    In place of PyTorch's own decoration of ``step``, which would record it for the profiler and run
    the global hooks as well: the wrapped optimizer does that, once.
    """

    @wraps(step)
    def hooked(self: OptimizerProxy, *args: Any, **kwargs: Any) -> Any:
        for before in self._optimizer_step_pre_hooks.values():
            replaced = before(self, (self, *args), kwargs)
            if replaced is not None:
                (_, *args), kwargs = replaced  # type: ignore[assignment]
        result = step(self, *args, **kwargs)
        for after in self._optimizer_step_post_hooks.values():
            after(self, (self, *args), kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]
    return cast(Step, hooked)


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
