"""One process or many: what ``torchrun`` says about this one, and what only the first one does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """The processes that train one model together; alone, a world of one."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Is this the process that prints, logs and saves?"""
        return self.rank == 0

    def say(self, *sentences: str) -> None:
        """Print, once for all processes."""
        if self.first:
            for sentence in sentences:
                print(sentence, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in order of rank, everywhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device: torch.device) -> World:
    """Meet the other processes, if ``torchrun`` has started any, each on a device of its own."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.get_device_module(device).set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)
