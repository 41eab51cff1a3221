# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast.reference._roi_align import Samples, each_roi

#: Where each library adds its epsilon, and how much: to the logarithm's argument, and to the sum.
LEVEL_FORMULAS = {"torchvision": (0.0, 1e-6), "detectron2": (1e-8, 0.0), "mmdet": (1e-6, 0.0)}


def assign_levels(
    rois: Tensor,
    first_level: int,
    last_level: int,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    level_formula: str = "torchvision",
) -> Tensor:
    """Assign each RoI to a level by equation 1 of the FPN paper.

    rois: [K, 5] (image, x1, y1, x2, y2). Returns [K] int64: 0 for `first_level`, -1 for a RoI without a level, which
    has a NaN or is inverted along one axis. A RoI of zero area belongs to the first level, an infinite one to the last.

    The level is ``floor(canonical_level + log2(sqrt(w * h) / canonical_scale + inside) + outside)`` in float32, clamped
    to [first_level, last_level]. The formulas differ in their epsilons. mmdetection counts from its first map, which it
    treats as level 2 whatever the map's stride is.

    Source: torchvision/ops/poolers.py LevelMapper; detectron2/modeling/poolers.py assign_boxes_to_levels; mmdetection's
    SingleRoIExtractor.map_roi_levels.
    """
    inside, outside = LEVEL_FORMULAS[level_formula]
    box = rois[:, 1:].float()
    scale = torch.sqrt((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))
    if level_formula == "mmdet":
        canonical_scale, canonical_level = canonical_scale / 2 ** (canonical_level - 2), 0
        first_level, last_level = 0, last_level - first_level
        level = torch.floor(torch.log2(scale / canonical_scale + inside))
    elif level_formula == "detectron2":
        level = torch.floor(canonical_level + torch.log2(scale / canonical_scale + inside))
    else:
        level = torch.floor(canonical_level + torch.log2(scale / canonical_scale) + torch.tensor(outside, device="cpu"))
    level = level.clamp(first_level, last_level) - first_level
    return torch.where(rois.isnan().any(1) | level.isnan(), -1, level).long()


def axis_weights(samples: Samples, size: int) -> Tensor:
    """Sum the weights with which each bin reads each pixel of an axis: [pooled, size]."""
    weights = samples.weight_lo.new_zeros(len(samples.number), size)
    used = samples.exists & samples.on_map
    bins = torch.arange(len(weights), device=weights.device)[:, None].expand_as(used)[used]
    weights.index_put_((bins, samples.lo[used]), samples.weight_lo[used], accumulate=True)
    return weights.index_put_((bins, samples.hi[used]), samples.weight_hi[used], accumulate=True)


def _each_read(
    rois: Tensor, levels: Tensor, batch: int, sizes: Sequence[tuple[int, int]], *rule: Any
) -> Iterator[tuple[int, int, tuple[Any, ...], Tensor, Tensor]]:
    """Yield (k, level, window, Wy / count, Wx) of each RoI; `window` indexes the pixels of the map that it reads."""
    for k, level, image, row_samples, col_samples in each_roi(rois, levels, batch, sizes, *rule):
        rows, cols = axis_weights(row_samples, sizes[level][0]), axis_weights(col_samples, sizes[level][1])
        read_y, read_x = rows.any(0).nonzero().flatten(), cols.any(0).nonzero().flatten()
        if len(read_y) == 0 or len(read_x) == 0:
            continue
        y, x = slice(int(read_y[0]), int(read_y[-1]) + 1), slice(int(read_x[0]), int(read_x[-1]) + 1)
        count = max(row_samples.per_bin * col_samples.per_bin, 1)
        yield k, level, (image, slice(None), y, x), (rows[:, y] / count).to(rois.device), cols[:, x].to(rois.device)


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool each RoI from map ``levels[k]`` of its image: row k is ``Wy F Wx^T / count``.

    features: L maps [N, C, H_l, W_l]; rois: [K, 5] (image, x1, y1, x2, y2) in image pixels; levels: [K] int64; scales:
    map pixels per image pixel of each map.

    Returns [K, C, *output_size] in the features' dtype, summed in float32 (float64 for float64) and rounded once. A RoI
    without a level (below 0 or at least L), with a NaN or outside the batch gives a row of zeros. Wy and Wx are
    :func:`axis_weights`; count is the number of samples of a bin, at least 1.
    """
    first = features[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    pooled = torch.zeros(len(rois), first.size(1), *output_size, dtype=dtype, device=first.device)
    sizes = [(f.size(2), f.size(3)) for f in features]
    rule = (output_size, scales, sampling_ratio, aligned, dtype)
    for k, level, window, rows, cols in _each_read(rois, levels, first.size(0), sizes, *rule):
        pooled[k] = rows @ features[level][window].to(dtype) @ cols.mT
    return pooled.to(first.dtype)


def multiscale_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor,
    batch: int,
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> list[Tensor]:
    """Return the gradients of the features, [N, C, H_l, W_l] per map: the sum of ``Wy^T G Wx / count`` over the RoIs.

    grad: [K, C, PH, PW]; sizes: (H_l, W_l) per map. RoIs are added in ascending order.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = [torch.zeros(batch, grad.size(1), *size, dtype=dtype, device=grad.device) for size in sizes]
    rule = ((grad.size(2), grad.size(3)), scales, sampling_ratio, aligned, dtype)
    for k, level, window, rows, cols in _each_read(rois, levels, batch, sizes, *rule):
        sums[level][window] += rows.mT @ grad[k].to(dtype) @ cols
    return [total.to(grad.dtype) for total in sums]
