# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Where each library adds its epsilon, and how much: to the logarithm's argument, and to the sum.
LEVEL_FORMULAS = {"torchvision": (0.0, 1e-6), "detectron2": (1e-8, 0.0), "mmdet": (1e-6, 0.0)}

#: An adaptive grid larger than this has no samples: csrc/common/roi_align.h.
MAX_ADAPTIVE_SAMPLES = 1 << 20
_SAMPLE_MARGIN = 8


def assign_levels(
    rois: Tensor,
    first_level: int,
    last_level: int,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    level_formula: str = "torchvision",
) -> Tensor:
    """Equation 1 of the FPN paper: [K, 5] (image, x1, y1, x2, y2) -> [K] int64, 0 for level `first_level`; -1: none.

    ``floor(canonical_level + log2(sqrt(w * h) / canonical_scale + inside) + outside)`` in float32, clamped to
    [first_level, last_level]; the formulas differ in their epsilons. mmdet's counts from its first map, whatever that
    one's stride, which is what level 2 is here. A RoI with a NaN, or inverted along one axis, has no level; zero area
    goes to the first, infinite to the last.

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
        level = torch.floor(canonical_level + torch.log2(scale / canonical_scale) + torch.tensor(outside))
    level = level.clamp(first_level, last_level) - first_level
    return torch.where(rois.isnan().any(1) | level.isnan(), -1, level).long()


def axis_weights(
    lo: float, hi: float, size: int, pooled: int, scale: float, sampling_ratio: int, aligned: bool, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Along one axis, the summed weights with which each bin reads each pixel, [pooled, size], and samples per bin.

    lo, hi: the RoI, in image pixels. Samples lie evenly in a bin: sampling_ratio of them, or where that is not positive
    one for each pixel of the bin, rounded up. A sample more than a pixel outside [0, size - 1] reads nothing and
    counts; other ones read the two pixels around them, bilinearly, or the border.

    Source: torchvision/csrc/ops/cpu/roi_align_common.h.
    """
    offset = 0.5 if aligned else 0.0
    ends = torch.tensor([lo, hi], dtype=dtype) * scale - offset
    start, extent = ends[0], ends[1] - ends[0]
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = extent / pooled
    samples = sampling_ratio
    if sampling_ratio <= 0:
        samples = math.ceil(bin_size.item()) if 0 < bin_size.item() <= MAX_ADAPTIVE_SAMPLES else 0
    weights = torch.zeros(pooled, size, dtype=dtype)
    base = start + torch.arange(pooled, dtype=dtype) * bin_size
    first, count = torch.zeros(pooled, dtype=torch.int64), samples
    if samples > 2 * _SAMPLE_MARGIN and 0 < bin_size < math.inf:
        # A grid that may be far larger than the map: only what can be on it.
        first = ((-1 - base) * samples / bin_size).clamp(0, samples).long() - _SAMPLE_MARGIN
        count = min(samples, math.ceil((size + 1) * samples / bin_size.item())) + 2 * _SAMPLE_MARGIN
    grid = first[:, None] + torch.arange(count)
    coordinates = base[:, None] + (grid.to(dtype) + 0.5) * bin_size / samples
    inside = (grid >= 0) & (grid < samples) & (coordinates >= -1) & (coordinates <= size)
    rows = torch.arange(pooled)[:, None].expand_as(grid)[inside]
    coordinates = coordinates[inside].clamp(0, size - 1)
    lower = coordinates.floor()
    weights.index_put_((rows, lower.long()), 1 - (coordinates - lower), accumulate=True)
    weights.index_put_((rows, (lower + 1).clamp(max=size - 1).long()), coordinates - lower, accumulate=True)
    return weights, samples


def located_rois(
    rois: Tensor, levels: Tensor, batch: int, maps: int
) -> Iterator[tuple[int, int, int, tuple[float, float, float, float]]]:
    """(k, level, image, (x1, y1, x2, y2)) of each of rois [K, 5] that has a map and an image, and no NaN."""
    # In one move: a GPU is waited for once.
    table = torch.cat([rois.double(), levels[:, None].double()], 1).cpu().tolist()
    for k, (image, x1, y1, x2, y2, level) in enumerate(table):
        if 0 <= level < maps and -1 < image < batch and not any(map(math.isnan, (x1, y1, x2, y2))):
            yield k, int(level), int(image), (x1, y1, x2, y2)


def _each_roi(
    rois: Tensor,
    levels: Tensor,
    batch: int,
    sizes: Sequence[tuple[int, int]],
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    dtype: torch.dtype,
) -> Iterator[tuple[int, int, int, slice, slice, Tensor, Tensor]]:
    """(k, level, image, rows, cols, Wy, Wx) of each RoI that has a level, Wy and Wx cut to the pixels they read."""
    device = rois.device
    for k, level, image, (x1, y1, x2, y2) in located_rois(rois, levels, batch, len(sizes)):
        (height, width), scale = sizes[level], scales[level]
        arguments = (scale, sampling_ratio, aligned, dtype)
        rows, samples_y = axis_weights(y1, y2, height, output_size[0], *arguments)
        cols, samples_x = axis_weights(x1, x2, width, output_size[1], *arguments)
        read_y, read_x = rows.any(0).nonzero().flatten(), cols.any(0).nonzero().flatten()
        if len(read_y) == 0 or len(read_x) == 0:
            continue
        y, x = slice(int(read_y[0]), int(read_y[-1]) + 1), slice(int(read_x[0]), int(read_x[-1]) + 1)
        count = max(samples_y * samples_x, 1)
        yield k, level, image, y, x, (rows[:, y] / count).to(device), cols[:, x].to(device)


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Row k is ``Wy F Wx^T / count``: RoI k, on map ``levels[k]`` of its image, pooled to output_size.

    features: L maps [N, C, H_l, W_l]; rois: [K, 5] (image, x1, y1, x2, y2), image pixels; levels: [K] int64; scales: L,
    map pixels per image pixel; result: [K, C, *output_size] in the features' type, summed in float32 (float64 for
    float64) and rounded once. A RoI without level (below 0, or L and more), with a NaN, or of an image that is not in
    the batch gives a zero row. Wy and Wx are :func:`axis_weights`; count is the number of samples of a bin, at least 1.
    """
    first = features[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    pooled = torch.zeros(len(rois), first.size(1), *output_size, dtype=dtype, device=first.device)
    sizes = [(f.size(2), f.size(3)) for f in features]
    for k, level, image, y, x, rows, cols in _each_roi(
        rois, levels, first.size(0), sizes, output_size, scales, sampling_ratio, aligned, dtype
    ):
        pooled[k] = rows @ features[level][image, :, y, x].to(dtype) @ cols.mT
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
    """Gradients of the features, ``Wy^T G Wx / count`` summed over the RoIs in ascending order: [N, C, H_l, W_l] each.

    grad: [K, C, PH, PW]; sizes: (H_l, W_l) of each map. Zero where no RoI reads.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = [torch.zeros(batch, grad.size(1), *size, dtype=dtype, device=grad.device) for size in sizes]
    output_size = (grad.size(2), grad.size(3))
    for k, level, image, y, x, rows, cols in _each_roi(
        rois, levels, batch, sizes, output_size, scales, sampling_ratio, aligned, dtype
    ):
        sums[level][image, :, y, x] += rows.mT @ grad[k].to(dtype) @ cols
    return [total.to(grad.dtype) for total in sums]
