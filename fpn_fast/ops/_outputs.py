# SPDX-License-Identifier: Apache-2.0
"""Allocate the outputs of ops that share them: for a tracer's fake tensors, and for the Triton kernels to fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast._memory_format import memory_format


def empty_pooled(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, height: int, width: int, *_: Any
) -> Tensor:
    """Allocate the pooled RoIs [K, C, height, width] in the finest map's dtype and memory format."""
    first = features[0]
    shape = (rois.size(0), first.size(1), height, width)
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format(first))


def empty_pooled_and_winners(*arguments: Any) -> tuple[Tensor, Tensor]:
    pooled = empty_pooled(*arguments)
    return pooled, torch.empty_like(pooled, dtype=torch.int32, memory_format=memory_format(arguments[0][0]))


def empty_grads(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Allocate the gradients of the features, [batch, C, H_l, W_l] per map, for the arguments of a backward op."""
    batch, sizes, *_, channels_last = arguments[-7:]
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty((batch, grad.size(1), height, width), dtype=grad.dtype, device=grad.device, memory_format=form)
        for height, width in zip(sizes[::2], sizes[1::2], strict=True)
    ]


def empty_detections(image_sizes: Tensor, max_detections: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate (boxes, scores, labels, counts) of N images."""
    batch = image_sizes.size(0)
    return (
        image_sizes.new_empty((batch, max_detections, 4)),
        image_sizes.new_empty((batch, max_detections)),
        image_sizes.new_empty((batch, max_detections), dtype=torch.int64),
        image_sizes.new_empty((batch,), dtype=torch.int64),
    )
