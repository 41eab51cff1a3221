# SPDX-License-Identifier: Apache-2.0
"""RoIs of the sizes that COCO's objects have, spread over the image or crowded around a few objects."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fpn_fast import ops
from fpn_fast.reference._roi_align import axis_samples
from fpn_fast.reference.multiscale_roi_align import axis_weights

#: COCO's small, medium and large objects: their share, and the range of their sides in pixels. Detectors enlarge COCO's
#: images by about SCALE.
SIZES = ((0.41, 8.0, 32.0), (0.34, 32.0, 96.0), (0.25, 96.0, 400.0))
SCALE = 1.667
#: Spread of the logarithm of the aspect ratio.
ASPECT = 0.4
#: Clustered RoIs: this share of them lies around so many objects, as a detector's proposals do.
CROWDED_SHARE, OBJECTS = 0.75, 8


def random_boxes(count: int, height: int, width: int, clustered: bool, generator: torch.Generator) -> Tensor:
    """[count, 4] (x1, y1, x2, y2) inside the image, sides log-uniform within COCO's classes."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    kind = uniform(count)
    side = torch.zeros(count)
    passed = 0.0
    for share, low, high in SIZES:
        inside = (kind >= passed) & (kind < passed + share)
        side = torch.where(inside, torch.exp(math.log(low) + uniform(count) * math.log(high / low)), side)
        passed += share
    side = side.clamp(min=SIZES[0][1]) * SCALE
    aspect = torch.exp(torch.randn(count, generator=generator) * ASPECT)
    extent = torch.stack([side * aspect.sqrt(), side / aspect.sqrt()], 1)
    image = torch.tensor([float(width), float(height)])
    centre = uniform(count, 2) * image
    if clustered:
        objects = uniform(OBJECTS, 2) * image
        chosen = objects[torch.randint(OBJECTS, (count,), generator=generator)]
        near = chosen + torch.randn(count, 2, generator=generator) * extent / 4
        centre = torch.where(uniform(count, 1) < CROWDED_SHARE, near, centre)
    first, last = centre - extent / 2, centre + extent / 2
    return torch.cat([torch.minimum(first.clamp(min=0), image - 1), torch.minimum(last.clamp(min=1), image)], 1)


@functools.lru_cache(maxsize=64)
def random_rois(batch: int, count: int, height: int, width: int, clustered: bool) -> Tensor:
    """[batch * count, 5] (image, x1, y1, x2, y2), the same for every device."""
    generator = torch.Generator().manual_seed(1)
    boxes = [random_boxes(count, height, width, clustered, generator) for _ in range(batch)]
    return torch.cat([torch.cat([torch.full((count, 1), float(i)), b], 1) for i, b in enumerate(boxes)])


@functools.lru_cache(maxsize=64)
def pixels_read(
    batch: int,
    count: int,
    levels: tuple[tuple[int, int], ...],
    scales: tuple[float, ...],
    output_size: int,
    sampling_ratio: int,
    clustered: bool,
    aligned: bool = False,
) -> int:
    """Pixels of all maps that at least one RoI reads: the least that a pooler loads from memory."""
    height, width = (round(size / scales[0]) for size in levels[0])
    rois = random_rois(batch, count, height, width, clustered)
    maps = [torch.zeros(batch, *size, dtype=torch.bool) for size in levels]
    for (image, x1, y1, x2, y2), level in zip(rois.tolist(), ops.assign_levels(rois, scales).tolist(), strict=True):
        arguments = (scales[level], sampling_ratio, aligned, torch.float32)
        rows, cols = (
            axis_weights(axis_samples(lo, hi, size, output_size, *arguments), size).any(0)
            for lo, hi, size in zip((y1, x1), (y2, x2), levels[level], strict=True)
        )
        maps[level][int(image)] |= rows[:, None] & cols
    return sum(int(each.sum()) for each in maps)
