# SPDX-License-Identifier: Apache-2.0
"""A process of its own, which runs fpn_fast's ops on the emulator: `python -m tools.gpu_emulator.host.worker FD FD`.

A request is (namespace, op, arguments, orders, options); the answer (what the op returns or its error, launches).
"""

from __future__ import annotations

import io
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from tools.gpu_emulator.host import stand_in


def packed(value: Any) -> bytes:
    """Tensors keep their strides and the whole of their storages."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def main(reads: int, writes: int) -> None:
    torch.set_num_threads(1)
    stand_in.install()
    requests, answers = Connection(reads, writable=False), Connection(writes, readable=False)
    while True:
        try:
            namespace, name, arguments, orders, options = unpacked(requests.recv_bytes())
        except EOFError:
            return
        gpu = stand_in.gpu
        gpu.orders, gpu.options = orders, options
        try:
            found = stand_in.call(getattr(getattr(torch.ops, namespace), name), *arguments)
        except Exception as error:
            found = RuntimeError(f"{type(error).__name__}: {error}")
        answers.send_bytes(packed((found, gpu.launches)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
