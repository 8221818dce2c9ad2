"""Private names of PyTorch's optimizers, scaler and modules.

Those of autograd are in ``engine/autograd.py``, those of operators in ``_reevaluation/writes.py``.

Checked with PyTorch 2.6 and 2.13. Every use is guarded: each function says what happens without its
names. (``_step_supports_amp_scaling`` in ``optimizer.py`` is read by ``GradScaler``, not by us.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

Step = TypeVar("Step", bound=Callable[..., Any])

# ------------------------------------------------------------ optimizer


def initialize_hooks(optimizer: Optimizer) -> None:
    """Give an optimizer its hook dictionaries, without groups and state of its own.

    ``Optimizer.__init__`` would store a second copy of both; ``__setstate__`` of an empty state
    does the rest of its work.
    """
    Optimizer.__setstate__(optimizer, {})


def mark_as_hooked(step: Step) -> Step:
    """Keep ``Optimizer`` from decorating `step`.

    Its decoration records a profiler range and runs the global step hooks. The wrapped optimizer's
    own ``step`` does both already. Without the attribute they happen twice.
    """
    step.hooked = True  # type: ignore[attr-defined]
    return step


def hooks_of(optimizer: Optimizer, kind: str) -> Mapping[int, Callable[..., Any]]:
    """Hooks registered on an optimizer; none where PyTorch keeps them elsewhere.

    Args:
        optimizer: Any optimizer.
        kind: ``"step_pre"``, ``"step_post"``, ``"state_dict_pre"``, ``"state_dict_post"``,
            ``"load_state_dict_pre"`` or ``"load_state_dict_post"``.
    """
    hooks: Mapping[int, Callable[..., Any]] = getattr(optimizer, f"_optimizer_{kind}_hooks", {})
    return hooks


# ------------------------------------------------------------ scaler


def scaler_stage(scaler: GradScaler, optimizer: Optimizer) -> str | None:
    """What the scaler has done with this optimizer in this step.

    ``"READY"``, ``"UNSCALED"`` or ``"STEPPED"``; None if it has not processed the optimizer, and
    ``"UNKNOWN"``, with which every check passes, where a name is missing.
    """
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is None:
        return "UNKNOWN"
    if id(optimizer) not in states:
        return None
    stage: str = getattr(states[id(optimizer)].get("stage"), "name", "UNKNOWN")
    return stage


def scaler_device(scaler: GradScaler) -> str | None:
    """The device type a scaler was made for; None where the name is missing."""
    return getattr(scaler, "_device", None)


# ------------------------------------------------------------ gradient values


def entries_of(gradient: Tensor) -> Tensor:
    """The stored entries of a sparse gradient; without the private name it is sorted for them."""
    read: Callable[[], Tensor] | None = getattr(gradient, "_values", None)
    return gradient.coalesce().values() if read is None else read()


_no_subclass: Callable[[], AbstractContextManager[None]] = getattr(
    torch._C, "DisableTorchFunctionSubclass", nullcontext
)


def as_plain(tensor: Tensor) -> Tensor:
    """The same values and graph, without a class of its own that only acts on functions.

    Such a class may need attributes that a result of an operation lacks, so it is not asked. Where
    the private name is missing it is. A class that acts on operators (``__torch_dispatch__``), such
    as ``DTensor``, has other values or storage, and stays.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    with torch.enable_grad(), _no_subclass():  # `backward` works under no_grad
        return tensor.as_subclass(Tensor)


find_nonfinite: Callable[[list[Tensor], Tensor, Tensor], None] | None = getattr(
    torch, "_amp_foreach_non_finite_check_and_unscale_", None
)
"""``GradScaler``'s check, one call for all tensors; None where PyTorch has no such function.

Sets the second argument to 1 if a tensor of the first has an entry that is not finite, and
multiplies the tensors by the third. It refuses complex numbers and overlapping memory."""


# ------------------------------------------------------------ DistributedDataParallel

_SYNC_FLAG = "require_forward_param_sync"


def broadcasts_buffers(module: nn.Module) -> bool:
    """Whether DistributedDataParallel will broadcast its buffers in the next forward pass."""
    return bool(getattr(module, _SYNC_FLAG, False))


def request_buffer_broadcast(module: nn.Module) -> None:
    """Have DistributedDataParallel broadcast its buffers in the next forward pass.

    It drops the request after a forward pass in which gradients are not synchronized.
    """
    setattr(module, _SYNC_FLAG, True)
