# SPDX-License-Identifier: Apache-2.0
"""Mask pasting in plain PyTorch: all masks at once, by the weights with which each pixel reads its mask."""

from __future__ import annotations

import torch
from torch import Tensor

#: A box with a corner farther from the image's origin than this gives an empty mask.
FARTHEST = 2.0**29


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, padding: int, threshold: float | None) -> Tensor:
    """masks [K, 1, M, M], boxes [K, 4] of float32 or float64 -> [K, 1, height, width] of masks' type, or bool.

    As torchvision's paste_masks_in_image: a mask is padded with zeros, its box grown about the centre by as much and
    its corners cut to integers, both inclusive; the mask is resized to the box, bilinearly without aligned corners, in
    float32 (float64 for float64), and rounded once. A threshold makes bool of it, true above.
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
    """First and last pixels along x and y, [K, 2] int64 each, and whether the box is one, [K]."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    corners = torch.stack((centre - half, centre + half), 1)
    # Written so that NaN fails.
    usable = (corners.abs() <= FARTHEST).flatten(1).all(1)
    corners = torch.where(usable[:, None, None], corners, 0).to(torch.int64)
    return corners[:, 0], corners[:, 1], usable


def _taps(
    low: Tensor, high: Tensor, extent: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For each of the `extent` pixels of the image, [K, extent]: the two mask pixels that it reads, their weights, and
    whether it is in the box."""
    position = torch.arange(extent, device=low.device)
    inside = (position >= low[:, None]) & (position <= high[:, None])
    resized = (high - low + 1).clamp(min=1)
    scale = torch.full((), size, dtype=dtype, device=low.device) / resized.to(dtype)
    coordinate = (scale[:, None] * ((position - low[:, None]).to(dtype) + 0.5) - 0.5).clamp(min=0)
    # Outside of the box any pixel will do.
    first = coordinate.clamp(max=size - 1).to(torch.int64)
    weight = (coordinate - first).clamp(max=1)
    return first, (first + 1).clamp(max=size - 1), 1 - weight, weight, inside


def _columns(maps: Tensor, index: Tensor) -> Tensor:
    """maps [K, rows, columns], index [K, count] -> [K, rows, count]."""
    return maps.gather(2, index[:, None].expand(-1, maps.size(1), -1))
