"""DistributedDataParallel: the loop does not change.

Weights are computed from losses and gradients that are averaged over the ranks.

    torchrun --nproc-per-node 2 -m examples.frameworks.ddp
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from examples.frameworks.tiny import Codec, codec, signals
from moo_balance import FAMO, BalancedOptimizer
from moo_balance.weighting import Weighting


def train(weighting: Weighting, epochs: int = 3) -> tuple[Codec, BalancedOptimizer]:
    model = codec()
    parallel = DistributedDataParallel(model)
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), weighting)

    data = signals()
    sampler = DistributedSampler(data)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for signal in DataLoader(data, batch_size=8, sampler=sampler):
            optimizer.zero_grad()
            optimizer.backward(partial(parallel, signal))
            optimizer.step()
    return model, optimizer


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    _, trained = train(FAMO())
    print(dist.get_rank(), {key: round(v, 3) for key, v in trained.log_dict().items()})
    dist.destroy_process_group()
