"""BalancedOptimizer: a torch optimizer that takes a dict of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from moo_balance.arguments import check_arguments, measured_params
from moo_balance.balancer import Balancer, Features
from moo_balance.checkpoint import BalanceState
from moo_balance.engine import Engine, PerLoss
from moo_balance.errors import BalanceError
from moo_balance.ledger import Ledger
from moo_balance.monitor import StepMetrics
from moo_balance.proxy import OptimizerProxy, with_own_hooks
from moo_balance.reevaluation import Replay, evaluated, summed
from moo_balance.scaler import (
    check_one_scale,
    check_ready_to_scale,
    check_scaled,
    check_unscaled,
    loss_scale,
)
from moo_balance.weighting.base import Weighting

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

        optimizer.combined_loss(losses).backward()     # one scalar, for trainers that call backward
        optimizer.step()

    ``backward`` stages what it learned and ``step`` commits it: a step that is skipped, or raises,
    leaves the balance as it was.

    Args:
        optimizer: Any ``torch.optim`` optimizer but ``LBFGS``.
        weighting: The method, such as ``FAMO()`` or ``MGDA()``. Its docstring says what the
            coefficients sum to; ``Sum()`` gives K ones, the log methods' sum to 1.
        shared_params: Parameters, or a module, over which inner products of gradients are taken, for
            example those that all losses share. Every parameter of the optimizer receives its
            gradient in any case. Default: all of them.
        engine: How gradients are taken. Default: ``PerLoss()``.
        loss_names: Names of all losses, if the first call will not have them all.
        nonfinite: What to do about a loss or gradient that is not finite: ``"raise"`` (default) or
            ``"skip"``, which takes no step and counts it. On an accelerator nothing waits for the
            check: the balance keeps its state, and ``log_dict`` reports.
        process_group: The ranks that see different data and share a model: losses are averaged
            over them, and the gradients that weights come from. Default ``"auto"``: all ranks once
            ``torch.distributed`` is initialised. None if each rank trains a model of its own.
        check_ranks_every: Compare parameters and balance over the ranks after each of the first three
            steps and every so many; 0 for never. Default 1000.

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
        >>> {name: round(float(weight), 3) for name, weight in optimizer.metrics.weights.items()}
        {'a': 0.941, 'b': 0.059}
    """

    _kept = ("_wrapped", "_balancer", "_drift_every")

    def __init__(
        self,
        optimizer: Optimizer,
        weighting: Weighting,
        *,
        shared_params: Iterable[Tensor] | nn.Module | None = None,
        engine: Engine | None = None,
        loss_names: Sequence[str] | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
        process_group: Any = "auto",
        check_ranks_every: int = 1000,
    ) -> None:
        check_arguments(
            optimizer, weighting, engine, loss_names, nonfinite, check_ranks_every, process_group
        )
        super().__init__(optimizer)
        self._drift_every = check_ranks_every
        self._balancer = Balancer(
            optimizer=optimizer,
            engine=PerLoss() if engine is None else engine,
            ledger=Ledger(weighting, None if loss_names is None else tuple(loss_names)),
            measured=measured_params(shared_params, optimizer),
            nonfinite=nonfinite,
            process_group=process_group,
        )
        if loss_names is not None:
            weighting.init(loss_names, torch.device("cpu"))  # does it fit these names?

    # ------------------------------------------------------------------ gradients

    def backward(
        self,
        losses: Losses | Closure,
        *,
        grad_scaler: GradScaler | None = None,
        retain_graph: bool = False,
        features: Features | Callable[[], Features] = None,
    ) -> Losses:
        """Add the balanced gradient to ``.grad``, in place of ``sum(losses.values()).backward()``.

        Args:
            losses: Scalar tensors by name. The first call declares the names; later a loss may be
                absent, and the others are balanced among themselves. Or a closure that computes
                them: then ``step`` can evaluate it again for a method that watches the step.
            grad_scaler: The scaler of mixed-precision training. Gradients are written scaled, as
                ``scaler.scale(loss).backward()`` would; weights come from unscaled figures.
            retain_graph: Keep the graph for another backward pass.
            features: What all losses are computed from: the output of the shared part of the
                model, one tensor or several, or a function that returns them, called after
                `losses`. A Gramian is then taken of the gradients with respect to them, which
                costs one pass through each head and a single one through the shared part. It is
                a different quantity: its min-norm point minimises an upper bound of the one over
                parameters (Sener & Koltun's MGDA-UB), and is Pareto-stationary where that is as
                long as the shared part can move its features in every direction.

        Returns:
            The losses.

        Raises:
            BalanceValueError: A loss is not a scalar, detached, not finite, not above its bound or
                of an unknown name. Nothing has changed.
            BalanceError: The method should have seen the losses after the last step and did not;
                or ranks disagree about their losses.
        """
        ledger = self._balancer.ledger
        check_ready_to_scale(grad_scaler, self)
        check_one_scale(grad_scaler, ledger.accumulation or ledger.staged)
        replays: list[Replay] = []
        if callable(losses):
            replays = self._replays(losses)
            losses = cast(Losses, evaluated(losses))
        batch = self._balancer.admit(
            losses,
            loss_scale(grad_scaler),
            retain_graph=retain_graph,
            features=features() if callable(features) else features,
        )
        if ledger.accumulating:
            self._balancer.gather(batch, replays, grad_scaler)
        else:
            self._balancer.balance(batch, replays, grad_scaler)
        return losses

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gather micro-batches: inside, ``backward`` adds to a window that the next one closes.

        ::

            for micro_batch in micro_batches[:-1]:
                with optimizer.accumulate():
                    optimizer.backward(losses(micro_batch))
            optimizer.backward(losses(micro_batches[-1]))
            optimizer.step()

        is the same as one batch whose losses are the sums over the window; divide each by the
        number of micro-batches, as for a plain optimizer, if they are means.

        Memory: the window keeps K gradients, K·P numbers, until it is closed, because weights that
        depend on losses or gradients are known at the end only. ``Sum``, ``FixedWeights``,
        ``RandomWeights`` and ``OnlineTchebycheff`` know theirs beforehand and need no more than a
        plain loop does.
        """
        ledger = self._balancer.ledger
        outer, ledger.accumulating = ledger.accumulating, True
        try:
            yield
        finally:
            ledger.accumulating = outer

    def combined_loss(
        self,
        losses: Losses,
        *,
        grad_scaler: GradScaler | None = None,
        features: Features = None,
    ) -> Tensor:
        """One differentiable scalar whose gradient is the balanced gradient.

        For trainers that call ``backward`` themselves. A method with a Gramian differentiates each
        loss here, and ``backward`` hands over the result. Each call balances a batch by itself;
        under a trainer's own gradient accumulation the last one is committed. Arguments and errors
        as for :meth:`backward`; the scalar itself is not scaled.

        Example:
            >>> import torch
            >>> from moo_balance import BalancedOptimizer, SumLog
            >>> w = torch.nn.Parameter(torch.tensor(2.0))
            >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), SumLog())
            >>> optimizer.combined_loss({"a": w, "b": w**2}).backward()
            >>> round(float(w.grad), 4)
            2.0
        """
        batch = self._balancer.admit(losses, loss_scale(grad_scaler), features=features)
        return self._balancer.combine(batch)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them what ``backward`` has gathered and staged."""
        self._wrapped.zero_grad(set_to_none)
        self._balancer.ledger.discard_gradients()

    # ------------------------------------------------------------------ steps

    @with_own_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, and commit what ``backward`` staged.

        Args:
            closure: Computes and returns the losses by name, and nothing else: the step clears
                gradients, calls :meth:`backward`, steps, and evaluates the closure again, with
                the same random numbers, for a method that watches the step. To clip gradients in
                between, give the closure to :meth:`backward` instead. A closure that returns
                something else is taken for a trainer's own, which has called ``combined_loss`` and
                ``backward``.

        Returns:
            What the closure returned at first; without one, what the wrapped step returns.

        Raises:
            BalanceError: Nothing was staged: ``backward`` or ``combined_loss`` comes first. Or ranks
                have drifted apart.
            NonFiniteError: A gradient is not finite. Looked at on the host only, not of shards.
        """
        result = None if closure is None else self._run(closure)
        ledger = self._balancer.ledger
        ledger.check_closed()
        staged = ledger.staged
        if staged is None:
            return self._unbalanced_step(closure, result)
        if staged.skip or (self._balancer.nonfinite == "skip" and staged.is_invalid()):
            ledger.drop()
            return result
        check_unscaled(staged.scaler, self, self._wrapped)
        if self._balancer.is_spoiled(staged):
            ledger.drop()
            return result
        output = self._wrapped.step()
        ledger.commit()
        if staged.replays and ledger.awaiting is not None:
            self.observe(summed(replay.again() for replay in staged.replays))
        self._balancer.check_drift(self._drift_every)
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
        self._balancer.observe(losses)

    # ------------------------------------------------------------------ what to look at

    @property
    def metrics(self) -> StepMetrics:
        """Losses, weights, coefficients, Gramian and cosines of the last ``backward``."""
        return self._balancer.ledger.metrics

    def log_dict(self, prefix: str = "moo/") -> dict[str, float]:
        """The figures of :attr:`metrics` as a flat dict of floats, for any logger.

        Keys are ``loss/a``, ``weight/a``, ``coefficient/a``, ``cosine/a,b`` and ``skipped`` behind
        the prefix. This is where the host waits for the device.

        Raises:
            NonFiniteError: On an accelerator with ``nonfinite="raise"``: a loss was not finite.
        """
        ledger = self._balancer.ledger
        figures = {**self.metrics.as_floats(), "skipped": float(ledger.skipped)}
        if self._balancer.nonfinite == "raise":
            ledger.check_faults()
        return {prefix + key: value for key, value in figures.items()}

    @property
    def weighting(self) -> Weighting:
        """The method."""
        return self._balancer.weighting

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with one more entry, ``"balance"``.

        The entry holds tensors and primitives only (loads with ``weights_only=True``); a plain
        optimizer that loads the dict passes it over.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = {**self._wrapped.state_dict(), "balance": self._balancer.ledger.state_dict()}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a plain optimizer's, which has nothing to balance.

        Raises:
            BalanceValueError: The ``"balance"`` entry belongs to another method, other losses or
                another version. Nothing has changed.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = before(self, state) or state
        saved, ledger = state.pop("balance", None), self._balancer.ledger
        if saved is not None:
            ledger.checked(saved, self._balancer.device)
        self._wrapped.load_state_dict(state)
        if saved is not None:
            ledger.load_state_dict(saved, self._balancer.device)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def balance_state(self) -> BalanceState:
        """The balance alone, as a ``Stateful`` for ``torch.distributed.checkpoint``.

        ``get_optimizer_state_dict`` keeps nothing but the wrapped optimizer's state; save this
        beside it. It is the same on all ranks, and loads on any number of them.
        """
        return BalanceState(self._balancer.ledger, self._balancer.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weighting}, {self._wrapped})"

    # ------------------------------------------------------------------ the inside

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """No, it does not. Only ``GradScaler.step`` asks: here it shows that a scale is missing."""
        check_scaled(self._balancer.ledger.staged)
        return False

    def _run(self, closure: Callable[[], Any]) -> Any:
        """Evaluate a closure of `step`; if it returns losses, balance them."""
        replays = self._replays(closure)
        result = evaluated(closure)
        if isinstance(result, Mapping):
            self._balancer.ledger.check_untouched()
            batch = self._balancer.admit(result)
            self.zero_grad()
            self._balancer.balance(batch, replays)
        return result

    def _replays(self, closure: Callable[[], Any]) -> list[Replay]:
        """What it takes to evaluate a closure again, for a method that will ask for it."""
        if not self._balancer.ledger.watches:
            return []
        return [Replay(closure, {p.device for p in self._balancer.params})]

    def _unbalanced_step(self, closure: Callable[[], Any] | None, result: Any) -> Any:
        """A step with nothing staged: an error, but for two cases that cannot do harm."""
        params = self._balancer.params
        if closure is not None and result is None and all(p.grad is None for p in params):
            return None  # a trainer that leaves out this batch
        if all(float(group.get("lr", 1.0)) == 0.0 for group in self.param_groups):
            return self._wrapped.step()  # how torch.distributed.checkpoint makes up a fresh state
        raise BalanceError(
            "`step` should follow `backward` or `combined_loss`. Found neither since the last step. Call "
            "`optimizer.backward(losses)` in place of `loss.backward()`, and the last micro-batch "
            "of a window outside of `accumulate()`."
        )
