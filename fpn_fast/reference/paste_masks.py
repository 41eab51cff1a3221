# SPDX-License-Identifier: Apache-2.0
"""Mask pasting in plain PyTorch, for all masks at once, with a weight per pixel and axis."""

from __future__ import annotations

import torch
from torch import Tensor

#: In pixels. A box with a corner farther from the image's origin gives an empty mask.
FARTHEST = 2.0**29


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, padding: int, threshold: float | None) -> Tensor:
    """Paste masks [K, 1, M, M] into boxes [K, 4]: [K, 1, height, width] in the masks' dtype or bool.

    Like in torchvision's paste_masks_in_image, a mask is padded with zeros, and its box grows about its centre in
    proportion. The corners are truncated to integers, first and last pixel. The mask is resized to the box bilinearly
    without aligned corners, in float32 (float64 for float64), and rounded once. With a threshold the result is whether
    values are above it.
    """
    size = masks.size(-1)
    accumulate = torch.float64 if masks.dtype == torch.float64 else torch.float32
    padded = torch.nn.functional.pad(masks[:, 0].to(accumulate), (padding,) * 4)
    low, high, usable = _grow(boxes, (size + 2 * padding) / size)
    (left, right, wl, wr, in_x), (upper, lower, wu, wd, in_y) = (
        _taps(low[:, i], high[:, i], extent, size + 2 * padding, accumulate) for i, extent in enumerate((width, height))
    )
    rows = _columns(padded, left) * wl[:, None] + _columns(padded, right) * wr[:, None]
    pasted = _columns(rows.mT, upper).mT * wu[:, :, None] + _columns(rows.mT, lower).mT * wd[:, :, None]
    inside = in_y[:, :, None] & in_x[:, None] & usable[:, None, None]
    pasted = torch.where(inside, pasted, 0)
    result = pasted.to(masks.dtype) if threshold is None else inside & (pasted > threshold)
    return result[:, None]


def _grow(boxes: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return first and last pixels along x and y, [K, 2] int64 each, and which boxes are usable, [K]."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    corners = torch.stack((centre - half, centre + half), 1)
    # A comparison with NaN is False.
    usable = (corners.abs() <= FARTHEST).flatten(1).all(1)
    corners = torch.where(usable[:, None, None], corners, 0).to(torch.int64)
    return corners[:, 0], corners[:, 1], usable


def _taps(
    low: Tensor, high: Tensor, extent: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return, per pixel of one axis of the image, [K, extent]: the two mask pixels that it reads, their weights, and
    whether the pixel lies in the box."""
    position = torch.arange(extent, device=low.device)
    inside = (position >= low[:, None]) & (position <= high[:, None])
    resized = (high - low + 1).clamp(min=1)
    scale = torch.full((), size, dtype=dtype, device=low.device) / resized.to(dtype)
    coordinate = (scale[:, None] * ((position - low[:, None]).to(dtype) + 0.5) - 0.5).clamp(min=0)
    # Outside the box the index only has to be valid.
    first = coordinate.clamp(max=size - 1).to(torch.int64)
    weight = (coordinate - first).clamp(max=1)
    return first, (first + 1).clamp(max=size - 1), 1 - weight, weight, inside


def _columns(maps: Tensor, index: Tensor) -> Tensor:
    """Select columns [K, count] of maps [K, rows, columns]: [K, rows, count]."""
    return maps.gather(2, index[:, None].expand(-1, maps.size(1), -1))
