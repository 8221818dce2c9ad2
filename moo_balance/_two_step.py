"""Optimizers that take two gradients for one step, such as SAM: ``first_step``, ``second_step``.

``first_step`` moves the parameters to where the second gradient is taken; ``second_step`` moves
them back and takes the actual step, which is what the balance counts. Once an optimizer is built,
this module is used only with such a one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from moo_balance._grad_scaler import Scaling
from moo_balance._hints import add_note, is_required
from moo_balance._record import Staged
from moo_balance._several import parts_of
from moo_balance._stepping import must_skip, take_step
from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.weighting._identity import lagged_form
from moo_balance.weighting.base import Weighting
from moo_balance.weighting.rows import RowWeighting

if TYPE_CHECKING:
    from moo_balance._balancer import Balancer


def has_two_steps(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a ``first_step`` and a ``second_step``."""
    steps = (getattr(optimizer, name, None) for name in ("first_step", "second_step"))
    return all(map(callable, steps))


def check_not_apart(optimizer: Optimizer, method: RowWeighting | None) -> None:
    """Refuse a method that takes the step of the optimizer for each loss."""
    if method is not None and method.steps_apart:
        raise BalanceValueError(
            f"Parameter `optimizer` should take a single step with {type(method).__name__}, "
            f"which takes it for each loss. Found {type(optimizer).__name__}, which takes two. "
            "Use an optimizer without `first_step`."
        )


def check_steps(optimizer: Optimizer, nonfinite: str, weighting: Weighting) -> None:
    """Refuse an optimizer whose step cannot be called, skipped or observed where it should be."""
    if has_two_steps(optimizer):
        _check_alone(optimizer)
        if weighting.observes_step:
            raise _not_observable(optimizer, weighting)
        check_not_apart(optimizer, weighting.needs(0).rows)
        if nonfinite == "skip":
            raise BalanceValueError(
                f"Parameter `nonfinite` should be 'raise' with {type(optimizer).__name__}, whose "
                "second step puts back what the first has moved, so that it cannot be "
                "skipped. Found 'skip'."
            )
        return
    step: Any = optimizer.step
    if hasattr(step, "_wrapped_by_lr_sched"):
        # A scheduler that was made before has put a function in place of the bound method.
        step = MethodType(inspect.unwrap(step), optimizer)
    try:
        arguments = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return  # a callable without a signature
    required = [each.name for each in arguments if is_required(each)]
    if required:
        raise BalanceValueError(
            f"Parameter `optimizer` should take a step without arguments. Found "
            f"{type(optimizer).__name__}, whose `step` needs `{required[0]}`: a closure that it "
            "evaluates itself cannot be balanced. Use an optimizer that steps on `.grad`."
        )


def _check_alone(optimizer: Optimizer) -> None:
    """Refuse an optimizer with two steps as one of several."""
    for part in parts_of(optimizer)[1:]:
        if has_two_steps(part):
            raise BalanceValueError(
                "Parameter `optimizer` should be a single optimizer if it takes two steps. Found "
                f"{type(part).__name__} as one of several. Let it train all parameters."
            )


def _not_observable(optimizer: Optimizer, weighting: Weighting) -> BalanceValueError:
    lagged = lagged_form(weighting)
    instead = f"Choose {lagged}, which compares" if lagged else "Choose a method that compares"
    return BalanceValueError(
        "Parameter `weighting` should not need the losses after the step with "
        f"{type(optimizer).__name__}, which takes its second gradient at other parameters than "
        "those that the step starts from, so that losses before and after it do not compare. Found "
        f"{type(weighting).__name__}. {instead} the losses of one batch with those of the next."
    )


def take_first_step(balancer: Balancer, stepping: Optimizer, take: Callable[[], Any]) -> Any:
    """Let the wrapped optimizer move the parameters, and discard what was staged.

    Args:
        balancer: Of the BalancedOptimizer.
        stepping: The BalancedOptimizer, or a framework's copy of it.
        take: The wrapped ``first_step`` with its arguments.
    """
    record = balancer.record
    if record.moved:
        raise BalanceError(
            "`first_step` should be followed by `second_step`. Found another `first_step`, which "
            "would lose the parameters from before. Call `backward` and `second_step` first."
        )
    staged = _read_staged(balancer, "first_step")
    must_skip(balancer, staged, stepping)  # raises if a gradient is not finite
    output = take()
    record.staged, record.moved = None, True
    return output


def take_second_step(balancer: Balancer, stepping: Optimizer, take: Callable[[], Any]) -> Any:
    """Let the wrapped optimizer take its step, and commit what was staged since `first_step`."""
    if not balancer.record.moved:
        raise BalanceError(
            "`second_step` should follow `first_step`. Found none since the last step. Call "
            "`backward`, `first_step`, `backward` and `second_step`, in this order."
        )
    _read_staged(balancer, "second_step")
    try:
        return take_step(balancer, stepping, take=take)
    except NonFiniteError as error:
        add_note(
            error,
            "The parameters are still where `first_step` has moved them. Call `backward` with "
            "finite losses and `second_step`, which puts them back.",
        )
        raise


def _read_staged(balancer: Balancer, call: str) -> Staged:
    balancer.record.check_window_closed()
    staged = balancer.record.staged
    if staged is None:
        raise BalanceError(
            f"`{call}` should follow `backward` or `combined_loss`. Found neither since the last "
            "one. Call `optimizer.backward(losses)` in place of `loss.backward()`."
        )
    return staged


def single_step_error(optimizer: Optimizer) -> BalanceError:
    """The error of ``step`` on an optimizer with two steps."""
    return BalanceError(
        f"{type(optimizer).__name__} takes two gradients for one step. Found a call of `step`. "
        "Call `backward(losses)` and `first_step(zero_grad=True)`, then `backward` with the losses "
        "of the same batch, evaluated again, and `second_step(zero_grad=True)`."
    )


def check_no_scaling(optimizer: Optimizer, scaling: Scaling | None) -> None:
    """Refuse a loss scaler, which checks the gradients of one step only."""
    if scaling is not None:
        raise BalanceError(
            f"{type(optimizer).__name__} takes two gradients for one step, and GradScaler checks "
            "and unscales those of one. Found `grad_scaler=`. Train in bfloat16, without a scaler."
        )
