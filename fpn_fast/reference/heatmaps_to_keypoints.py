# SPDX-License-Identifier: Apache-2.0
"""The highest point of each heatmap, resized to its box, in plain PyTorch: box by box."""

from __future__ import annotations

import torch
from torch import Tensor

#: A box with a longer side, in pixels, gives zeros.
LONGEST_SIDE = 8192


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """heatmaps [R, K, h, w], boxes [R, 4] of float32 or float64 -> keypoints [R, K, 3] and scores [R, K], float32.

    As torchvision's heatmaps_to_keypoints: a box's maps are resized to its size, rounded up, of at least one pixel;
    bicubic as in torch.nn.functional.interpolate, without aligned corners, along x first, in float32 (float64 for
    float64). Every product and sum is rounded on its own, in the order written here. The first of the highest
    positions in row-major order is the keypoint, a NaN higher than any number; a pixel's centre is half a pixel on.
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
        # Of equal numbers, and of NaNs, the first.
        position = resized.argmax(1)
        scores[box] = resized.gather(1, position[:, None])[:, 0].to(torch.float32)
        centre = torch.stack((position % width, position // width), 1).to(boxes.dtype) + 0.5
        keypoints[box, :, :2] = (centre * (sides[box] / pixels[box]) + boxes[box, :2]).to(torch.float32)
        keypoints[box, :, 2] = 1
    return keypoints, scores


def _resize(maps: Tensor, size: int) -> Tensor:
    """maps [K, rows, columns] -> [K, rows, size]."""
    columns = maps.size(2)
    # Of two tensors: a GPU divides by a number as it multiplies by its reciprocal.
    scale = torch.full((), columns, dtype=maps.dtype, device=maps.device) / torch.full(
        (), size, dtype=maps.dtype, device=maps.device
    )
    source = scale * (torch.arange(size, dtype=maps.dtype, device=maps.device) + 0.5) - 0.5
    first = source.floor().clamp(max=columns - 1)
    weights = _weights((source - first).clamp(max=1))
    index = [(first.to(torch.int64) + i - 1).clamp(0, columns - 1) for i in range(4)]
    resized = maps[:, :, index[0]] * weights[0]
    for tap, weight in zip(index[1:], weights[1:], strict=True):
        resized = resized + maps[:, :, tap] * weight
    return resized


def _weights(t: Tensor) -> list[Tensor]:
    """Of the four pixels around a place that is t, from 0 to 1, after the second: Keys' cubic with a = -0.75."""
    return [_far(t + 1), _near(t), _near(1 - t), _far((1 - t) + 1)]


def _near(x: Tensor) -> Tensor:
    return (1.25 * x - 2.25) * x * x + 1


def _far(x: Tensor) -> Tensor:
    return ((-0.75 * x + 3.75) * x - 6) * x + 3
