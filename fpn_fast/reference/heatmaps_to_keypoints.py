# SPDX-License-Identifier: Apache-2.0
"""The highest position of each heatmap resized to its box, in plain PyTorch, box by box."""

from __future__ import annotations

import torch
from torch import Tensor

#: In pixels. A box with a longer side gives zeros.
LONGEST_SIDE = 8192


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return keypoints [R, K, 3] and scores [R, K], float32, of heatmaps [R, K, h, w] and boxes [R, 4].

    Boxes are float32 or float64. Like in torchvision's heatmaps_to_keypoints, the maps are resized to the box's size
    rounded up, at least one pixel. The resize is that of torch.nn.functional.interpolate, bicubic without aligned
    corners, along x first, in float32 (float64 for float64). Every product and sum is rounded by itself, in the order
    written here. The keypoint is the centre of the highest pixel, the first in row-major order; a NaN is the highest.
    """
    accumulate = torch.float64 if heatmaps.dtype == torch.float64 else torch.float32
    keypoints = torch.zeros((*heatmaps.shape[:2], 3), dtype=torch.float32, device=heatmaps.device)
    scores = torch.zeros(heatmaps.shape[:2], dtype=torch.float32, device=heatmaps.device)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    usable = boxes.isfinite().all(1) & (sides <= LONGEST_SIDE).all(1)
    pixels = torch.where(usable[:, None], sides, 0).ceil()
    for box, (width, height) in enumerate(pixels.to(torch.int64).tolist()):
        if width == 0:
            continue
        rows = _resize(heatmaps[box].to(accumulate), width)
        resized = _resize(rows.mT, height).mT.flatten(1)
        # argmax returns the first of equal values, and of NaNs.
        position = resized.argmax(1)
        scores[box] = resized.gather(1, position[:, None])[:, 0].to(torch.float32)
        centre = torch.stack((position % width, position // width), 1).to(boxes.dtype) + 0.5
        keypoints[box, :, :2] = (centre * (sides[box] / pixels[box]) + boxes[box, :2]).to(torch.float32)
        keypoints[box, :, 2] = 1
    return keypoints, scores


def _resize(maps: Tensor, size: int) -> Tensor:
    """Resize maps [K, rows, columns] to [K, rows, size]."""
    sizes = torch.full((), size, dtype=maps.dtype, device=maps.device)
    index, weights = taps(torch.arange(size, dtype=maps.dtype, device=maps.device), maps.size(2), sizes)
    resized = maps[:, :, index[0]] * weights[0]
    for tap, weight in zip(index[1:], weights[1:], strict=True):
        resized = resized + maps[:, :, tap] * weight
    return resized


def taps(position: Tensor, columns: int, size: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the four columns that positions read in a map of `columns` resized to `size`, and their weights."""
    # Both are tensors because PyTorch on a GPU divides by a Python number as it multiplies by the reciprocal.
    scale = torch.full((), columns, dtype=position.dtype, device=position.device) / size
    source = scale * (position + 0.5) - 0.5
    first = source.floor().clamp(max=columns - 1)
    weights = _weights((source - first).clamp(max=1))
    return [(first.to(torch.int64) + i - 1).clamp(0, columns - 1) for i in range(4)], weights


def _weights(t: Tensor) -> list[Tensor]:
    """Return Keys' cubic weights (a = -0.75) of four pixels around a position t, 0 to 1, after the second."""
    return [_far(t + 1), _near(t), _near(1 - t), _far((1 - t) + 1)]


def _near(x: Tensor) -> Tensor:
    return (1.25 * x - 2.25) * x * x + 1


def _far(x: Tensor) -> Tensor:
    return ((-0.75 * x + 3.75) * x - 6) * x + 3
