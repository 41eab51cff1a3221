# SPDX-License-Identifier: Apache-2.0
"""The public ops on another device than the tensors of a test, so that one test serves every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fpn_fast import ops


def moved(tensor: Tensor, device: str) -> Tensor:
    """The same view of the same storage, with what lies between its elements, on `device`."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class OpsOn:
    """`fpn_fast.ops` for tensors of the CPU, which runs on `device` and brings results back."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        function = getattr(ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            arguments, options = tree_map_only(Tensor, lambda t: moved(t, self.device), (arguments, options))
            return tree_map_only(Tensor, lambda t: t.cpu(), function(*arguments, **options))

        return call
