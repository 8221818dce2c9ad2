"""Base classes of optimizers that own no parameters: of one, or of several, that do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from moo_balance._torch_internals import hooks_of, initialize_hooks


class ForwardingOptimizer(Optimizer):
    """An optimizer without groups and state of its own, whose own hooks run all the same."""

    _pickled: tuple[str, ...] = ()
    """Attributes that a copy or a pickle keeps. ``step`` is not among them: schedulers replace it
    on the instance."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in self._pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Attributes first: PyTorch reads `defaults`, which are another optimizer's.
        self.__dict__.update(state)
        initialize_hooks(self)
        # The dictionaries themselves, so that a step without hooks only finds them empty.
        self._step_hooks = hooks_of(self, "step_pre"), hooks_of(self, "step_post")

    def _step_with_hooks(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `step` between the step hooks that were registered on this optimizer."""
        before, after = self._step_hooks
        for hook in before.values():
            replaced = hook(self, (self, *args), kwargs)
            if replaced is not None:
                (_, *args), kwargs = replaced
        result = step(*args, **kwargs)
        for hook in after.values():
            hook(self, (self, *args), kwargs)
        return result

    def _save_with_hooks(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `save` between the hooks of ``state_dict``."""
        for before in hooks_of(self, "state_dict_pre").values():
            before(self)
        state = save()
        for after in hooks_of(self, "state_dict_post").values():
            state = after(self, state) or state
        return state

    def _load_with_hooks(
        self, load: Callable[[dict[str, Any]], None], state_dict: Mapping[str, Any]
    ) -> None:
        """Run `load` between the hooks of ``load_state_dict``."""
        state = dict(state_dict)
        for before in hooks_of(self, "load_state_dict_pre").values():
            state = before(self, state) or state
        load(state)
        for after in hooks_of(self, "load_state_dict_post").values():
            after(self)


class OptimizerWrapper(ForwardingOptimizer):
    """Forwards groups, state and defaults to a wrapped optimizer, and owns none of them.

    They are properties, because a copied reference goes stale when a state dict is loaded or a
    framework prepares the optimizer anew. Nothing is ever written into the wrapped ``state``.
    Hooks registered on the wrapper see the wrapper. Public methods and attributes that the wrapper
    itself does not have are the wrapped optimizer's.
    """

    _pickled: tuple[str, ...] = ("_wrapped",)

    _wrapped: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        self.__setstate__({"_wrapped": optimizer})

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

    def __getattr__(self, name: str) -> Any:
        """A public attribute that only the wrapped optimizer has, such as ``train``."""
        # A copy is asked for names, such as `__setstate__`, before it has any attribute.
        if name.startswith("_") or "_wrapped" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(self._wrapped, name)
        except AttributeError as error:
            raise AttributeError(
                f"neither {type(self).__name__} nor the wrapped {type(self._wrapped).__name__} has "
                f"an attribute {name!r}",
                name=name,
                obj=self,
            ) from error

    def __dir__(self) -> list[str]:
        public = (name for name in dir(self._wrapped) if not name.startswith("_"))
        return sorted({*super().__dir__(), *public})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self._wrapped.add_param_group(param_group)
