# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign in max mode in plain PyTorch. This file is the specification; the kernels are checked against
it. Note [Winners] in csrc/common/roi_align_max.h says what a winner is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_fast.reference.multiscale_roi_align import MAX_ADAPTIVE_SAMPLES, located_rois

_SAMPLE_MARGIN = 8
_WINNER_MASK = (1 << 15) - 1


@dataclass(frozen=True)
class Samples:
    """The samples of every bin along one axis, all [pooled, S], of which bins have up to S that are looked at.

    number: in the bin; exists: whether there is such a sample; on_map: whether it lies on the map; lo, hi: the pixels
    that it reads; weight_lo, weight_hi: with which weights.
    """

    number: Tensor
    exists: Tensor
    on_map: Tensor
    lo: Tensor
    hi: Tensor
    weight_lo: Tensor
    weight_hi: Tensor

    def to(self, device: torch.device) -> Samples:
        return Samples(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def axis_samples(
    lo: float, hi: float, size: int, pooled: int, scale: float, sampling_ratio: int, aligned: bool, dtype: torch.dtype
) -> Samples:
    """Along one axis, the samples of each bin: those of :func:`fpn_fast.reference.multiscale_roi_align.axis_weights`.

    Of a grid far larger than the map only what can be on it is looked at, and some more: where it goes on beyond the
    map, a sample off the map is among these.
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
    base = start + torch.arange(pooled, dtype=dtype) * bin_size
    first, last = torch.zeros(pooled, dtype=torch.int64), torch.full((pooled,), samples)
    if samples > 2 * _SAMPLE_MARGIN and bin_size > 0:
        per_pixel = samples / bin_size
        first = ((-1 - base) * per_pixel - _SAMPLE_MARGIN).nan_to_num(0).clamp(0, samples).long()
        last = ((size - base) * per_pixel + _SAMPLE_MARGIN).nan_to_num(0).clamp(0, samples).long()
    number = first[:, None] + torch.arange(max(int((last - first).max()), 0))
    coordinate = base[:, None] + (number.to(dtype) + 0.5) * bin_size / samples
    on_map = (coordinate >= -1) & (coordinate <= size)
    coordinate = torch.where(on_map, coordinate, 0).clamp(0, size - 1)
    floor = coordinate.floor()
    weight_hi = coordinate - floor
    high = (floor + 1).clamp(max=size - 1)
    return Samples(number, number < last[:, None], on_map, floor.long(), high.long(), 1 - weight_hi, weight_hi)


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
) -> Iterator[tuple[int, int, int, Samples, Samples]]:
    """(k, level, image, rows, cols) of each RoI that has a level, and samples."""
    for k, level, image, (x1, y1, x2, y2) in located_rois(rois, levels, batch, len(sizes)):
        (height, width), scale = sizes[level], scales[level]
        arguments = (scale, sampling_ratio, aligned, dtype)
        rows = axis_samples(y1, y2, height, output_size[0], *arguments)
        cols = axis_samples(x1, x2, width, output_size[1], *arguments)
        if rows.number.numel() and cols.number.numel():
            yield k, level, image, rows.to(rois.device), cols.to(rois.device)


def _bilinear(image: Tensor, rows: Samples, cols: Samples) -> Tensor:
    """[C, H, W] -> [C, PH, PW, SY * SX], the bilinear values of each bin's samples in the order of rows, then columns.

    The order of operations is part of the specification, for values are compared.
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
    """(pooled, winners): each bin's largest sample, and which one that is.

    Arguments are those of :func:`fpn_fast.reference.multiscale_roi_align`; both results are [K, C, *output_size].
    pooled, in the features' type: the greatest bilinear value, computed in float32 (float64 for float64) and rounded
    once. A sample more than a pixel off the map counts as 0. The first of equal ones wins, in the order of rows, then
    columns; NaN and negative infinity never do, and without a winner a bin is 0, as are rows of RoIs without a level.
    winners, int32: -1 where no gradient goes, or ``row << 16 | column`` of the sample, both modulo 2**15.

    Source: mmcv/ops/csrc/common/cuda/roi_align_cuda_kernel.cuh, whose bins without a winner are the lowest float.
    """
    first = features[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    shape = (len(rois), first.size(1), *output_size)
    pooled = torch.zeros(shape, dtype=dtype, device=first.device)
    winners = torch.full(shape, -1, dtype=torch.int32, device=first.device)
    sizes = [(f.size(2), f.size(3)) for f in features]
    for k, level, image, rows, cols in _each_roi(
        rois, levels, first.size(0), sizes, output_size, scales, sampling_ratio, aligned, dtype
    ):
        values = _bilinear(features[level][image].to(dtype), rows, cols)
        both = lambda y, x: (y[:, None, :, None] & x[None, :, None, :]).flatten(2)  # noqa: E731
        on_map, exists = both(rows.on_map, cols.on_map), both(rows.exists, cols.exists)
        values = torch.where(on_map, values, 0)
        values = torch.where(exists & ~values.isnan(), values, -math.inf)
        # argmax gives the first of equal ones.
        best = values.argmax(3, keepdim=True)
        value = values.gather(3, best).squeeze(3)
        row, col = rows.number & _WINNER_MASK, cols.number & _WINNER_MASK
        number = (row[:, None, :, None] << 16 | col[None, :, None, :]).flatten(2)
        number = torch.where(on_map, number, -1).expand(values.shape).gather(3, best).squeeze(3)
        pooled[k] = torch.where(value == -math.inf, 0, value)
        winners[k] = torch.where(value == -math.inf, -1, number)
    return pooled.to(first.dtype), winners


def _winner_weights(samples: Samples, numbers: Tensor, size: int, axis: int) -> Tensor:
    """[C, PH, PW] numbers of winners -> [C, PH * PW, size], the weights with which each reads the pixels of an axis."""
    bins = torch.arange(len(samples.number), device=numbers.device).view((1, -1, 1) if axis == 0 else (1, 1, -1))
    # Where nothing won this is any sample, and the caller lets none of it through.
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
    """Gradients of the features, each bin's to the pixels of its winner with their weights: [N, C, H_l, W_l] each.

    grad: [K, C, PH, PW]; winners: of the forward pass; sizes: (H_l, W_l) of each map. Summed over the RoIs in
    ascending order; zero where no winner reads.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = [torch.zeros(batch, grad.size(1), *size, dtype=dtype, device=grad.device) for size in sizes]
    output_size = (grad.size(2), grad.size(3))
    for k, level, image, rows, cols in _each_roi(
        rois, levels, batch, sizes, output_size, scales, sampling_ratio, aligned, dtype
    ):
        height, width = sizes[level]
        row_weights = _winner_weights(rows, winners[k] >> 16, height, 0)
        col_weights = _winner_weights(cols, winners[k], width, 1)
        values = torch.where(winners[k] < 0, 0, grad[k].to(dtype)).flatten(1)
        sums[level][image] += (row_weights * values[..., None]).mT @ col_weights
    return [total.to(grad.dtype) for total in sums]
