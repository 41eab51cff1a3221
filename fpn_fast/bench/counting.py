# SPDX-License-Identifier: Apache-2.0
"""What a call hands to the device, as PyTorch's dispatcher sees it, on any device as it would be on a GPU.

- Operators by name: they say which backend computed a result.
- Operations: operators without views and bare allocations, which launch nothing. Each is at least one launch on a GPU;
  an op of ours counts as one, though it may launch several kernels.
- Bytes: those of an operation's tensors, inputs and outputs, so that one changed in place counts twice. FLOPs: of its
  convolutions and matrix products, two per multiplication and addition.
- Host synchronisations: the host reads a value that the GPU has yet to compute, such as the length of what ``nonzero``
  finds, or uploads a value from pageable memory, such as ``torch.tensor(0.5, device="cuda")``. Nothing of the sort
  happens on a CPU: the sites are known from the libraries' sources, and visits to them are counted.
- Uploads: all from pageable memory. Those with ``non_blocking=True`` do not synchronise, but a CUDA graph cannot
  capture them either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.models.detection.transform import GeneralizedRCNNTransform
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
#: Operators that launch nothing, besides views.
NO_LAUNCH = {"aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided",
             "aten::promote_types"}  # fmt: skip
#: On a GPU torchvision's batched_nms goes through the groups one by one above this many box coordinates. On a CPU it
#: does so above 4,000 already.
COORDINATES_OF_ONE_NMS_ON_A_GPU = 100_000


@dataclass
class Count:
    """What a call did: operators, their bytes and FLOPs by name, how many operations, synchronisations by cause, and
    how many uploads."""

    operators: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    syncs: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    uploads: int = 0


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from _tensors(each)


def _bytes(tensor: Tensor) -> int:
    """Of what is in memory: an expanded dimension is there once."""
    return tensor.element_size() * math.prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )


class _Dispatched(TorchDispatchMode):
    """Counts what the dispatcher hands to a backend while this mode is on, to whatever `of()` is then."""

    def __init__(self, of: Callable[[], Count]) -> None:
        super().__init__()
        self.of = of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, count, kwargs = func._schema.name, self.of(), kwargs or {}
        if name in READS:
            count.syncs[name] += 1
        if name == "aten::index":
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            count.syncs["mask as index"] += len(masks)
        result = func(*args, **kwargs)
        if not func.is_view and name not in NO_LAUNCH:
            count.operations += 1
            count.operators[name] += 1
            count.bytes[name] += sum(map(_bytes, _tensors([args, *kwargs.values(), result])))
            if flops := flop_registry.get(func.overloadpacket):
                count.flops[name] += flops(*args, **kwargs, out_val=result)
        return result


class _Called(TorchFunctionMode):
    """Counts uploads and downloads, which the dispatcher does not see on a CPU."""

    def __init__(self, of: Callable[[], Count]) -> None:
        super().__init__()
        self.of = of
        # Tensors that would be in the host's memory. They are kept, so that no other gets the id of one.
        self.on_host: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            # By its name "cpu" is the host, whereas a tensor's device stands for a GPU.
            if kwargs.get("device") is None or isinstance(kwargs["device"], str):
                self.on_host[id(result)] = result
            else:
                self.of().syncs["upload"] += 1
                self.of().uploads += 1
        elif func is Tensor.view and id(args[0]) in self.on_host:
            self.on_host[id(result)] = result
        elif func is Tensor.to and id(args[0]) in self.on_host:
            self.of().syncs["upload"] += not kwargs.get("non_blocking", False)
            self.of().uploads += 1
        elif func is Tensor.tolist and id(args[0]) not in self.on_host:
            self.of().syncs["tolist"] += 1
        return result


def _batched_nms_of_a_gpu(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if boxes.numel() > COORDINATES_OF_ONE_NMS_ON_A_GPU:
        return box_ops._batched_nms_vanilla(boxes, scores, idxs, iou_threshold)
    return box_ops._batched_nms_coordinate_trick(boxes, scores, idxs, iou_threshold)


def _first_size(transform: Any, sizes: list[int]) -> int:
    """In place of torch_choice, which draws a number on the host: no synchronisation, though it looks like one."""
    return sizes[0]


def counted(call: Callable[[], Any], of: Callable[[], Count]) -> None:
    """Adds what `call` does in its second run to whatever `of()` is then; the first run sets up what is cached."""
    with (
        mock.patch.object(box_ops, "batched_nms", _batched_nms_of_a_gpu),
        mock.patch.object(GeneralizedRCNNTransform, "torch_choice", _first_size),
    ):
        call()
        with _Called(of), _Dispatched(of):
            call()


def count(call: Callable[[], Any]) -> Count:
    """What `call` does in its second run."""
    found = Count()
    counted(call, lambda: found)
    found.syncs = +found.syncs
    return found
