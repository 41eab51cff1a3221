# SPDX-License-Identifier: Apache-2.0
"""Operations and host waits of a call, counted on any device as they would be on a GPU.

An operation is one that PyTorch's dispatcher hands to a backend, without views and bare allocations, which launch
nothing; on a GPU it is at least one launch. One of ours counts as one, though it may launch several kernels.

A host wait is a read of a number that the GPU has yet to compute, such as the length of what ``nonzero`` finds, or an
upload of a number from pageable memory, such as ``torch.tensor(0.5, device="cuda")``. On a CPU nothing waits: the sites
are known from the libraries' sources, and what is counted is how often they are reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import boxes as box_ops

#: Operators whose result, or its shape, the host has to read. torchvision's nms ends in a masked_select.
READS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "torchvision::nms",
}
#: Beside views, what launches nothing.
NO_LAUNCH = {"aten::_unsafe_view", "aten::empty", "aten::empty_strided", "aten::promote_types"}
#: torchvision's batched_nms goes through groups one by one above so many numbers; on a CPU above 4,000 already.
NUMBERS_OF_ONE_NMS_ON_A_GPU = 100_000


@dataclass
class Count:
    """What a call did: operations, and waits by what caused them."""

    operations: int = 0
    waits: Counter[str] = field(default_factory=Counter)


class _Dispatched(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count.operations += not func.is_view and name not in NO_LAUNCH
        if name in READS:
            self.count.waits[name] += 1
        if name == "aten::index":
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            self.count.waits["mask as index"] += len(masks)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Uploads and downloads, which on a CPU are none that the dispatcher would see."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count
        # Tensors that would be in the host's memory; kept, so that no other takes the place of one.
        self.on_host: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            if kwargs.get("device") is None:
                self.on_host[id(result)] = result
            else:
                self.count.waits["upload"] += 1
        elif func is Tensor.view and id(args[0]) in self.on_host:
            self.on_host[id(result)] = result
        elif func is Tensor.to and id(args[0]) in self.on_host:
            self.count.waits["upload"] += not kwargs.get("non_blocking", False)
        elif func is Tensor.tolist and id(args[0]) not in self.on_host:
            self.count.waits["tolist"] += 1
        return result


def _batched_nms_of_a_gpu(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if boxes.numel() > NUMBERS_OF_ONE_NMS_ON_A_GPU:
        return box_ops._batched_nms_vanilla(boxes, scores, idxs, iou_threshold)
    return box_ops._batched_nms_coordinate_trick(boxes, scores, idxs, iou_threshold)


def count(call: Callable[[], Any]) -> Count:
    """What `call` does, after a first time that sets up what is kept."""
    found = Count()
    with mock.patch.object(box_ops, "batched_nms", _batched_nms_of_a_gpu):
        call()
        with _Called(found), _Dispatched(found):
            call()
    found.waits = +found.waits
    return found
