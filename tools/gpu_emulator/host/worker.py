# SPDX-License-Identifier: Apache-2.0
"""A process of its own, which runs fpn_fast's ops on the emulator: `python -m tools.gpu_emulator.host.worker FD FD`.

A request is (namespace, op, arguments, orders, far, options); the answer (what the op returns or its error, launches).
far: the axis along which the elements of maps lie so far apart that offsets need more than 31 bits, or None.
"""

from __future__ import annotations

import functools
import io
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tools.gpu_emulator.host import stand_in


def packed(value: Any) -> bytes:
    """Tensors keep their strides and the whole of their storages."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def far_along(axis: int, value: Any) -> Any:
    """`value`, or the map in memory of more than 2^31 elements, most of which nobody touches."""
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.size(axis) < 2:
        return value
    strides = list(value.stride())
    # A multiple of 16 elements, for 16-byte accesses.
    strides[axis] = (2**31 // (value.size(axis) - 1) // 16 + 1) * 16
    elements = sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True)) + 1
    # torch.empty would fill it with poison.
    storage = torch.UntypedStorage(elements * value.itemsize)
    return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.shape, strides).copy_(value)


def main(reads: int, writes: int) -> None:
    torch.set_num_threads(1)
    stand_in.install()
    requests, answers = Connection(reads, writable=False), Connection(writes, readable=False)
    while True:
        try:
            namespace, name, arguments, orders, axis, options = unpacked(requests.recv_bytes())
        except EOFError:
            return
        gpu = stand_in.gpu
        gpu.orders, gpu.options = orders, options
        if axis is not None:
            arguments = tree_map(functools.partial(far_along, axis), arguments)
        try:
            found = stand_in.call(getattr(getattr(torch.ops, namespace), name), *arguments)
        except Exception as error:
            found = RuntimeError(f"{type(error).__name__}: {error}")
        answers.send_bytes(packed((found, gpu.launches)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
