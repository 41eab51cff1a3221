# SPDX-License-Identifier: Apache-2.0
"""The processes of a training run: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among `world`; every method is called by all of them, and is free when there is one."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over processes. By gloo, also on a GPU: these are numbers of the host."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        self.sum([0.0])


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun's environment speaks of, with the device of this one.

    device: "auto", "cpu" or "cuda"; GPUs are given out by local rank. Gradients go by nccl on a GPU, all else by gloo.
    """
    cuda = device != "cpu" and torch.cuda.is_available()
    index = int(os.environ.get("LOCAL_RANK", 0))
    here = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(device=here)
        return
    # Who calls this script's functions may have a group already.
    opened = not dist.is_initialized()
    if opened:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), here)
    finally:
        if opened:
            dist.destroy_process_group()


def distributed(model: nn.Module, processes: Processes, shard: bool) -> nn.Module:
    """The model as it is called in training: with DistributedDataParallel around it, or sharded in place by FSDP2."""
    if shard:
        shard_in_place(model, processes)
        return model
    if processes.world == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def shard_in_place(model: nn.Module, processes: Processes) -> None:
    """FSDP2 by the detector's own parts: each is gathered when it is called, and freed after it."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gradients_exchanged(model: nn.Module, exchange: bool) -> Iterator[None]:
    """Whether a backward in the block ends in an exchange of gradients, or only adds to what is there."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchange)
    with contextlib.nullcontext() if exchange or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
