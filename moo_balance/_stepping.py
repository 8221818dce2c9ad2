"""From a staged step to a committed one: the wrapped optimizer's step, and the losses after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from moo_balance._hints import add_note
from moo_balance._nonfinite import grads_are_finite, nonfinite_grad_error, select_state, unite
from moo_balance._record import Staged
from moo_balance._reevaluation import Reevaluation, evaluate, repeat_all
from moo_balance._satisfied import among_present, observe as observe_losses
from moo_balance._separate_steps import take_separate_steps
from moo_balance._validation import Given, check_closure, read_observed_losses
from moo_balance.engine.base import is_distributed
from moo_balance.engine.distributed import is_whole, local_part
from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.weighting.base import Statistics

if TYPE_CHECKING:
    from moo_balance._balancer import Balancer


def take_step(
    balancer: Balancer,
    stepping: Optimizer,
    closure: Callable[[], Any] | None = None,
    take: Callable[[], Any] | None = None,
) -> Any:
    """Take the wrapped optimizer's step and commit what was staged.

    Args:
        balancer: Of the BalancedOptimizer.
        stepping: The BalancedOptimizer, or a framework's copy of it, whose ``step`` was called.
        closure: Its argument.
        take: The wrapped step; None for ``step`` without arguments.
    """
    record = balancer.record
    if record.window is not None:
        balancer.drop_cleared_window(record.window)
    result = None if closure is None else _run_closure(balancer, closure)
    if record.window is not None:
        record.check_window_closed()
    staged = record.staged
    if staged is None or (staged.combined and not (staged.differentiated or staged.skip)):
        return _step_without_backward(balancer, closure, result)
    try:
        if must_skip(balancer, staged, stepping):
            record.skip(staged, balancer.max_skips)
            return result
        if staged.separate is not None:
            output = None
            kept = record.rows_of(staged.method)
            staged.rows = take_separate_steps(balancer.optimizer, staged.separate, kept)
        else:
            output = balancer.optimizer.step() if take is None else take()
    except BaseException:
        if closure is not None:  # it will be evaluated again, on gradients that are cleared
            record.staged = None
        raise
    record.commit(staged)
    if staged.reevaluations and record.awaiting is not None:
        _reevaluate(balancer, staged.reevaluations)
    if balancer.ranks is not None:
        balancer.check_ranks(balancer.ranks)
    return output if closure is None else result


def _run_closure(balancer: Balancer, closure: Callable[[], Any]) -> Any:
    """Evaluate a closure of `step`; if it returns losses, balance them."""
    check_closure(closure)
    first, reevaluations = balancer.make_repeatable(closure)
    before = balancer.record.staged
    try:
        result = evaluate(first)
    except BaseException as error:
        if balancer.record.staged is before:  # the other ranks wait for the losses of this one
            balancer.read(partial(_raise, error), "backward")
        raise
    if isinstance(result, Mapping):
        balancer.record.check_nothing_staged()
        _, batch = balancer.prepare(result, reevaluations=reevaluations)
        balancer.optimizer.zero_grad()
        balancer.balance(batch)
    elif balancer.record.staged is not before:
        _check_observable(balancer, balancer.record.staged)
    return result


def _check_observable(balancer: Balancer, staged: Staged | None) -> None:
    """Refuse what a closure has staged without a way to evaluate the losses after the step.

    A trainer's own, which called `combined_loss`, may still be followed by `observe`.
    """
    if staged is None or staged.combined or staged.reevaluations or not staged.observes:
        return
    balancer.record.staged = None  # the closure will be evaluated again, on cleared gradients
    raise BalanceError(
        f"{balancer.method} needs the losses of the same batch after the step. Found a closure of "
        "`step` that has called `backward` itself. Return the dict of losses from the closure, and "
        "leave `backward` to `step`."
    )


def _raise(error: BaseException) -> NoReturn:
    raise error


def _step_without_backward(balancer: Balancer, closure: object, result: object) -> Any:
    """Handle a step without gradients of ours: an error, except where nothing is to change."""
    optimizer, is_combined = balancer.optimizer, balancer.record.staged is not None
    if closure is not None and result is None and all(p.grad is None for p in balancer.params):
        balancer.record.staged = None
        return None  # a trainer skips this batch
    if is_combined:
        raise BalanceError(
            "`step` should follow a backward pass of what `combined_loss` or `weighted_losses` "
            "returned. Found none. Call `.backward()` of it, or of the sum of its values."
        )
    if closure is not None:
        raise BalanceValueError(
            "The closure given to `step` should return a dict of losses by name. Found "
            f"{type(result).__name__}. A trainer's own closure may return anything once it has "
            "called `combined_loss(losses).backward()`."
        )
    if all(float(group.get("lr", 1.0)) == 0.0 for group in optimizer.param_groups):
        return optimizer.step()  # torch.distributed.checkpoint initializes a fresh state
    raise BalanceError(
        "`step` should follow `backward` or `combined_loss`. Found neither since the last step or "
        "`zero_grad`. Call `optimizer.backward(losses)`, in place of `loss.backward()`, between "
        "`optimizer.zero_grad()` and `optimizer.step()`."
    )


# ------------------------------------------------------------ values that are not finite


def must_skip(balancer: Balancer, staged: Staged, stepping: Optimizer) -> bool:
    """Whether a value that is not finite forbids the step.

    Raises:
        NonFiniteError: With ``nonfinite="raise"``: a gradient on the CPU is not finite.
    """
    if staged.skip or (balancer.nonfinite == "skip" and staged.is_invalid()):
        return True
    if staged.scaling is not None:
        staged.scaling.check_unscaled(stepping, balancer.optimizer)
        return False  # GradScaler has already checked
    if _all_grads_are_finite(balancer, staged):
        return False
    if balancer.nonfinite == "raise":
        raise nonfinite_grad_error(staged.present)
    return True


def _all_grads_are_finite(balancer: Balancer, staged: Staged) -> bool:
    """Whether all of ``.grad`` on the CPU is finite, on any rank."""
    params, ranks = balancer.params, balancer.ranks
    if not is_distributed():
        return grads_are_finite([p.grad for p in params if p.grad is not None])
    if not any(param.is_cpu for param in params):  # the same on all ranks
        return True
    whole = all(map(is_whole, params))
    if not whole and ranks is None:  # ranks that know nothing of each other may disagree
        params = [param for param in params if is_whole(param)]
    finite = grads_are_finite([local_part(p.grad) for p in params if p.grad is not None])
    if whole or ranks is None:
        return finite
    return ranks.are_all(finite, staged.coefficients.device)


# ------------------------------------------------------------ the losses after a step


def observe(balancer: Balancer, losses: Mapping[str, Tensor]) -> None:
    """Pass the losses of the same batch after a committed step to the method."""
    record, expected = balancer.record, balancer.record.awaiting
    if expected is None:
        record.check_stepped()
        return
    _observe(balancer, partial(_read_observed, balancer, losses, expected))


def _reevaluate(balancer: Balancer, reevaluations: Sequence[Reevaluation]) -> None:
    """Evaluate the batch again after a committed step, and pass its losses to the method."""
    record, expected = balancer.record, balancer.record.awaiting
    assert expected is not None
    # The step is taken. If the method kept waiting for its losses after an error, no later step
    # would be allowed.
    record.awaiting = None
    ranks, device = balancer.ranks, balancer.device
    agree = None if ranks is None else partial(ranks.are_all, device=device)
    try:
        _observe(
            balancer,
            lambda: _read_observed(balancer, repeat_all(reevaluations, agree), expected),
        )
    except BaseException as error:
        add_note(
            error,
            "The step was taken. This happened when the losses were evaluated again after it; "
            f"{balancer.method} goes on without them.",
        )
        raise


def _read_observed(
    balancer: Balancer, losses: Mapping[str, Tensor], expected: Sequence[str]
) -> Given:
    return Given(read_observed_losses(losses, balancer.record.names, expected))


def _observe(balancer: Balancer, read: Callable[[], Given]) -> None:
    """Read the losses after a step, and update the method's state.

    Args:
        balancer: Of the BalancedOptimizer.
        read: Returns the validated losses. If it raises, nothing changes.
    """
    given, _, values = balancer.read(read, "observe")
    record = balancer.record
    try:
        _update(balancer, Statistics(tuple(given.losses), values, step=record.steps))
    except NonFiniteError:
        record.awaiting = None  # no other values will come of this step
        if balancer.nonfinite == "raise":
            raise
    record.awaiting = None


def _update(balancer: Balancer, statistics: Statistics) -> None:
    """Replace the state by the one that follows from the losses after the step."""
    record = balancer.record
    names, state = record.names, record.state
    assert names is not None and state is not None
    needs = balancer.weighting.needs(record.steps - 1)
    statistics, flags = balancer.measure(statistics, None, scaled=False, needs=needs)
    valid = flags.are_clear()
    if valid is not None:
        statistics = balancer.mask(statistics, flags, valid, scaled=False, needs=needs)
    weighting, present = balancer.weighting, statistics.names
    device, satisfied = statistics.losses.device, flags.satisfied
    if record.satisfied is not None:
        # The method has not seen their losses before the step.
        satisfied = unite(satisfied, among_present(record.satisfied, names, present, device))
    following = observe_losses(weighting, statistics, satisfied, names, state, needs)
    record.state = select_state(valid, following, state)
