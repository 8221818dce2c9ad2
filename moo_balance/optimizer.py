"""BalancedOptimizer: a torch optimizer that takes a dict of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from moo_balance._balancer import Balancer, Closure, Features, Losses
from moo_balance._checkpoint import BalanceState
from moo_balance._description import describe_optimizer
from moo_balance._grad_scaler import read_scaling
from moo_balance._record import Record
from moo_balance._several import parts_of
from moo_balance._stepping import observe, take_step
from moo_balance._torch_internals import mark_as_hooked
from moo_balance._two_step import (
    check_steps,
    single_step_error,
    take_first_step,
    take_second_step,
)
from moo_balance._validation import (
    check_loss_names,
    check_method,
    check_options,
    read_engine,
    read_optimizer,
    read_shared_params,
)
from moo_balance._wrapper import OptimizerWrapper
from moo_balance.engine import Engine
from moo_balance.errors import BalanceValueError
from moo_balance.monitor import StepMetrics
from moo_balance.weighting.base import Weighting


class BalancedOptimizer(OptimizerWrapper):
    r"""Wrap a ``torch.optim`` optimizer so that it descends on several losses at once.

    .. math:: \texttt{.grad} \mathrel{+}= \sum_k c_k \nabla L_k

    with coefficients :math:`c` from the `weighting`, after which the wrapped optimizer takes its
    own step. It *is* an ``Optimizer``: ``param_groups``, ``state`` and ``defaults`` are those of
    the wrapped one, and schedulers, clipping and ``GradScaler`` accept it as one. Whatever else is
    public on the wrapped one is reachable here, too, such as ``train()`` and ``eval()`` of
    schedule-free optimizers.

    Three ways to use it::

        optimizer.zero_grad()                    # in place of sum(losses.values()).backward()
        optimizer.backward(losses)
        optimizer.step()

        optimizer.step(closure)                  # the closure returns a dict of losses; the step
                                                 # runs zero_grad and backward, too

        optimizer.combined_loss(losses).backward()   # a scalar, for trainers that call backward
        optimizer.step()

    An optimizer that takes two gradients for one step, such as SAM, has ``first_step`` and
    ``second_step`` in place of ``step``. ``backward`` comes before each, and the second is the one
    that counts: the losses and weights of the first are not kept. A method that needs the losses
    after the step does not fit; its lagged form does::

        optimizer.backward(model(batch))
        optimizer.first_step(zero_grad=True)
        optimizer.backward(model(batch))
        optimizer.second_step(zero_grad=True)

    ``backward`` stages its result and ``step`` commits it: a step that is skipped, or raises,
    leaves the balance as it was.

    Args:
        optimizer: Any ``torch.optim`` optimizer but ``LBFGS``, or one of your own whose ``step``
            needs no closure. Or a list of several with different parameters, such as
            ``[muon, adamw]``: each takes its step, in order.
        weighting: The method, such as ``FAMO()`` or ``MGDA()``. Its docstring says what the
            coefficients sum to; ``Sum()`` gives K ones, the log methods' sum to 1.
        shared_params: Parameters, or a module, over which inner products of gradients are taken,
            for example those that all losses share. Every parameter of the optimizer receives its
            gradient in any case. Default: all of them.
        engine: How gradients are taken. Default: ``PerLoss()``.
        loss_names: Names of all losses, if the first step will not have them all.
        nonfinite: What to do about a loss or gradient that is not finite: ``"raise"`` (default) or
            ``"skip"``, which takes no step and counts it. On an accelerator the check does not
            synchronize: the balance keeps its state, and ``log_dict`` reports. With a
            ``grad_scaler`` gradients become NaN, and the scaler skips the step.
        max_skips: How many steps ``nonfinite="skip"`` may skip in a row; one more raises. A warning
            comes after 10. Default 100; None for any number.
        process_group: The ranks that see different data and share a model: losses are averaged
            over them, and the gradients that weights come from. Default ``"auto"``: all ranks once
            ``torch.distributed`` is initialised. None if each rank trains a model of its own.
        check_ranks_every: Compare parameters and balance over the ranks after each of the first
            three steps and after every so many; 0 for never. Default 1000.

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

    _pickled = ("_wrapped", "_balancer")

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        weighting: Weighting,
        *,
        shared_params: Iterable[Tensor] | nn.Module | None = None,
        engine: Engine | None = None,
        loss_names: Sequence[str] | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
        max_skips: int | None = 100,
        process_group: Any = "auto",
        check_ranks_every: int = 1000,
    ) -> None:
        optimizer = read_optimizer(optimizer)
        check_method(weighting, engine)
        check_loss_names(loss_names)
        check_options(nonfinite, max_skips, check_ranks_every, process_group)
        for part in parts_of(optimizer):
            check_steps(part, nonfinite, weighting)
        super().__init__(optimizer)
        self._balancer = Balancer(
            optimizer,
            weighting,
            read_engine(engine),
            read_shared_params(shared_params, optimizer),
            nonfinite,
            process_group,
            max_skips,
            check_ranks_every,
            Record(None if loss_names is None else tuple(loss_names)),
        )
        if loss_names is not None:
            weighting.init(loss_names, torch.device("cpu"))  # raises if its arguments name others

    # ------------------------------------------------------------ gradients

    def backward(
        self,
        losses: Losses | Closure,
        *,
        last: bool = True,
        grad_scaler: GradScaler | None = None,
        retain_graph: bool = False,
        features: Features | Callable[[], Features] = None,
    ) -> Losses:
        """Add the balanced gradient to ``.grad``, in place of ``sum(losses.values()).backward()``.

        Hooks of parameters see the balanced gradient, once. Hooks on their AccumulateGrad nodes do
        so, too, if they are registered before the first call that takes gradients of single losses
        (for a Gramian, or in a window), which looks for them; later ones do not run in such calls.
        With several ranks, sharded parameters or a reentrant checkpoint such a call refuses them.

        Args:
            losses: Scalar tensors by name. The first step declares the names; later a loss may be
                absent, and the others are balanced among themselves. Or a closure that computes
                them: then ``step`` can evaluate it again for a method that needs the losses after
                the step (see :meth:`step`).
            last: Whether the batch is a whole one, or the last micro-batch of a window. False adds
                it to the window, as within :meth:`accumulate`.
            grad_scaler: The scaler of mixed-precision training. Gradients are written scaled, as
                ``scaler.scale(loss).backward()`` would; weights come from unscaled values.
            retain_graph: Keep the graph for another backward pass.
            features: What all losses are computed from: the output of the shared part of the
                model, one tensor or several, or a function that returns them, called after
                `losses`. Then the Gramian is that of the gradients with respect to the features,
                which costs one pass through each head and a single one through the shared part.
                It is a different quantity: its min-norm point minimises an upper bound of the one
                over parameters (Sener & Koltun's MGDA-UB), and is Pareto-stationary where that is
                as long as the shared part can move its features in every direction.

        Returns:
            The losses.

        Raises:
            BalanceValueError: A loss is not a scalar, detached, not finite, below its bound or
                of an unknown name. Nothing has changed.
            BalanceError: The method needed the losses after the last step and did not get them;
                or ranks disagree about their losses.
        """
        scaling = None if grad_scaler is None else read_scaling(grad_scaler, self)
        if last:
            return self._balancer.backward(losses, scaling, retain_graph, features)
        with self.accumulate():
            return self._balancer.backward(losses, scaling, retain_graph, features)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate micro-batches: inside, ``backward`` adds to a window that the next one closes.

        ::

            for micro_batch in micro_batches[:-1]:
                with optimizer.accumulate():
                    optimizer.backward(losses(micro_batch))
            optimizer.backward(losses(micro_batches[-1]))
            optimizer.step()

        or, without a context manager, ::

            for k, micro_batch in enumerate(micro_batches, 1):
                optimizer.backward(losses(micro_batch), last=k == len(micro_batches))
            optimizer.step()

        is the same as one batch whose losses are the sums over the window; divide each by the
        number of micro-batches, as for a plain optimizer, if they are means.

        Memory: the window keeps K gradients, K·P elements, until it is closed, because weights
        that depend on losses or gradients are known only then. ``Sum``, ``FixedWeights``,
        ``RandomWeights`` and ``OnlineTchebycheff`` know theirs beforehand and need no more than a
        plain loop does, unless, in a single process, parameters have hooks, which see the sum.

        Which parameters train may change within a window: a gradient stays with its parameter, also
        if that is frozen later. Clearing gradients, here or by ``model.zero_grad()``, discards the
        window. To notice that, one parameter without a gradient has one of almost zero meanwhile.
        """
        record = self._balancer.record
        outer, record.accumulating = record.accumulating, True
        try:
            yield
        finally:
            record.accumulating = outer

    def combined_loss(
        self,
        losses: Losses,
        *,
        grad_scaler: GradScaler | None = None,
        features: Features = None,
    ) -> Tensor:
        """One differentiable scalar whose gradient is the balanced gradient.

        For trainers that call ``backward`` themselves. A method with a Gramian differentiates each
        loss here; ``backward`` of the scalar then only writes the result. Each call balances one
        batch; under a trainer's own gradient accumulation the last one is committed. Arguments and
        errors as for :meth:`backward`. With `grad_scaler`, the scalar itself is not scaled: call
        ``scaler.scale(optimizer.combined_loss(losses, grad_scaler=scaler)).backward()``.

        With a Gramian, the scalar can be differentiated once: ``create_graph=True`` is refused. On
        several ranks its ``backward`` writes the average to ``.grad``, and nothing flows through
        the graph, so that ``torch.autograd.grad`` of the scalar finds no parameters.

        Example:
            >>> import torch
            >>> from moo_balance import BalancedOptimizer, SumLog
            >>> w = torch.nn.Parameter(torch.tensor(2.0))
            >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), SumLog())
            >>> optimizer.combined_loss({"a": w, "b": w**2}).backward()
            >>> round(float(w.grad), 4)
            2.0
        """
        scaling = None if grad_scaler is None else read_scaling(grad_scaler, self)
        return self._balancer.combined_loss(losses, scaling, features)

    def weighted_losses(
        self,
        losses: Losses,
        *,
        grad_scaler: GradScaler | None = None,
        features: Features = None,
    ) -> dict[str, Tensor]:
        r"""The losses multiplied by their coefficients, for trainers that sum a dict themselves.

        .. math:: \{k: c_k L_k\}, \qquad
            \nabla \sum_k c_k L_k = \sum_k c_k \nabla L_k

        The coefficients are constants, and each entry keeps the graph of its loss: the sum of all
        of them, and nothing else, should be differentiated before ``step``. It has the gradient of
        :meth:`combined_loss`, with one difference in cost: a method with a Gramian differentiates
        each loss here and keeps the graph, so that ``backward`` of the sum is one more pass. The
        step is staged as by :meth:`combined_loss`; arguments as there.

        In one process only: on several ranks the trainer's own pass would have to average.

        Returns:
            A scalar with a graph for each loss, in declared order.

        Raises:
            BalanceValueError: As :meth:`backward`. And where the direction of the method is no
                combination of the gradients (``GradDrop``, ``TrimmedMean``, ``MoCo``,
                ``SeparateMoments``).
            BalanceError: There are several ranks, or micro-batches are accumulated.

        Example:
            >>> import torch
            >>> from moo_balance import MGDA, BalancedOptimizer
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), MGDA())
            >>> weighted = optimizer.weighted_losses({"a": w[0], "b": 2 * w[1]})
            >>> {name: round(loss.item(), 3) for name, loss in weighted.items()}
            {'a': 0.8, 'b': 0.4}
            >>> sum(weighted.values()).backward()
            >>> optimizer.step()
        """
        scaling = None if grad_scaler is None else read_scaling(grad_scaler, self)
        return self._balancer.weighted_losses(losses, scaling, features)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them the open window and the staged step."""
        self._balancer.record.discard_gradients()
        self._wrapped.zero_grad(set_to_none)

    # ------------------------------------------------------------ steps

    @mark_as_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, and commit what ``backward`` staged.

        Args:
            closure: Computes and returns a *dict* of losses by name, where that of a plain
                optimizer returns one scalar, and does nothing else: the step clears gradients,
                calls :meth:`backward`, steps, and evaluates the closure again for a method that
                needs the losses after the step. That evaluation has the same random numbers, and
                starts from the same running statistics; what it writes is put back. To clip
                gradients in between, give the closure to :meth:`backward` instead. A closure that
                returns something else is taken for a trainer's own, which has called
                ``combined_loss`` and ``backward``.

        Returns:
            What the closure returned at first; without one, what the wrapped step returns.

        Raises:
            BalanceError: Nothing was staged: ``backward`` or ``combined_loss`` comes first. Or
                ranks have drifted apart.
            BalanceValueError: The closure is no function, or returns no losses by name where none
                were balanced before.
            NonFiniteError: A gradient is not finite, on any rank; checked on the CPU only. Or more
                than ``max_skips`` steps were skipped in a row.
            Exception: Whatever the closure raises. If it does so in the second evaluation, the step
                is taken; a note says so, and the method goes on without these losses.
        """
        if self._balancer.two_steps:
            raise single_step_error(self._wrapped)
        if any(self._step_hooks):
            arguments = {} if closure is None else {"closure": closure}
            return self._step_with_hooks(partial(take_step, self._balancer, self), **arguments)
        return take_step(self._balancer, self, closure)

    def __getattr__(self, name: str) -> Any:
        forwarded = super().__getattr__(name)
        if name in ("first_step", "second_step") and self._balancer.two_steps:
            return partial(getattr(self, f"_{name}"), forwarded)
        return forwarded

    def _first_step(self, first_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Move the parameters to where an optimizer such as SAM takes its second gradient.

        The gradient that ``backward`` has written is used, and its step is not committed.
        """
        return take_first_step(self._balancer, self, partial(first_step, *args, **kwargs))

    def _second_step(self, second_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the step of such an optimizer, and commit it as :meth:`step` does."""
        take = partial(second_step, *args, **kwargs)
        return self._step_with_hooks(partial(take_second_step, self._balancer, self, take))

    def observe(self, losses: Losses) -> None:
        """Pass the losses of the same batch after the step to a method that needs them.

        For loops that evaluate again themselves. Between two such steps (``every``), after a step
        that was skipped, when called twice, or for a method that does not need them, this does
        nothing.

        Args:
            losses: The losses of the last ``backward``, all of them, evaluated again.

        Raises:
            BalanceValueError: Other losses than those of the last ``backward``, or no scalars.
                Nothing has changed: call it again with the right ones.
            BalanceError: Called between ``backward`` and ``step``.
        """
        observe(self._balancer, losses)

    # ------------------------------------------------------------ metrics

    @property
    def metrics(self) -> StepMetrics:
        """Losses, weights, coefficients, Gramian and cosines of the last ``backward``."""
        return self._balancer.record.metrics

    def log_dict(self, prefix: str = "moo/", pairs: bool | None = None) -> dict[str, float]:
        """Return :attr:`metrics` as a flat dict of floats, for any logger.

        Keys are ``loss/a``, ``weight/a``, ``coefficient/a``, ``cosine/a,b``, ``alignment``,
        ``satisfied`` and ``skipped`` after the prefix. ``alignment`` is how far the gradients point
        in one direction, from -1 to 1 (:attr:`StepMetrics.alignment`); it and the cosines are there
        in steps with a Gramian of at least two losses. ``satisfied`` is how many losses counted as
        satisfied: they equal their lower bound, or have no gradient. The last is the number of
        steps that ``nonfinite="skip"`` has skipped since the start, without those that a GradScaler
        has skipped. Synchronizes with the device, once.

        Args:
            prefix: Prefix of the keys.
            pairs: The cosine of each pair of gradients (True), or ``cosine/min`` and
                ``cosine/mean`` over all pairs (False). Default None: each pair for up to 8 losses.

        Raises:
            NonFiniteError: On an accelerator with ``nonfinite="raise"``: a loss was not finite.
        """
        record = self._balancer.record
        values = {**record.metrics.as_floats(pairs), "skipped": float(record.skipped)}
        constant = self._balancer.needs.method.constant_losses
        record.capture.read(record.steps, self._balancer.method, values, constant)
        if self._balancer.nonfinite == "raise":
            record.faults.raise_if_any()
        return {prefix + key: value for key, value in values.items()}

    @property
    def weighting(self) -> Weighting:
        """The method."""
        return self._balancer.weighting

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with one more entry, ``"balance"``.

        The entry holds tensors and primitives only (loads with ``weights_only=True``); a plain
        optimizer that loads the dict ignores it.
        """
        return self._save_with_hooks(
            lambda: {**self._wrapped.state_dict(), "balance": self._balancer.save()}
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a plain optimizer's.

        A plain optimizer's keeps the balance that is committed: the state of the method, which in
        a new wrapper is its initial one, and the number of steps. Either kind drops the step in
        progress: what ``backward`` staged, an open window, metrics, and a pending ``observe``. A
        warning names hyper-parameters of the method that differ from those of the saved run.

        Raises:
            BalanceValueError: The ``"balance"`` entry is malformed, or belongs to another method,
                other losses or another version. Nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise BalanceValueError(
                "Parameter `state_dict` should be a mapping, as `state_dict()` gives it. "
                f"Found {type(state_dict).__name__}."
            )
        self._load_with_hooks(self._load, state_dict)

    def _load(self, state: dict[str, Any]) -> None:
        checkpoint = self._balancer.validate(state.pop("balance")) if "balance" in state else None
        self._wrapped.load_state_dict(state)
        record = self._balancer.record
        if checkpoint is None:
            record.drop_step()
        else:
            checkpoint.restore(record)

    @property
    def balance_state(self) -> BalanceState:
        """The balance without the wrapped optimizer, as a ``Stateful``.

        For ``torch.distributed.checkpoint``: ``get_optimizer_state_dict`` keeps nothing but the
        wrapped optimizer's state; save this next to it. It is the same on all ranks, and loads on
        any number of them.
        """
        return BalanceState(self._balancer)

    def __repr__(self) -> str:
        """Method, losses with their last coefficients, engine and parameters, line by line.

        Synchronizes with the device where there are coefficients.
        """
        return describe_optimizer(type(self).__name__, self._balancer)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Always False. ``GradScaler.step`` reads it, which lets us refuse unscaled gradients."""
        self._balancer.record.check_scaled()
        return False
