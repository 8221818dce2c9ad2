"""BalancedOptimizer: a torch optimizer that takes a dict of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moo_balance.arguments import check_arguments, measured_params
from moo_balance.door import check_attached, check_losses, check_same, loss_vector
from moo_balance.engine import Engine, Linearization, PerLoss, Problem
from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.ledger import Ledger, Staged
from moo_balance.monitor import Balance
from moo_balance.proxy import OptimizerProxy
from moo_balance.reevaluation import Replay
from moo_balance.screening import faulty_gradients, faulty_losses
from moo_balance.weighting.base import Statistics, Weighting, state_dtype

Losses = Mapping[str, Tensor]
Closure = Callable[[], Losses]


class BalancedOptimizer(OptimizerProxy):
    r"""Wrap a ``torch.optim`` optimizer so that it descends on several losses at once.

    .. math:: \texttt{.grad} \mathrel{+}= \sum_k c_k \nabla L_k

    with coefficients :math:`c` from the `weighting`, after which the wrapped optimizer takes its
    own step. It *is* an ``Optimizer``: ``param_groups``, ``state`` and ``defaults`` are those of
    the wrapped one, and schedulers, clipping and ``GradScaler`` take it for one.

    Three ways to use it::

        optimizer.zero_grad()                    # in place of sum(losses.values()).backward()
        optimizer.backward(losses)
        optimizer.step()

        optimizer.step(closure)                  # the closure returns the losses, the step does
                                                 # zero_grad, backward, and all else

        optimizer.combine(losses).backward()     # one scalar, for trainers that call backward
        optimizer.step()

    ``backward`` stages what it learned and ``step`` commits it: a step that is skipped, or raises,
    leaves the balance as it was.

    Args:
        optimizer: Any ``torch.optim`` optimizer but ``LBFGS``.
        weighting: The method, such as ``FAMO()`` or ``MGDA()``. Its docstring says what the
            coefficients sum to; ``Sum()`` gives K ones, the log methods' sum to 1.
        params: Parameters, or a module, over which inner products of gradients are taken, for
            example those that all losses share. Every parameter of the optimizer receives its
            gradient in any case. Default: all of them.
        engine: How gradients are taken. Default: ``PerLoss()``.
        names: Names of all losses, if the first call will not have them all.
        nonfinite: What to do about a loss or gradient that is not finite: ``"raise"`` (default) or
            ``"skip"``, which takes no step and counts it. On an accelerator nothing waits for the
            check: the balance keeps its state, and ``log_dict`` reports.

    Raises:
        BalanceValueError: An argument does not fit.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, MGDA
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), MGDA())
        >>> optimizer.zero_grad()
        >>> losses = optimizer.backward({"a": 0.5 * w[0] ** 2, "b": 2 * w[1] ** 2})
        >>> optimizer.step()
        >>> {name: round(float(weight), 3) for name, weight in optimizer.balance.weights.items()}
        {'a': 0.941, 'b': 0.059}
    """

    # All that changes lives in the ledger: a framework's stand-in for the optimizer (Lightning)
    # shares these attributes, but not assignments made to them later.
    _kept = ("_wrapped", "_engine", "_nonfinite", "_measured", "_ledger")

    def __init__(
        self,
        optimizer: Optimizer,
        weighting: Weighting,
        *,
        params: Iterable[Tensor] | nn.Module | None = None,
        engine: Engine | None = None,
        names: Sequence[str] | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_arguments(optimizer, weighting, engine, names, nonfinite)
        super().__init__(optimizer)
        self._engine = PerLoss() if engine is None else engine
        self._nonfinite = nonfinite
        self._measured = measured_params(params, optimizer)
        self._ledger = Ledger(weighting, None if names is None else tuple(names))
        if names is not None:
            weighting.init(names, torch.device("cpu"))  # does it fit these names?

    # ------------------------------------------------------------------ gradients

    def backward(
        self,
        losses: Losses | Closure,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
    ) -> Losses:
        """Add the balanced gradient to ``.grad``, in place of ``sum(losses.values()).backward()``.

        Args:
            losses: Scalar tensors by name. The first call declares the names; later a loss may be
                absent, and the others are balanced among themselves. Or a closure that computes
                them: then ``step`` can evaluate it again for a method that watches the step.
            grad_scaler: The scaler of mixed-precision training. Gradients are written scaled, as
                ``scaler.scale(loss).backward()`` would; weights come from unscaled figures.
            retain_graph: Keep the graph for another backward pass.

        Returns:
            The losses.

        Raises:
            BalanceValueError: A loss is not a scalar, detached, not finite, not above its bound or
                of an unknown name. Nothing has changed.
            BalanceError: The method should have seen the losses after the last step and did not.
        """
        replay = None
        if callable(losses):
            replay = Replay(losses, self._devices())
            losses = cast(Losses, replay.first())
        self._balance(losses, replay, _scale(grad_scaler), retain_graph)
        return losses

    def combine(self, losses: Losses, *, grad_scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """One differentiable scalar whose gradient is the balanced gradient.

        For trainers that call ``backward`` themselves. A method with a Gramian differentiates each
        loss once here and the sum once more there. Arguments and errors as for :meth:`backward`.

        Example:
            >>> import torch
            >>> from moo_balance import BalancedOptimizer, SumLog
            >>> w = torch.nn.Parameter(torch.tensor(2.0))
            >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), SumLog())
            >>> optimizer.combine({"a": w, "b": w**2}).backward()
            >>> round(float(w.grad), 4)
            2.0
        """
        linearization, coefficients = self._weigh(
            losses, _scale(grad_scaler), retain_graph=True, combined=True
        )
        if coefficients is None:  # the step will be skipped whatever this scalar is
            coefficients = torch.zeros(len(losses))
        return linearization.combined(coefficients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them what ``backward`` has staged."""
        self._wrapped.zero_grad(set_to_none)
        staged = self._ledger.staged
        if staged is not None and not staged.combined:
            self._ledger.staged = None

    # ------------------------------------------------------------------ steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, and commit what ``backward`` staged.

        Args:
            closure: Computes and returns the losses by name, and nothing else: the step clears
                gradients, calls :meth:`backward`, steps, and evaluates the closure again, with
                the same random numbers, for a method that watches the step. To clip gradients in
                between, give the closure to :meth:`backward` instead. A closure that returns
                something else is taken for a trainer's own, which has called ``combine`` and
                ``backward``.

        Returns:
            What the closure returned at first; without one, what the wrapped step returns.

        Raises:
            BalanceError: Nothing was staged: ``backward`` or ``combine`` comes first.
        """
        result = None if closure is None else self._run(closure)
        ledger, staged = self._ledger, self._ledger.staged
        if staged is None:
            return self._unbalanced_step(closure, result)
        if staged.skip or (
            self._nonfinite == "skip" and staged.valid is not None and not staged.valid
        ):
            ledger.drop()
            return result
        output = self._wrapped.step()
        ledger.commit()
        if staged.replay is not None and ledger.awaiting is not None:
            self.observe(staged.replay.again())
        return output if closure is None else result

    def observe(self, losses: Losses) -> None:
        """Show the losses of the same batch after the step, to a method that watches it.

        For loops that evaluate again themselves. In between two watched steps (``every``), or for
        a method that does not watch, there is nothing to show and this does nothing.

        Args:
            losses: The losses of the last ``backward``, all of them, evaluated again.

        Raises:
            BalanceValueError: Other losses than those of the last ``backward``, or bad values.
            BalanceError: Called before ``step``.
        """
        ledger = self._ledger
        if ledger.awaiting is None:
            if ledger.names is None or ledger.staged is not None:
                raise BalanceError(
                    "`observe` should follow `step`. Found no step that was taken since the last "
                    "`backward`. Call `step` first."
                )
            return
        present = check_losses(losses, ledger.names)
        check_same(present, ledger.awaiting)
        statistics = self._statistics(present)
        try:
            ledger.observe(statistics, self._faulty_losses(statistics))
        except BalanceValueError as error:
            # The step is behind us. To keep waiting would block the next one for good.
            ledger.awaiting = None
            if self._nonfinite == "raise" or not isinstance(error, NonFiniteError):
                raise

    # ------------------------------------------------------------------ what to look at

    @property
    def balance(self) -> Balance:
        """Losses, weights, coefficients, Gramian and cosines of the last ``backward``."""
        return self._ledger.balance

    def log_dict(self, prefix: str = "moo/") -> dict[str, float]:
        """The figures of :attr:`balance` as a flat dict of floats, for any logger.

        Keys are ``loss/a``, ``weight/a``, ``coefficient/a``, ``cosine/a,b`` and ``skipped`` behind
        the prefix. This is where the host waits for the device.

        Raises:
            BalanceError: On an accelerator with ``nonfinite="raise"``, when a loss was not finite.
        """
        figures = self.balance.as_floats()
        figures["skipped"] = float(self._ledger.skipped)
        if self._nonfinite == "raise":
            self._ledger.check_faults()
        return {prefix + key: value for key, value in figures.items()}

    @property
    def weighting(self) -> Weighting:
        """The method."""
        return self._ledger.weighting

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with one more entry, ``"balance"``.

        The entry holds tensors and primitives only (loads with ``weights_only=True``); a plain
        optimizer that loads the dict passes it over.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = {**self._wrapped.state_dict(), "balance": self._ledger.state_dict()}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a plain optimizer's: the balance then starts afresh.

        Raises:
            BalanceValueError: The ``"balance"`` entry belongs to another method, other losses or
                another version. Nothing has changed.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = before(self, state) or state
        saved = state.pop("balance", None)
        if saved is not None:
            self._ledger.checked(saved, self._device())
        self._wrapped.load_state_dict(state)
        if saved is None:
            self._ledger.reset()
        else:
            self._ledger.load_state_dict(saved, self._device())
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weighting}, {self._wrapped})"

    # ------------------------------------------------------------------ the inside

    def _run(self, closure: Callable[[], Any]) -> Any:
        """Evaluate a closure of `step`; if it returns losses, balance them."""
        replay = Replay(closure, self._devices())
        result = replay.first()
        if isinstance(result, Mapping):
            if self._ledger.staged is not None:
                raise BalanceError(
                    "A closure given to `step` should only compute the losses. Found gradients "
                    "that `backward` or `combine` has made already. Give the closure to "
                    "`backward` and call `step()` without it, or leave `backward` to `step`."
                )
            self.zero_grad()
            self._balance(result, replay)
        return result

    def _balance(
        self,
        losses: Losses,
        replay: Replay | None = None,
        scale: Tensor | None = None,
        retain_graph: bool = False,
    ) -> None:
        linearization, coefficients = self._weigh(losses, scale, retain_graph, replay=replay)
        if coefficients is not None:
            linearization.accumulate(coefficients)

    def _weigh(
        self, losses: Losses, scale: Tensor | None, retain_graph: bool, **staged: Any
    ) -> tuple[Linearization, Tensor | None]:
        """Stage a step. Its coefficients, or None where it is to be skipped."""
        ledger = self._ledger
        ledger.check_observed()
        present = check_losses(losses, ledger.names)
        check_attached(present)
        problem = Problem(
            tuple(present.values()), self._params(), self._measured_ids(), scale, retain_graph
        )
        linearization = self._engine.linearize(problem)
        statistics = self._statistics(present)
        names, state = ledger.opening(statistics.names, statistics.losses.device)
        try:
            statistics, faults = self._evidence(statistics, linearization, scale is not None)
        except NonFiniteError:
            if self._nonfinite == "raise":
                raise
            ledger.staged = Staged(names, statistics.names, state, skip=True)
            return linearization, None
        draft = ledger.draft(statistics, names, state, faults)
        coefficients = draft.weighted.coefficients
        if draft.staged.valid is not None:
            # A loss scaler looks for NaN and skips the step; zero harms nobody else.
            nothing = math.nan if scale is not None else 0.0
            coefficients = torch.where(draft.staged.valid, coefficients, nothing)
        ledger.staged = replace(draft.staged, **staged)
        ledger.balance.record(statistics, draft.weighted.weights, coefficients)
        return linearization, coefficients

    def _evidence(
        self, statistics: Statistics, linearization: Linearization, scaled: bool
    ) -> tuple[Statistics, Tensor | None]:
        """Losses, and the Gramian if it is due; with flags [K] of what is faulty among them."""
        faults = self._faulty_losses(statistics)
        if not (self.weighting.uses_gramian and self._ledger.due):
            return statistics, faults
        statistics = replace(statistics, gramian=linearization.gramian())
        also = faulty_gradients(statistics, scaled)
        both = faults if also is None else also if faults is None else faults | also
        return statistics, both

    def _statistics(self, present: Mapping[str, Tensor]) -> Statistics:
        values = loss_vector(present, state_dtype(next(iter(present.values())).device))
        return Statistics(tuple(present), values, step=self._ledger.steps)

    def _faulty_losses(self, statistics: Statistics) -> Tensor | None:
        bounds = self.weighting.lower_bounds(statistics.names)
        return faulty_losses(statistics, bounds, type(self.weighting).__name__)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _measured_ids(self) -> frozenset[int] | None:
        return None if self._measured is None else frozenset(map(id, self._measured))

    def _devices(self) -> set[torch.device]:
        return {p.device for group in self.param_groups for p in group["params"]}

    def _device(self) -> torch.device:
        return next((p.device for p in self._params()), torch.device("cpu"))

    def _unbalanced_step(self, closure: Callable[[], Any] | None, result: Any) -> Any:
        """A step with nothing staged: an error, but for two cases that cannot do harm."""
        if (
            closure is not None
            and result is None
            and not any(p.grad is not None for p in self._params())
        ):
            return None  # a trainer that left out this batch
        if all(float(group.get("lr", 1.0)) == 0.0 for group in self.param_groups):
            return self._wrapped.step()  # torch.distributed.checkpoint makes up a fresh state so
        raise BalanceError(
            "`step` should follow `backward` or `combine`. Found neither since the last step. Call "
            "`optimizer.backward(losses)` in place of `loss.backward()`."
        )


def _scale(grad_scaler: torch.amp.GradScaler | None) -> Tensor | None:
    """The factor a scaler applies to losses, or None for one that is absent or disabled."""
    if grad_scaler is None or not grad_scaler.is_enabled():
        return None
    return grad_scaler.scale(torch.ones(()))
