"""Arguments of BalancedOptimizer at the door."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from moo_balance.engine import Engine
from moo_balance.errors import BalanceValueError
from moo_balance.proxy import OptimizerProxy
from moo_balance.weighting.base import Weighting


def check_arguments(
    optimizer: object,
    weighting: object,
    engine: object,
    loss_names: Sequence[str] | None,
    nonfinite: object,
    check_ranks_every: object,
    process_group: object,
) -> None:
    """Refuse what does not fit, naming the argument."""
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, OptimizerProxy):
        raise BalanceValueError(
            "Parameter `optimizer` should be a plain torch.optim.Optimizer. "
            f"Found {type(optimizer).__name__}."
        )
    if isinstance(optimizer, LBFGS):
        raise BalanceValueError(
            "Parameter `optimizer` should not be LBFGS: its line search evaluates one fixed "
            "objective many times in a step, and balancing changes the objective with each "
            "evaluation. Found LBFGS. Use a first-order optimizer, or LBFGS on a fixed sum."
        )
    if not isinstance(weighting, Weighting):
        raise BalanceValueError(
            "Parameter `weighting` should be an instance of a method such as `FAMO()`. "
            f"Found {weighting!r}."
        )
    if engine is not None and not isinstance(engine, Engine):
        raise BalanceValueError(
            f"Parameter `engine` should be an Engine such as `PerLoss()`. Found {engine!r}."
        )
    if nonfinite not in ("raise", "skip"):
        raise BalanceValueError(
            f"Parameter `nonfinite` should be 'raise' or 'skip'. Found {nonfinite!r}."
        )
    if not isinstance(check_ranks_every, int) or check_ranks_every < 0:
        raise BalanceValueError(
            "Parameter `check_ranks_every` should be a whole number of steps, 0 for never. "
            f"Found {check_ranks_every!r}."
        )
    if not (process_group in (None, "auto") or _is_group(process_group)):
        raise BalanceValueError(
            "Parameter `process_group` should be 'auto', None, or a torch.distributed.ProcessGroup "
            f"that this rank belongs to. Found {process_group!r}."
        )
    if loss_names is not None and (
        isinstance(loss_names, str)
        or not loss_names
        or not all(isinstance(name, str) and name for name in loss_names)
        or len(set(loss_names)) != len(loss_names)
    ):
        raise BalanceValueError(
            "Parameter `loss_names` should be a sequence of distinct, non-empty strings. "
            f"Found {loss_names!r}."
        )


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def measured_params(
    params: Iterable[Tensor] | nn.Module | None, optimizer: Optimizer
) -> list[Tensor] | None:
    """The parameters named by ``shared_params=``, once it is known that the optimizer trains them."""
    if params is None:
        return None
    listed = list(params.parameters() if isinstance(params, nn.Module) else params)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = [p for p in listed if id(p) not in trained and p.requires_grad]
    if not listed or strangers:
        found = f"one of shape {tuple(strangers[0].shape)} that is not" if strangers else "none"
        raise BalanceValueError(
            "Parameter `shared_params` should hold parameters that the wrapped optimizer trains. "
            f"Found {found}. Pass a module or parameters that were given to the optimizer too."
        )
    return listed
