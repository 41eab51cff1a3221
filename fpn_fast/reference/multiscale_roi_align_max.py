# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign in max mode in plain PyTorch. This file is the specification; the kernels are checked against
it. Note [Winners] in csrc/common/roi_align_max.h defines a winner."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast.reference._roi_align import Samples, each_roi

_WINNER_MASK = (1 << 15) - 1


def _bilinear(image: Tensor, rows: Samples, cols: Samples) -> Tensor:
    """Interpolate an image [C, H, W] at the samples of each bin: [C, PH, PW, SY * SX], rows first, then columns.

    The order of operations is part of the specification because the values are compared.
    """

    def across(row: Tensor) -> Tensor:
        left, right = (image[:, row[:, None, :, None], pixel[None, :, None, :]] for pixel in (cols.lo, cols.hi))
        return cols.weight_lo[:, None] * left + cols.weight_hi[:, None] * right

    above, below = across(rows.lo), across(rows.hi)
    weight_lo, weight_hi = rows.weight_lo[:, None, :, None], rows.weight_hi[:, None, :, None]
    return (weight_lo * above + weight_hi * below).flatten(3)


def multiscale_roi_align_max(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the largest sample of each bin and its position: (pooled, winners), both [K, C, *output_size].

    Arguments: see :func:`fpn_fast.reference.multiscale_roi_align`.

    pooled has the features' dtype; bilinear values are computed in float32 (float64 for float64) and rounded once. A
    sample more than a pixel off the map counts as 0. The first of equal samples wins, in the order of rows, then
    columns. NaN and negative infinity never win. A bin without a winner is 0, and so is the row of a RoI without a
    level. winners is int32: ``row << 16 | column`` of the sample, both modulo 2**15; -1 for a bin without gradient.

    Source: mmcv/ops/csrc/common/cuda/roi_align_cuda_kernel.cuh, where a bin without a winner is the lowest float.
    """
    first = features[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    shape = (len(rois), first.size(1), *output_size)
    pooled = torch.zeros(shape, dtype=dtype, device=first.device)
    winners = torch.full(shape, -1, dtype=torch.int32, device=first.device)
    sizes = [(f.size(2), f.size(3)) for f in features]
    rule = (output_size, scales, sampling_ratio, aligned, dtype)
    for k, level, image, rows, cols in each_roi(rois, levels, first.size(0), sizes, *rule):
        rows, cols = rows.to(rois.device), cols.to(rois.device)
        values = _bilinear(features[level][image].to(dtype), rows, cols)
        both = lambda y, x: (y[:, None, :, None] & x[None, :, None, :]).flatten(2)  # noqa: E731
        on_map, exists = both(rows.on_map, cols.on_map), both(rows.exists, cols.exists)
        values = torch.where(on_map, values, 0)
        values = torch.where(exists & ~values.isnan(), values, -math.inf)
        # argmax returns the first of equal values.
        best = values.argmax(3, keepdim=True)
        value = values.gather(3, best).squeeze(3)
        row, col = rows.number & _WINNER_MASK, cols.number & _WINNER_MASK
        number = (row[:, None, :, None] << 16 | col[None, :, None, :]).flatten(2)
        number = torch.where(on_map, number, -1).expand(values.shape).gather(3, best).squeeze(3)
        pooled[k] = torch.where(value == -math.inf, 0, value)
        winners[k] = torch.where(value == -math.inf, -1, number)
    return pooled.to(first.dtype), winners


def _winner_weights(samples: Samples, numbers: Tensor, size: int, axis: int) -> Tensor:
    """Return the weights with which winners [C, PH, PW] read the pixels of an axis: [C, PH * PW, size]."""
    bins = torch.arange(len(samples.number), device=numbers.device).view((1, -1, 1) if axis == 0 else (1, 1, -1))
    # For a bin without a winner this is an arbitrary sample, which the caller multiplies by zero.
    at = ((numbers - samples.number[bins, 0]) & _WINNER_MASK).clamp(max=samples.number.size(1) - 1)
    pixels = torch.arange(size, device=numbers.device)
    weights = [
        torch.where(pixel[bins, at][..., None] == pixels, weight[bins, at][..., None], 0)
        for pixel, weight in ((samples.lo, samples.weight_lo), (samples.hi, samples.weight_hi))
    ]
    return (weights[0] + weights[1]).flatten(1, 2)


def multiscale_roi_align_max_backward(
    grad: Tensor,
    winners: Tensor,
    rois: Tensor,
    levels: Tensor,
    batch: int,
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> list[Tensor]:
    """Return the gradients of the features, [N, C, H_l, W_l] per map: each bin's goes to the pixels of its winner.

    grad: [K, C, PH, PW]; winners: from the forward pass; sizes: (H_l, W_l) per map. RoIs are added in ascending order.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = [torch.zeros(batch, grad.size(1), *size, dtype=dtype, device=grad.device) for size in sizes]
    rule = ((grad.size(2), grad.size(3)), scales, sampling_ratio, aligned, dtype)
    for k, level, image, rows, cols in each_roi(rois, levels, batch, sizes, *rule):
        row_weights = _winner_weights(rows.to(rois.device), winners[k] >> 16, sizes[level][0], 0)
        col_weights = _winner_weights(cols.to(rois.device), winners[k], sizes[level][1], 1)
        values = torch.where(winners[k] < 0, 0, grad[k].to(dtype)).flatten(1)
        sums[level][image] += (row_weights * values[..., None]).mT @ col_weights
    return [total.to(grad.dtype) for total in sums]
