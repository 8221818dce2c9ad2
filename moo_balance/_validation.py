"""Validates all that the user passes: constructor arguments, losses, features.

Every function raises before anything has changed. The message names the argument or the loss, the
value found, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import LBFGS, Optimizer

from moo_balance._hints import describe_value, name_nearest
from moo_balance._several import SeveralOptimizers
from moo_balance._torch_internals import as_plain
from moo_balance._wrapper import OptimizerWrapper
from moo_balance.engine import Engine, PerLoss
from moo_balance.errors import BalanceError, BalanceValueError
from moo_balance.weighting.base import Weighting
from moo_balance.weighting.rows import RowWeighting

# ------------------------------------------------------------ constructor arguments


def read_optimizer(optimizer: object) -> Optimizer:
    """The optimizer, or several as one; an error unless they are plain first-order ones."""
    if not isinstance(optimizer, (list, tuple)):
        return _check_optimizer(optimizer)
    if not optimizer:
        raise BalanceValueError(
            "Parameter `optimizer` should be an optimizer, or a list of at least one. Found an "
            "empty list. Pass for example `[muon, adamw]`."
        )
    parts = [_check_optimizer(part) for part in optimizer]
    _check_disjoint(parts)
    return SeveralOptimizers(parts)


def _check_disjoint(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that train a parameter together."""
    owners: dict[Tensor, int] = {}
    for position, optimizer in enumerate(optimizers):
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            before = owners.setdefault(param, position)
            if before != position:
                one, other = (
                    f"{type(optimizers[k]).__name__} (number {k})" for k in (before, position)
                )
                raise BalanceValueError(
                    "Parameter `optimizer` should be a list of optimizers of different parameters. "
                    f"Found one of shape {tuple(param.shape)} in both {one} and {other}. Give each "
                    "parameter to one of them."
                )


def _check_optimizer(optimizer: object) -> Optimizer:
    """Refuse what is no plain first-order optimizer."""
    if isinstance(optimizer, OptimizerWrapper):
        raise BalanceValueError(
            "Parameter `optimizer` should be a plain torch.optim.Optimizer. Found "
            f"{type(optimizer).__name__}: it is already wrapped."
        )
    if isinstance(optimizer, type):
        raise BalanceValueError(
            "Parameter `optimizer` should be a plain torch.optim.Optimizer. Found the class "
            f"{optimizer.__name__}. Pass an instance, such as "
            f"`{optimizer.__name__}(model.parameters())`."
        )
    if not isinstance(optimizer, Optimizer):
        raise BalanceValueError(
            "Parameter `optimizer` should be a plain torch.optim.Optimizer. "
            f"Found {type(optimizer).__name__}. Pass an optimizer of the parameters, such as "
            "`torch.optim.Adam(model.parameters())`."
        )
    if isinstance(optimizer, LBFGS):
        raise BalanceValueError(
            "Parameter `optimizer` should not be LBFGS: its line search evaluates one fixed "
            "objective many times in a step, and balancing changes the objective with each "
            "evaluation. Found LBFGS. Use a first-order optimizer, or LBFGS on a fixed sum."
        )
    return optimizer


def check_method(weighting: object, engine: object) -> None:
    """Refuse what is no weighting or no engine."""
    if not isinstance(weighting, Weighting):
        hint = ""
        if type(weighting).__module__.startswith("torchjd"):
            hint = " Wrap it in moo_balance.integrations.torchjd.TorchJD."
        raise BalanceValueError(
            "Parameter `weighting` should be an instance of a method such as `NashMTL()`. "
            f"Found {describe_value(weighting, Weighting)}.{hint}"
        )
    if engine is None:
        return
    engine = read_engine(engine)
    if weighting.uses_independent_batches and not engine.separates_batches:
        raise BalanceValueError(
            f"Parameter `engine` should be `PerLoss()` for {type(weighting).__name__}, which needs "
            f"products of gradients of different batches. Found {engine!r}. Leave it out."
        )
    check_whole_rows(weighting.needs(0).rows, engine)


def read_engine(engine: object) -> Engine:
    """The engine; ``PerLoss()`` for None."""
    if engine is None:
        return PerLoss()
    if not isinstance(engine, Engine):
        raise BalanceValueError(
            "Parameter `engine` should be an Engine such as `PerLoss()`. Found "
            f"{describe_value(engine, Engine)}."
        )
    return engine


def check_stateless(weighting: object) -> None:
    """Refuse a method that needs more than the gradients of one step, or is none."""
    check_method(weighting, None)
    assert isinstance(weighting, Weighting)
    rows = weighting.needs(0).rows
    if weighting.observes_step or (rows is not None and rows.steps_apart):
        reason = "needs the losses after the step" if rows is None else "takes steps of its own"
        raise BalanceValueError(
            "Parameter `weighting` of `balanced_backward` should need a single backward pass. "
            f"Found {type(weighting).__name__}, which {reason}. Use BalancedOptimizer, or a "
            "method such as `MGDA()`."
        )


def check_whole_rows(method: Weighting | None, engine: Engine, features: bool = False) -> None:
    """Refuse what keeps no whole gradients, for a method that looks at single coordinates."""
    if method is None or (isinstance(engine, PerLoss) and not features):
        return
    name, where = type(method).__name__, "which looks at single coordinates of gradients"
    if features:
        raise BalanceValueError(
            f"Parameter `features` should be left out with {name}, {where} of parameters. Found "
            "it. Name the shared part by `shared_params=` of BalancedOptimizer."
        )
    raise BalanceValueError(
        f"Parameter `engine` should be PerLoss(), which keeps whole gradients, with {name}, "
        f"{where}. Found {engine!r}. Leave it out."
    )


def check_combination(method: RowWeighting | None) -> None:
    """Refuse a method whose direction is no sum of coefficients times gradients of the batch."""
    if method is not None and (method.combines != "gradients" or method.steps_apart):
        raise BalanceValueError(
            "`weighted_losses` should be used with a method that gives each loss one coefficient. "
            f"Found {type(method).__name__}, whose direction is no combination of the gradients of "
            "a batch. Call `combined_loss(losses).backward()`, or `backward(losses)`."
        )


def weighted_on_ranks_error() -> BalanceError:
    """The error of ``weighted_losses`` on several ranks."""
    return BalanceError(
        "`weighted_losses` should be used in a single process. Found several ranks, whose "
        "gradients it does not average. Call `combined_loss(losses).backward()`, or "
        "`backward(losses)`."
    )


def check_loss_names(names: Sequence[str] | None) -> None:
    """Refuse names that are empty, equal, or no strings."""
    if names is None:
        return
    if (
        isinstance(names, str)
        or not names
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != len(names)
    ):
        raise BalanceValueError(
            "Parameter `loss_names` should be a sequence of distinct, non-empty strings. "
            f"Found {names!r}."
        )


def check_options(
    nonfinite: object, max_skips: object, check_ranks_every: object, process_group: object
) -> None:
    """Refuse other values of the remaining arguments."""
    if nonfinite not in ("raise", "skip"):
        raise BalanceValueError(
            f"Parameter `nonfinite` should be 'raise' or 'skip'. Found {nonfinite!r}."
        )
    if max_skips is not None and (not isinstance(max_skips, int) or max_skips < 0):
        raise BalanceValueError(
            "Parameter `max_skips` should be a whole number of steps, or None for any number. "
            f"Found {max_skips!r}."
        )
    if not isinstance(check_ranks_every, int) or check_ranks_every < 0:
        raise BalanceValueError(
            "Parameter `check_ranks_every` should be a whole number of steps, 0 for never. "
            f"Found {check_ranks_every!r}."
        )
    check_process_group(process_group)


def check_process_group(process_group: object) -> None:
    """Refuse what names no ranks."""
    if not (process_group in (None, "auto") or _is_group(process_group)):
        raise BalanceValueError(
            "Parameter `process_group` should be 'auto', None, or a torch.distributed.ProcessGroup "
            f"that this rank belongs to. Found {process_group!r}."
        )


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def read_shared_params(
    params: Iterable[Tensor] | nn.Module | None, optimizer: Optimizer
) -> list[Tensor] | None:
    """The parameters named by ``shared_params=``; an error if the optimizer does not train them."""
    if params is None:
        return None
    if isinstance(params, nn.Module):
        params = params.parameters()
    is_tensor = isinstance(params, Tensor)  # whose rows are no parameters
    is_iterable = isinstance(params, Iterable) and not is_tensor
    shared: list[Any] = list(params) if is_iterable else [params]
    if is_tensor or not all(isinstance(param, Tensor) for param in shared):
        kind = "a single tensor" if is_tensor else f"{params!r:.60}"
        raise BalanceValueError(
            "Parameter `shared_params` should be a module, or a list of parameters. Found "
            f"{kind}. Pass for example `model.trunk` or `[model.weight]`."
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    unknown = [p for p in shared if id(p) not in trained and p.requires_grad]
    if not shared or unknown:
        value = f"one of shape {tuple(unknown[0].shape)} that is not" if unknown else "none"
        raise BalanceValueError(
            "Parameter `shared_params` should hold parameters that the wrapped optimizer trains. "
            f"Found {value}. Pass a module or parameters that were given to the optimizer too."
        )
    return shared


def read_named_params(params: object) -> list[tuple[str, Tensor]]:
    """The parameters that train, each once, with their names; the names may be empty.

    Args:
        params: A module, an iterable of parameters, or one of names and parameters.
    """
    if isinstance(params, nn.Module):
        params = _unwrap(params).named_parameters()
    if isinstance(params, (Tensor, str, Mapping)) or not isinstance(params, Iterable):
        raise _no_params(f"{type(params).__name__}")
    named: dict[Tensor, str] = {}
    for entry in params:
        pair = entry if isinstance(entry, tuple) else ("", entry)
        if not (len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            raise _no_params(f"{entry!r:.60}")
        if isinstance(pair[1], UninitializedParameter):
            raise _not_initialized(type(pair[1]).__name__)
        if pair[1].is_meta:
            raise BalanceValueError(
                "Parameter `params` should hold parameters with values. Found one on the device "
                "'meta'. Initialize or load the model on the device that it runs on."
            )
        if not (pair[1].is_leaf or not pair[1].requires_grad):
            raise _no_params(f"the result of an operation, of shape {tuple(pair[1].shape)}")
        if pair[1].requires_grad:
            named.setdefault(pair[1], pair[0])
    if not named:
        raise _no_params("none that requires a gradient")
    return [(name, param) for param, name in named.items()]


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside of wrappers for data parallelism and compilation."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return _unwrap(module.module)
    inner = getattr(module, "_orig_mod", None)
    return module if inner is None else _unwrap(inner)


def check_initialized(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose first call makes their parameters or buffers."""
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                raise _not_initialized(type(module).__name__)


def _not_initialized(value: str) -> BalanceValueError:
    return BalanceValueError(
        "Parameter `params`, and models that `losses_fn` uses, should have all their parameters "
        f"and buffers. Found {value}, which the first call of the model fills. Call the model once "
        "first."
    )


def _no_params(value: str) -> BalanceValueError:
    return BalanceValueError(
        "Parameter `params` should be a module, or a list of parameters that train. Found "
        f"{value}. Pass for example `model`, `model.encoder` or `model.named_parameters()`."
    )


# ------------------------------------------------------------ losses


class Given(NamedTuple):
    """What one rank passes to a call, validated.

    Args:
        losses: The losses as 0-d tensors, in declared order.
        features: What they are computed from, if that was given.
        returned: The losses as they were given, or returned by a closure.
    """

    losses: dict[str, Tensor]
    features: tuple[Tensor, ...] = ()
    returned: Mapping[str, Tensor] = MappingProxyType({})


def read_losses(losses: object, declared: Sequence[str] | None) -> dict[str, Tensor]:
    """The losses as 0-d tensors with a graph, in declared order.

    Args:
        losses: What was passed to ``backward``.
        declared: Names known from earlier steps; None before the first one.
    """
    scalars = _read_scalars(losses, declared)
    for name, loss in scalars.items():
        if not loss.requires_grad:
            raise _no_graph(name, loss)
    return scalars


def check_no_closure(losses: object) -> None:
    """Refuse a closure given to ``combined_loss``, which could not be evaluated again."""
    if callable(losses):
        raise BalanceValueError(
            "Parameter `losses` of `combined_loss` should hold the losses themselves. Found "
            "a closure. Call it: `combined_loss(closure())`."
        )


def check_closure(closure: object) -> None:
    """Refuse what is given to ``step`` in place of a function."""
    if not callable(closure):
        raise BalanceValueError(
            "`step` takes a function that computes the losses. Found "
            f"{type(closure).__name__}. Call `backward(losses)`, then `step()`."
        )


def read_observed_losses(
    losses: object, declared: Sequence[str] | None, expected: Sequence[str]
) -> dict[str, Tensor]:
    """The losses after a step as 0-d tensors in declared order; a graph is not needed.

    Args:
        losses: What was passed to ``observe``.
        declared: All declared names.
        expected: The losses that the step was taken on.
    """
    scalars = _read_scalars(losses, declared)
    if set(scalars) != set(expected):
        raise BalanceValueError(
            f"Parameter `losses` should hold the losses of the last backward, {_quote(expected)}. "
            f"Found {_quote(list(scalars))}. Pass all of them, and no others."
        )
    return scalars


def _read_scalars(losses: object, declared: Sequence[str] | None) -> dict[str, Tensor]:
    if not isinstance(losses, Mapping) or not losses:
        raise _no_losses(losses, declared)
    if set(map(type, losses.values())) != {Tensor}:
        losses = {k: as_plain(v) if isinstance(v, Tensor) else v for k, v in losses.items()}
    for name, loss in losses.items():
        if not (isinstance(name, str) and name):
            raise _bad_name(name)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            raise _bad_loss(name, loss)
    if declared is not None and tuple(losses) != tuple(declared):
        _check_declared(losses, declared)
        losses = {name: losses[name] for name in declared if name in losses}
    return {name: loss if not loss.ndim else _as_scalar(loss) for name, loss in losses.items()}


def _check_declared(names: Iterable[str], declared: Sequence[str]) -> None:
    """Refuse a name that was never declared."""
    for name in names:
        if name not in declared:
            raise BalanceValueError(
                f"Loss `{name}` is none of the declared ones, {_quote(declared)}."
                f"{name_nearest(name, declared)} The first step declares the names; give "
                "`loss_names=[…]` to BalancedOptimizer if some losses come later."
            )


def _as_scalar(loss: Tensor) -> Tensor:
    with torch.enable_grad():  # `backward` works under no_grad, as that of a tensor does
        return loss.reshape(())


def _no_losses(losses: object, declared: Sequence[str] | None) -> BalanceValueError:
    if isinstance(losses, Mapping):
        return BalanceValueError(
            "Parameter `losses` should hold at least one loss. Found none. "
            "Skip the call for a batch without losses."
        )
    return BalanceValueError(
        "Parameter `losses` should be a mapping from a name to a scalar tensor. "
        f"Found {type(losses).__name__}. {_show_mapping(losses, declared, 'Write')}"
    )


def _show_mapping(losses: object, declared: Sequence[str] | None, verb: str) -> str:
    """A sentence that shows how to give names to what was passed without them."""
    if isinstance(losses, list) and losses and all(map(_is_named, losses)):
        return f"{verb} `dict(losses)`."
    if isinstance(losses, (list, tuple)) or (isinstance(losses, Tensor) and losses.ndim == 1):
        count = len(losses)
        names = declared or ()
        if len(names) != count:
            names = ("first", "second", "third")[:count]
        entries = [f'"{name}": losses[{k}]' for k, name in enumerate(names[:3])]
        if entries:
            return f"{verb} `{{{', '.join(entries)}{', …' * (count > 3)}}}`."
    example = '`{"rate": rate, "distortion": distortion}`'
    if isinstance(losses, Tensor):
        return f"{verb} {example}, with the terms of a sum in place of the sum."
    return f"{verb} {example}."


def _is_named(entry: object) -> bool:
    """Whether an entry is a pair of a name and something else."""
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _bad_name(name: object) -> BalanceValueError:
    return BalanceValueError(
        f"Parameter `losses` should have non-empty strings as names. Found {name!r}."
    )


def _no_graph(name: str, loss: Tensor) -> BalanceValueError:
    if not loss.is_meta and not loss.item():
        return BalanceValueError(
            f"Loss `{name}` should be attached to a graph. Found a zero that requires no gradient. "
            f"{_LEAVE_OUT}"
        )
    return BalanceValueError(
        f"Loss `{name}` should be attached to a graph. Found a tensor that requires no gradient. "
        "Was it detached, turned into a number, or computed under no_grad?"
    )


_LEAVE_OUT = "Leave it out of the dict if this batch has no such loss."


def _bad_loss(name: str, loss: object) -> BalanceValueError:
    if not isinstance(loss, Tensor):
        advice = "Do not call `.item()` on a loss to be balanced."
        if isinstance(loss, (list, tuple, Mapping)):
            advice = "Give each entry a name of its own, or add them up."
        advice = _LEAVE_OUT if _is_absent(loss) else advice
        return BalanceValueError(
            f"Loss `{name}` should be a scalar tensor. Found {type(loss).__name__} ({loss!r}). "
            f"{advice}"
        )
    if loss.numel() != 1:
        return BalanceValueError(
            f"Loss `{name}` should be a scalar. Found shape {tuple(loss.shape)}. Reduce it, for "
            "example with `.mean()`."
        )
    advice = "" if loss.is_meta or loss.item() else f" {_LEAVE_OUT}"
    return BalanceValueError(
        f"Loss `{name}` should be a real floating-point tensor. Found {loss.dtype}.{advice}"
    )


def read_batch_losses(losses: object, expected: Sequence[str], number: int) -> dict[str, Tensor]:
    """The losses of one batch as 0-d tensors with a graph.

    Args:
        losses: What ``losses_fn`` returned.
        expected: The names of the first batch; empty for the first.
        number: How many batches came before.
    """
    if not isinstance(losses, Mapping) or not losses:
        value = "none" if isinstance(losses, Mapping) else type(losses).__name__
        raise BalanceValueError(
            "Parameter `losses_fn` should return a mapping from a name to a scalar tensor. Found "
            f"{value}. {_show_mapping(losses, None, 'Return')}"
        )
    if expected and set(losses) != set(expected):
        raise BalanceValueError(
            "Parameter `losses_fn` should return the same losses for each batch. Found "
            f"{_quote(list(losses))} for batch {number} and {_quote(expected)} for batch 0. "
            "Pass batches that have all losses, or leave the others out of the dict."
        )
    for name, loss in losses.items():
        if _is_absent(loss):
            raise BalanceValueError(
                "Parameter `losses_fn` should compute each loss for each batch. Found "
                f"`{name}` = {loss!r} for batch {number}, which requires no gradient. Pass batches "
                f"that have all losses, or leave `{name}` out of the dict for all of them."
            )
    return read_losses(losses, expected or None)


def _is_absent(loss: object) -> bool:
    """Whether it stands for a loss that a batch does not have: None, or a constant zero."""
    if isinstance(loss, Tensor):
        return not (loss.requires_grad or loss.is_meta or loss.numel() != 1 or loss.item())
    return loss is None or (isinstance(loss, (int, float)) and not loss)


# ------------------------------------------------------------ features


def read_features(
    features: Tensor | Sequence[Tensor], shared_params: bool, in_window: bool
) -> tuple[Tensor, ...]:
    """The features as a tuple.

    Args:
        features: What was passed to ``backward``.
        shared_params: Whether the optimizer was given ``shared_params=``.
        in_window: Whether the batch is a micro-batch of a window.
    """
    tensors = (features,) if isinstance(features, Tensor) else tuple(features)
    bad = [f for f in tensors if not isinstance(f, Tensor) or not f.requires_grad]
    if bad or not tensors:
        value = _describe_feature(bad[0]) if bad else "none"
        raise BalanceValueError(
            "Parameter `features` should be a tensor that the losses are computed from, with a "
            f"graph, or several. Found {value}. Pass the output of the shared part of the model."
        )
    if in_window:
        raise BalanceValueError(
            "Parameter `features` should be left out where micro-batches are accumulated: their "
            "features are gone before the weights are known. Found it within `accumulate()`."
        )
    if shared_params:
        raise BalanceValueError(
            "Parameter `features` should not come together with `shared_params=` of "
            "BalancedOptimizer: gradients are compared at the one or over the other. Found both. "
            "Leave out one."
        )
    return tensors


def _describe_feature(feature: object) -> str:
    if isinstance(feature, Tensor):
        return f"one of shape {tuple(feature.shape)} that requires no gradient"
    return type(feature).__name__


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
