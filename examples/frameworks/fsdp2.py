"""FSDP2 and its checkpoints: parameters are sharded, the method's state is equal on all ranks.

A checkpoint of two ranks loads on any number of ranks.

    torchrun --nproc-per-node 2 -m examples.frameworks.fsdp2
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from examples.frameworks.tiny import Codec, codec, signals
from moo_balance import AnalyticQP, BalancedOptimizer
from moo_balance.weighting import Weighting


def build_sharded(weighting: Weighting) -> tuple[Codec, BalancedOptimizer]:
    model = codec()
    for part in (model.encoder, model.decoder, model):
        fully_shard(part)
    return model, BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), weighting)


def train(model: Codec, optimizer: BalancedOptimizer, steps: int = 6) -> None:
    shard = signals()[dist.get_rank() :: dist.get_world_size()]
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(partial(model, shard))
        optimizer.step()


def save(model: Codec, optimizer: BalancedOptimizer, folder: Path) -> None:
    dcp.save(_state(model, optimizer), checkpoint_id=folder)


def load(model: Codec, optimizer: BalancedOptimizer, folder: Path) -> None:
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def _state(model: Codec, optimizer: BalancedOptimizer) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments, "balance": optimizer.balance_state}


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    trained = build_sharded(AnalyticQP())
    train(*trained)
    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)  # one folder for all ranks
    save(*trained, Path(names[0]))

    resumed = build_sharded(AnalyticQP())
    load(*resumed, Path(names[0]))
    train(*resumed)
    print(dist.get_rank(), {key: round(v, 3) for key, v in resumed[1].log_dict().items()})
    dist.destroy_process_group()
