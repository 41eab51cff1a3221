# SPDX-License-Identifier: Apache-2.0
"""The samples of RoIAlign in plain PyTorch, for both pool modes. This file is the specification of where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: An adaptive grid larger than this has no samples: csrc/common/roi_align.h.
MAX_ADAPTIVE_SAMPLES = 1 << 20
_SAMPLE_MARGIN = 8


@dataclass(frozen=True)
class Samples:
    """The samples of every bin along one axis; all fields but `per_bin` are [pooled, S].

    Of a grid far larger than the map, only the samples that can lie on the map are listed, and a few around them.

    per_bin: samples of a bin, listed or not.
    number: the sample's index within its bin.
    exists: False for padding, where a bin has fewer than S listed samples.
    on_map: whether the sample lies at most one pixel outside the map.
    lo, hi: the two pixels that the sample reads; weight_lo, weight_hi: their weights.
    """

    per_bin: int
    number: Tensor
    exists: Tensor
    on_map: Tensor
    lo: Tensor
    hi: Tensor
    weight_lo: Tensor
    weight_hi: Tensor

    def to(self, device: torch.device) -> Samples:
        tensors: dict[str, Any] = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **{name: each.to(device) for name, each in tensors.items()})


def axis_samples(
    lo: float, hi: float, size: int, pooled: int, scale: float, sampling_ratio: int, aligned: bool, dtype: torch.dtype
) -> Samples:
    """Place the samples of each of `pooled` bins along one axis of a RoI.

    lo, hi: the RoI's ends, in image pixels; size: pixels of the map; scale: map pixels per image pixel.

    Samples lie evenly in a bin: sampling_ratio of them or, if that is 0 or less, one per map pixel of the bin, rounded
    up. A sample on the map reads the two pixels around it bilinearly, or the border pixel.

    Source: torchvision/csrc/ops/cpu/roi_align_common.h.
    """
    offset = 0.5 if aligned else 0.0
    ends = torch.tensor([lo, hi], dtype=dtype, device="cpu") * scale - offset
    start, extent = ends[0], ends[1] - ends[0]
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = extent / pooled
    samples = sampling_ratio
    if sampling_ratio <= 0:
        samples = math.ceil(bin_size.item()) if 0 < bin_size.item() <= MAX_ADAPTIVE_SAMPLES else 0
    base = start + torch.arange(pooled, dtype=dtype, device="cpu") * bin_size
    first = torch.zeros_like(base, dtype=torch.int64)
    last = torch.full_like(first, samples)
    if samples > 2 * _SAMPLE_MARGIN and bin_size > 0:
        per_pixel = samples / bin_size
        first = ((-1 - base) * per_pixel - _SAMPLE_MARGIN).nan_to_num(0).clamp(0, samples).long()
        last = ((size - base) * per_pixel + _SAMPLE_MARGIN).nan_to_num(0).clamp(0, samples).long()
    number = first[:, None] + torch.arange(max(int((last - first).max()), 0), device="cpu")
    coordinate = base[:, None] + (number.to(dtype) + 0.5) * bin_size / samples
    on_map = (coordinate >= -1) & (coordinate <= size)
    coordinate = torch.where(on_map, coordinate, 0).clamp(0, size - 1)
    floor = coordinate.floor()
    weight_hi = coordinate - floor
    high = (floor + 1).clamp(max=size - 1)
    return Samples(samples, number, number < last[:, None], on_map, floor.long(), high.long(), 1 - weight_hi, weight_hi)


def each_roi(
    rois: Tensor,
    levels: Tensor,
    batch: int,
    sizes: Sequence[tuple[int, int]],
    output_size: tuple[int, int],
    scales: Sequence[float],
    *rule: Any,
) -> Iterator[tuple[int, int, int, Samples, Samples]]:
    """Yield (k, level, image, row samples, column samples) of each RoI that reads a map.

    A RoI reads none if its level or image does not exist, if it has a NaN, or if its bins have no samples.

    rois: [K, 5]; levels: [K]; batch: images; sizes: (H_l, W_l) per map; rule: sampling_ratio, aligned and the type of
    the coordinates. Samples are on the CPU.
    """
    # One copy for all RoIs: each copy from a GPU synchronises.
    table = torch.cat([rois.double(), levels[:, None].double()], 1).cpu().tolist()
    for k, (image, x1, y1, x2, y2, level) in enumerate(table):
        if not 0 <= level < len(sizes) or not -1 < image < batch or any(map(math.isnan, (x1, y1, x2, y2))):
            continue
        (height, width), scale = sizes[int(level)], scales[int(level)]
        rows = axis_samples(y1, y2, height, output_size[0], scale, *rule)
        cols = axis_samples(x1, x2, width, output_size[1], scale, *rule)
        if rows.number.numel() and cols.number.numel():
            yield k, int(level), int(image), rows, cols
