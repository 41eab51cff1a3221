# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, torchrun's or this one alone, its line of progress, and the error that refuses it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# Between two lines of progress where the output is no terminal.
LINE_SECONDS = 20


class UsageError(Exception):
    """A run that cannot be served as it was asked for; the message is one line."""


class Progress(tqdm):
    """Phase, step and time left: one line redrawn on a terminal, elsewhere a new line every LINE_SECONDS.

    limit: seconds after which the phase ends in any case, or None. options: tqdm's, such as initial and disable.
    """

    def __init__(self, phase: str, unit: str, total: int, limit: float | None = None, **options: Any) -> None:
        self.ends = None if limit is None else time.monotonic() + limit
        terminal = sys.stderr.isatty()
        shown = "{bar:20} " if terminal else ""
        line = f"{{desc}}: {shown}{{unit}} {{n}} of {{total}}, {{left}} left{{postfix}}"
        options |= {"mininterval": 0.5 if terminal else LINE_SECONDS, "maxinterval": 0, "miniters": 1, "position": 0}
        super().__init__(desc=phase, unit=unit, total=total, bar_format=line, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's fields and `left`, the time to the end at the mean speed so far, or to the limit."""
        fields = super().format_dict
        done, seconds = fields["n"] - fields["initial"], [] if self.ends is None else [self.ends - time.monotonic()]
        if done > 0:
            seconds.append(fields["elapsed"] / done * (fields["total"] - fields["n"]))
        return fields | {"left": tqdm.format_interval(max(0, min(seconds))) if seconds else "unknown time"}

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """How a line reaches `file`: redrawn in place on a terminal, in full elsewhere."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: print(line.strip(), file=file, flush=True) if line.strip() else None


def ignore_interrupts(_: int) -> None:
    """For a process that loads images: Ctrl-C reaches it too, and the training process ends the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Processes:
    """This process among `world`. All processes call every method; with one process the methods cost nothing."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes, by gloo also on GPUs: the values are on the host."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in order of rank."""
        parts = [values] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun's environment variables describe.

    device: "auto", "cpu" or "cuda"; a process takes the GPU of its local rank. Gradients go by nccl on GPUs, all else
    by gloo.
    """
    cuda = device != "cpu" and torch.cuda.is_available()
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(device=here)
        return
    # A caller of this script's functions may have opened a group already.
    opened = not dist.is_initialized()
    if opened:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), here)
    finally:
        if opened:
            dist.destroy_process_group()


def distributed(model: nn.Module, processes: Processes, shard: bool) -> nn.Module:
    """The model to call in training: wrapped in DistributedDataParallel, sharded in place by FSDP2, or as it is."""
    if shard:
        shard_in_place(model, processes)
    if shard or processes.world == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def shard_in_place(model: nn.Module, processes: Processes) -> None:
    """FSDP2 by the detector's parts: each part is gathered for its call and freed after it."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gradients_exchanged(model: nn.Module, exchange: bool) -> Iterator[None]:
    """Whether a backward pass in the block exchanges gradients between processes, or only accumulates its own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchange)
    with contextlib.nullcontext() if exchange or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, also where this process holds a part of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
